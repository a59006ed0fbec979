"""From what is typed to a stage as training would build it, with its tokenizer and without weights."""

import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf import discovery, rounds, validation
from rlhf.build import build_stage, instantiated, quiet
from rlhf.config import Plain, leaves
from rlhf.data.data import Data, LoadReport, Split
from rlhf.errors import UserError
from rlhf.inspection.shapes import Weightless, cast, without_weights
from rlhf.models.language_model import LanguageModel
from rlhf.models.scalar import ScalarModel
from rlhf.plan import Plan, Step, plan
from rlhf.runs import Run
from rlhf.stage import Stage
from rlhf.validation import groups


def composed(words: Sequence[str]) -> DictConfig:
    """The config of a command line, composed as `rlhf` composes it."""
    discovery.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(words))


def planned(words: Sequence[str]) -> Plan:
    """The steps of a command line, checked as before a run. Raises UserError for what cannot be run."""
    typed = rounds.typed(list(words))
    return plan(composed(typed), typed)


def chosen(made: Plan, name: str | None) -> Step:
    """The step of that name; by default the last, as `until=STEP` names it. Raises UserError for one that is not there.

    Args:
        made: The plan of the command line.
        name: A step of a pipeline.
    """
    if name is None:
        return made.steps[-1]
    step = made.get(name)
    if step is None:
        raise UserError(f"step={name}: not among the steps that would run ({', '.join(s.name for s in made.steps)})")
    return step


@dataclass
class Look:
    """The steps of a plan, seen without running them.

    A step that has not run is stood in for by a folder with its model's configuration and tokenizer, so that the steps
    that read it can be built. Its data cannot be known.
    """

    steps: list[Step]
    mode: Weightless = field(default_factory=Weightless)

    def __post_init__(self) -> None:
        quiet()
        self._temporary = tempfile.TemporaryDirectory()
        self._stand_ins: dict[str, str] = {}  # folder of a step that has not run -> folder with what is known of it
        self._stages: dict[str, Stage] = {}
        #: folder -> step, of those that have not run
        self.pending = {str(step.folder): step for step in self.steps if not Run(step.folder).finished}

    def config(self, step: Step) -> Plain:
        """The step's config, with stand-ins in the place of what has not run."""
        needed = {folder for _, value in leaves(step.config) for folder in self.pending if _inside(value, folder)}
        for folder in needed - {str(step.folder)} - set(self._stand_ins):
            self._leave(self.pending[folder])
        return _replaced(step.config, self._stand_ins)

    def data(self, step: Step) -> dict[str, Data]:
        """The groups of data that the stage asks for, by name, not loaded.

        Raises:
            UserError: The stage reads none.
        """
        stage_class = get_object(step.config["stage"]["_target_"])
        found: dict[str, Data] = {}
        unread = validation.unread(step.config)
        for name in groups(stage_class):
            if name in unread:
                continue
            node = step.config.get(name)
            if isinstance(node, dict) and hasattr(get_object(node.get("_target_", "builtins.int")), "digest"):
                found[name] = instantiated(OmegaConf.create(node))
        if not found:
            raise UserError(f"stage={step.stage} reads no data")
        return found

    def unread(self, data: Data) -> Step | None:
        """The step that would make this data and has not run."""
        return next((step for folder, step in self.pending.items() if folder in data.sources), None)

    def splits(self, step: Step, strict: bool = True) -> dict[str, Split]:
        """The data, loaded.

        Args:
            step: Of the plan.
            strict: Whether data of a step that has not run is an error; else it is empty.
        """
        found = {}
        for name, data in self.data(step).items():
            maker = self.unread(data)
            if maker is not None and strict:
                raise UserError(f"{name}.source={data.source}: the step {maker.name} has not run; run it first")
            found[name] = data.load() if maker is None else Split([], [], LoadReport(data.source), data)
        return found

    def stage(self, step: Step, strict: bool = True, loaded: Mapping[str, Split] | None = None) -> Stage:
        """The step's stage with a trainer of one process, its models without weights, nothing prepared.

        Args:
            step: Of the plan.
            strict: As in ``splits``.
            loaded: The data, where it is loaded already.
        """
        if step.name not in self._stages:
            config: Any = OmegaConf.create(self.config(step))
            splits = self.splits(step, strict) if loaded is None else loaded
            with without_weights(self.mode):
                stage = build_stage(config, step.folder, splits)
                cast(stage, step.config["precision"]["trainer"])
            stage.trainer = pl.Trainer(
                accelerator="cpu",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                limit_train_batches=config.trainer.get("limit_train_batches"),
            )
            self._stages[step.name] = stage
        return self._stages[step.name]

    def policy(self, stage: Stage) -> LanguageModel:
        """The language model that a stage starts from, in whatever it keeps it."""
        for part in (stage.policy, *stage.modules_trained()):
            if isinstance(part, LanguageModel):
                return part
            if isinstance(part, ScalarModel):
                return part.language_model
        raise UserError(f"stage={stage.name} has no language model to look at")

    def _leave(self, step: Step) -> None:
        """Writes what is known of a step that has not run: its model's configuration and tokenizer."""
        folder = Path(self._temporary.name) / step.name
        if get_object(step.config["stage"]["_target_"]).produces == "model":
            stage = self.stage(step, strict=False)
            model = self.policy(stage)
            config = model.base.config.__class__.from_dict(model.base.config.to_dict())
            kind: Any = type(model.base)
            if any(isinstance(part, ScalarModel) and part.language_model is model for part in stage.modules_trained()):
                kind, config.num_labels = MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[type(config)], 1
            config.architectures = [kind.__name__]
            config.save_pretrained(folder / "model")
            model.tokenizer.save_pretrained(folder / "model")
            (folder / "picks.jsonl").touch()  # rejection sampling reads those of earlier rounds when it is built
        self._stand_ins[str(step.folder)] = str(folder)


def read_examples(stage: Stage) -> None:
    """Lets a stage read its examples as it does before training. Raises UserError for one that does not say how."""
    if type(stage).read_examples is Stage.read_examples:
        raise UserError(f"{type(stage).__name__} has no read_examples, so its batches cannot be shown before it trains")
    output, sys.stdout = sys.stdout, _Nowhere()
    try:
        stage.read_examples()
    finally:
        sys.stdout = output


class _Nowhere:
    """The notes of a stage, which the pages here say in more detail."""

    def write(self, text: str) -> int:
        return len(text)

    def flush(self) -> None:
        pass


def spec_of(config: DictConfig) -> Any:
    """The model that a config names."""
    return instantiate(config.model, _convert_="all")


def _inside(value: Any, folder: str) -> bool:
    return isinstance(value, str) and (value == folder or value.startswith(f"{folder}/"))


def _replaced(node: Any, folders: dict[str, str]) -> Any:
    if isinstance(node, dict):
        return {key: _replaced(value, folders) for key, value in node.items()}
    if isinstance(node, list):
        return [_replaced(value, folders) for value in node]
    for folder, stand_in in folders.items():
        if _inside(node, folder):
            return stand_in + node[len(folder) :]
    return node
