"""Construction of a stage from a command line as training would build it, with its tokenizer but without weights."""

import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING

from rlhf import discovery
from rlhf.console import silence_libraries
from rlhf.data.data import Data
from rlhf.data.load_report import LoadReport
from rlhf.data.split import Split, load_split
from rlhf.errors import UserError
from rlhf.importing import build_option
from rlhf.models.fake_tensors import FakeWeights, cast, use_fake_weights
from rlhf.models.language_model import LanguageModel
from rlhf.models.scalar import ScalarModel
from rlhf.models.weight_casts import kept_casts
from rlhf.planning import rounds
from rlhf.planning.plan import plan
from rlhf.planning.step import Plan, Step
from rlhf.planning.validation.stage import find_unread_data
from rlhf.running import launcher
from rlhf.running.build import build_stage
from rlhf.runs.data_source import is_data
from rlhf.runs.run_directory import Run
from rlhf.signatures import groups
from rlhf.stage.base import Stage
from rlhf.storage.plain import Plain, leaves


def composed(words: Sequence[str]) -> DictConfig:
    """Return the config of a command line, composed as `rlhf` composes it."""
    launcher.register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(words))


def planned(words: Sequence[str]) -> Plan:
    """Return the plan of a command line, validated as before a run.

    Raises:
        UserError: The command line cannot be run.
    """
    typed = rounds.mark_round_overrides(list(words))
    return plan(composed(typed), typed)


def chosen(made: Plan, name: str | None) -> Step:
    """Return the step of that name; by default the last one.

    Args:
        made: The plan of the command line.
        name: A step of a pipeline.

    Raises:
        UserError: The plan has no such step.
    """
    if name is None:
        return made.steps[-1]
    step = made.get(name)
    if step is None:
        names = ", ".join(step.name for step in made.steps)
        raise UserError(f"is not among the steps that would run ({names})", option="step", value=name)
    return step


@dataclass
class Look:
    """Steps of a plan, built for inspection without running them.

    A step that has not run is replaced by a directory with its model's configuration and tokenizer, so that the steps
    that read it can be built. Its data is unknown.

    Attributes:
        steps: The steps of the plan.
        weights: Source of the weights of all models.
    """

    steps: list[Step]
    weights: FakeWeights = field(default_factory=FakeWeights)

    def __post_init__(self) -> None:
        silence_libraries()
        self._temporary = tempfile.TemporaryDirectory()
        self._stand_ins: dict[str, str] = {}  # run directory of an unfinished step -> its replacement
        self._stages: dict[str, Stage] = {}
        #: run directory -> step, for the steps that have not run
        self.pending = {str(step.folder): step for step in self.steps if not Run(step.folder).finished}

    def config(self, step: Step) -> Plain:
        """Return the step's config, with replacements for the directories of steps that have not run."""
        needed = {folder for _, value in leaves(step.config) for folder in self.pending if _inside(value, folder)}
        for folder in needed - {str(step.folder)} - set(self._stand_ins):
            self._leave(self.pending[folder])
        return _replaced(step.config, self._stand_ins)

    def data(self, step: Step) -> dict[str, Data]:
        """Return the data groups that the stage reads, by name, not loaded.

        Raises:
            UserError: The stage reads none.
        """
        stage_class = get_object(step.config["stage"]["_target_"])
        found: dict[str, Data] = {}
        unread = find_unread_data(step.config)
        for name in groups(stage_class):
            if name in unread:
                continue
            node = step.config.get(name)
            if isinstance(node, dict) and is_data(get_object(node.get("_target_", "builtins.int"))):
                found[name] = build_option(OmegaConf.create(node))
        if not found:
            raise UserError("reads no data", option="stage", value=step.stage)
        return found

    def unread(self, data: Data) -> Step | None:
        """Return the step that would make this data and has not run; None if the data exists."""
        return next((step for folder, step in self.pending.items() if folder in data.sources), None)

    def splits(self, step: Step, strict: bool = True) -> dict[str, Split]:
        """Load the data of a step.

        Args:
            step: A step of the plan.
            strict: Whether data of a step that has not run is an error; else it is empty.
        """
        found = {}
        for name, data in self.data(step).items():
            maker = self.unread(data)
            if maker is not None and strict:
                raise not_made(name, data, maker)
            empty = Split([], [], LoadReport(data.source), data, name)
            found[name] = load_split(data, name) if maker is None else empty
        return found

    def stage(self, step: Step, strict: bool = True, loaded: Mapping[str, Split] | None = None) -> Stage:
        """Build the step's stage with a single-process trainer and models without weights; nothing is prepared.

        Args:
            step: A step of the plan.
            strict: As in ``splits``.
            loaded: The data, if it is loaded already.
        """
        if step.name not in self._stages:
            config: Any = OmegaConf.create(self.config(step))
            splits = self.splits(step, strict) if loaded is None else loaded
            with use_fake_weights(self.weights):
                stage = build_stage(config, step.folder, splits)
                cast(stage, step.config["precision"]["trainer"])
                for model in stage.models():
                    kept_casts(model, build_option(OmegaConf.create(step.config["precision"])).compute)
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
        """Return the language model that a stage starts from, also if it is inside a scalar model.

        Raises:
            UserError: The stage has none.
        """
        for part in (stage.policy, *stage.modules_trained()):
            if isinstance(part, LanguageModel):
                return part
            if isinstance(part, ScalarModel):
                return part.language_model
        raise UserError("has no language model to inspect", option="stage", value=stage.name)

    def _leave(self, step: Step) -> None:
        """Write a replacement for a step that has not run: its model's configuration and tokenizer."""
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
            # Rejection sampling reads this file of earlier rounds when it is built.
            (folder / "selected_responses.jsonl").touch()
        self._stand_ins[str(step.folder)] = str(folder)


def not_made(name: str, data: Data, maker: Step) -> UserError:
    """Return the error for the data of a group ``name`` that a step would make which has not run."""
    problem = f"the step {maker.name} has not run"
    return UserError(problem, fix="run it first", option=f"{name}.source", value=data.source)


def read_examples(stage: Stage) -> None:
    """Make a stage read its examples as it does before training.

    Raises:
        UserError: The stage does not implement ``read_examples``.
    """
    if type(stage).read_examples is Stage.read_examples:
        raise UserError(f"{type(stage).__name__} has no read_examples, so its batches are unknown before it trains")
    # The notes of a stage are discarded: the pages here report the same in more detail.
    with open(os.devnull, "w", encoding="utf-8") as nowhere, redirect_stdout(nowhere):
        stage.read_examples()


def spec_of(config: DictConfig) -> Any:
    """Return the model spec that a config names."""
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
