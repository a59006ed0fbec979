"""Page `rlhf inspect plan`: the steps, their models and memory, and all amounts, before anything runs."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from rlhf import console
from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError
from rlhf.importing import build_option
from rlhf.inspection.composing import Look, planned, read_examples
from rlhf.inspection.learning_rates import unusual_rate
from rlhf.inspection.memory import libraries, machine, passes, peak, size
from rlhf.inspection.roles import Role, roles_of
from rlhf.inspection.work import ORDER, Work, work_of, world_size
from rlhf.models.precision import Precision
from rlhf.planning.step import Step
from rlhf.runs.run_directory import Run
from rlhf.stage.base import Stage
from rlhf.stage.strategies import is_sharded
from rlhf.storage.plain import Plain

_NO_WEIGHTS = ("", "", "", "", "")  # columns of a row that is not a model's
NOT_INCLUDED = (
    "The peak is that of weights, optimizer state and the largest of training pass, sampling and update. Not included: "
    "scoring passes without gradients, buffers of kernels and of the allocator."
)


def show(words: Sequence[str]) -> None:
    """Print the page.

    Args:
        words: The command line of a run.

    Raises:
        UserError: A command line that could not be run.
    """
    made = planned(words)
    look = Look(made.steps)
    for note in made.notes:
        console.say(note, "yellow")
    console.say(console.format_plan([step.name for step in made.steps], made.skipped), "bold")
    steps = [(step.name, step.stage, _state(step), str(step.folder)) for step in made.steps]
    console.print_table("Steps", ("step", "stage", "", "directory"), steps)
    rows: list[tuple[str, ...]] = []
    work: dict[str, Work] = {}
    warnings: list[str] = []
    for step in made.steps:
        stage = look.stage(step, strict=False)
        work[step.name] = amounts(look, step, stage)
        roles = roles_of(look, stage)
        rows += _memory(look, step, stage, work[step.name], roles)
        if (unusual := unusual_rate(step, roles)) is not None:
            warnings.append(str(unusual))
    columns = ("step", "role", "parameters", "trained", "weights", "gradients", "optimizer", "total", "")
    console.say("")
    console.print_table("Models and memory", columns, rows)
    console.say(NOT_INCLUDED, "dim")
    console.say("")
    names = [name for name in ORDER if any(name in each.amounts for each in work.values())]
    lines = [(name, *(each.amounts.get(name, "") for each in work.values())) for name in names]
    console.print_table("Amounts", ("", *work), lines)
    for warning in warnings:
        console.say(warning, "yellow")


def amounts(look: Look, step: Step, stage: Stage) -> Work:
    """Return the amounts of a step's work.

    Data of a step that has not run is unknown, and so are the amounts that depend on it.
    """
    if all(look.unread(data) is None for data in look.data(step).values()):
        try:
            read_examples(stage)
        except UserError as error:
            if "sampler" not in vars(stage):
                raise
            console.say(f"{step.name}: {error}", "yellow")
    return work_of(stage, step.config)


def _state(step: Step) -> str:
    run = Run(step.folder)
    if run.finished:
        return "reused"
    return "to resume" if run.checkpoints else "to compute"


def _memory(look: Look, step: Step, stage: Stage, work: Work, roles: list[Role]) -> list[tuple[str, ...]]:
    precision: Precision = build_option(OmegaConf.create(step.config["precision"]))
    if is_sharded(step.config.get("trainer") or {}):
        roles = [role.shard(world_size(step.config)) for role in roles]
    rows = [_row(step.name if index == 0 else "", role) for index, role in enumerate(roles)]
    accelerator = _accelerator(step.config)
    measured, process = passes(look, stage, work, precision, accelerator), libraries(accelerator)
    if measured.unmeasured:
        rows.append(("", "training pass", *_NO_WEIGHTS, size(None), f"not in the peak: {measured.unmeasured}"))
    more = {
        "training pass": (measured.training, f"activations and gradients of {_shape(work.batch)}"),
        "sampling": (measured.sampling, "keys, values and logits of the largest sampling batch"),
        "process": (process or None, "Python, its libraries and the data"),
    }
    rows += [("", name, *_NO_WEIGHTS, size(count), note) for name, (count, note) in more.items() if count is not None]
    total = process + peak(roles, measured)
    have, what = machine(accelerator)
    note = f"{what}: {size(have)}" if have is not None else what
    if have is not None and total > have:
        note += ": it does not fit"
    rows.append(("", "peak", *_NO_WEIGHTS, size(total), note))
    return rows


def _shape(batch: TokenBatch | None) -> str:
    return "no batch" if batch is None else f"{batch.ids.shape[0]} rows of {batch.ids.shape[1]} tokens"


def _accelerator(config: Plain) -> str:
    return str((config.get("trainer") or {}).get("accelerator", "cpu"))


def _row(step: str, role: Role) -> tuple[str, ...]:
    counts = (f"{role.parameters:,}", f"{role.trained:,}" if role.trained else "-")
    sizes = (size(role.weights), size(role.gradients), size(role.optimizer), size(role.total))
    return (step, role.name, *counts, *sizes, role.note)
