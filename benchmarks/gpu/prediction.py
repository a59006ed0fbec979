"""Memory that ``rlhf inspect plan`` predicts for a command whose data is given."""

from collections.abc import Sequence

from omegaconf import OmegaConf

from rlhf.data.split import Split
from rlhf.importing import build_option
from rlhf.inspection.composing import Look, planned, read_examples
from rlhf.inspection.memory import passes, peak
from rlhf.inspection.roles import roles_of
from rlhf.inspection.work import work_of
from rlhf.models.precision import Precision


def predict_bytes(words: Sequence[str], data: Split) -> int:
    """Return the peak of the page's table "Models and memory", without the process, which has no memory on a GPU.

    Args:
        words: The command.
        data: Content of the group ``data``.
    """
    step = planned(words).steps[-1]
    look = Look([step])
    stage = look.stage(step, strict=False, loaded={"data": data})
    read_examples(stage)
    work = work_of(stage, step.config)
    precision: Precision = build_option(OmegaConf.create(step.config["precision"]))
    return peak(roles_of(look, stage), passes(look, stage, work, precision))
