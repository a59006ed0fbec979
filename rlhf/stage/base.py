"""Base class of all stages: a LightningModule whose ``training_step`` reads like its algorithm in the paper.

A stage implements ``read_examples``, ``training_step`` and optionally ``validation_step``. The base class implements
what every stage shares: batch order, the seed of each step, exact gradient accumulation, clipping and the learning
rate.

Exactness by construction: batch i is a function of (seed, i), and the randomness of step i is a function of (seed, i).
A run that was killed and resumed from a checkpoint therefore ends with the same bits as an uninterrupted one. ``seed``
belongs to the stage: ``build`` derives it from the command's seed, the stage and its round, so that no two rounds share
random numbers. A loss is a weighted sum divided by the sum of the weights over the *whole* batch, across all
micro-batches and all ranks, so that neither micro-batches nor ranks change the gradient.
"""

import json
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from pytorch_lightning.plugins import HalfPrecision
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedTokenizerBase

from rlhf.data.batches import check_divisible
from rlhf.data.encoding import encode_prompt
from rlhf.data.records import Prompt
from rlhf.data.split import Split
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.half_weights import HalfWeights
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.models.reference import Reference
from rlhf.models.sharding import gathered
from rlhf.models.tokenizer_loading import Corpus
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.base import Sampler
from rlhf.signatures import apply_defaults, merge_signature
from rlhf.stage.batch_order import derive_seed
from rlhf.stage.checks import check_repeatable, check_resolution
from rlhf.stage.metrics_log import MetricsLog
from rlhf.stage.sharded_models import ShardedModels
from rlhf.stage.sharded_strategy import ShardedStrategy
from rlhf.stage.strategies import sharding_error
from rlhf.stage.update import Optimizer, Schedule, Update

__all__ = ["Stage"]


class Stage(Update, ShardedModels, MetricsLog):
    """Base class of all stages.

    The constructor of a subclass names the hyperparameters that it adds, takes the rest as ``**hyperparameters``, and
    passes them on. ``defaults`` changes the default values of those that base classes declare.

    Args:
        model: The policy, or the language model that the stage starts from.
        optimizer: Called with the parameter groups, returns the optimizer.
        scheduler: Called with (optimizer step, total optimizer steps), returns the factor on the learning rate.
        batch_size: Examples per batch, over all ranks.
        micro_batch_size: Examples per forward pass, null: the whole batch. Changes memory, not the gradient.
        gradient_clip: Largest norm of the gradient, null: no clipping.
    """

    #: result that the stage writes to its run directory
    produces: ClassVar[str] = "model"
    #: metrics of the progress bar
    progress_metrics: ClassVar[tuple[str, ...]] = ("loss",)
    #: metric that a sweep optimizes
    headline: ClassVar[str] = "val/loss"
    #: whether a reference model stays in memory during training
    keeps_reference: ClassVar[bool] = True
    #: whether the stage trains with sharded weights (`trainer=fsdp`), which needs equal numbers of passes on all ranks
    shardable: ClassVar[bool] = False
    #: hyperparameters that name another model -> whether it is trained too; these models can share the policy's base
    auxiliary_models: ClassVar[dict[str, bool]] = {}
    #: groups of data -> record types that each may hold; groups that are not listed are not checked
    reads: ClassVar[dict[str, tuple[str, ...]]] = {}
    #: hyperparameters of the base classes -> their default values in this class and those derived from it
    defaults: ClassVar[Mapping[str, Any]] = {}
    #: hyperparameters of the base classes that the constructor sets itself, so that a config cannot
    fixed: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer | None,
        scheduler: Schedule | None,
        *,
        batch_size: Annotated[int, Field(gt=0)],
        micro_batch_size: Annotated[int, Field(gt=0)] | None = None,
        gradient_clip: Annotated[float, Field(gt=0)] | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold the trained parameters, not the frozen base
        self.policy = model
        self._optimizer, self._scheduler = optimizer, scheduler
        self.batch_size, self.micro_batch_size, self.gradient_clip = batch_size, micro_batch_size, gradient_clip
        self.seed = 0  # set by build from (seed, stage, round); every seed of the stage derives from it
        self.run_directory = Path(".")  # set by build
        self.name = type(self).__name__  # set by build
        self._prepared = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Apply ``defaults``, and set the signature of the subclass, which configs are validated against.

        It includes the hyperparameters that a constructor passes on as ``**hyperparameters``.

        Raises:
            TypeError: ``defaults`` or ``fixed`` names something else than a hyperparameter of a base class.
        """
        super().__init_subclass__(**arguments)
        cls.__signature__ = merge_signature(cls)  # type: ignore[attr-defined]
        apply_defaults(cls)

    # -- methods that a stage overrides ---------------------------------------------------------------------------

    @classmethod
    def check_parts(cls, *, batch_size: int = 1, world_size: int = 1, **_: Any) -> None:
        """Validate combinations of hyperparameters and groups. Called before anything runs, and by constructors.

        A subclass with a rule of its own declares the parameters that it reads, gives each a default, and calls this
        method.

        Args:
            batch_size: Every hyperparameter is passed by its name.
            world_size: World size of the training, if the config gives it.
            _: Groups, by the constructor's parameter names. A group that only holds hyperparameters (objective,
                sampler) is passed as the object. An optional group is None when absent, any other value when present.
                ``record`` is the name of the record type that the data holds.

        Raises:
            UserError: One line, with the keys to type.
        """
        check_divisible(batch_size, world_size, f"the {world_size} devices")

    @classmethod
    def unread(cls, **_: Any) -> tuple[str, ...]:
        """Return the groups of data that these hyperparameters leave unread; they are not loaded.

        Takes the hyperparameters and groups of ``check_parts``.
        """
        return ()

    @staticmethod
    def load_model(spec: CausalLM, adapter: NoAdapter, precision: Precision, corpus: Corpus | None) -> Any:
        """Load the object that the constructor receives as ``model``.

        A language model by default; a stage that can start from another kind of model overrides this method.
        """
        return spec.load(adapter, precision, corpus)

    def read_examples(self) -> None:
        """Set ``self.examples``, ``self.held_out`` and ``self.batches``.

        Reads the tokenizer and no weights, so that ``rlhf inspect`` can show the training data.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Read the examples and build everything else that training needs; called once, on the device."""
        self.read_examples()

    def finish(self) -> None:
        """Run the work that remains after training and before the model is saved; called without gradients."""

    def roles(self) -> dict[str, Any]:
        """Return the models that the stage holds, by role: modules or references."""
        return {"policy": self.policy} if self.policy is not None else {"model": self.modules_trained()[0]}

    def models(self) -> list[nn.Module]:
        """Return the trained models and those of ``roles``, each once."""
        held = [role.modules[0] if isinstance(role, Reference) else role for role in self.roles().values()]
        return list({id(model): model for model in (*self.modules_trained(), *held)}.values())

    def save(self, folder: Path) -> None:
        """Write the result as a Hugging Face model directory."""
        self.policy.save(folder)

    def prompts_to_show(self) -> list[Prompt]:
        """Return the held-out prompts of ``samples.jsonl``; empty for a stage without a policy."""
        return []

    @torch.no_grad()
    def write_samples(self, count: int = 8, sampler: Sampler | None = None) -> None:
        """Write responses of the trained policy to ``samples.jsonl``, for people to read.

        Prompts that leave less than ``max_new_tokens`` of the policy's context are skipped.
        """
        sampler = sampler or AncestralSampler()
        room = self.policy.context_length - sampler.max_new_tokens if self.policy is not None else 0
        fitting = (x for x in self.prompts_to_show() if len(encode_prompt(self.policy.tokenizer, x.messages)) <= room)
        prompts = list(islice(fitting, count))
        if not prompts:
            return
        self.policy.eval()
        rollout = sampler.sample(self.policy, prompts, derive_seed(self.seed, "show"))
        with (self.run_directory / "samples.jsonl").open("w", encoding="utf-8") as file:
            turns = rollout.turns or [()] * len(rollout.texts)
            ended = rollout.ended.tolist()
            for prompt, text, messages, has_ended in zip(rollout.prompts, rollout.texts, turns, ended, strict=True):
                row: dict[str, Any] = {"prompt": [message.to_json() for message in prompt.messages], "response": text}
                row["ended"] = has_ended
                if messages:
                    row["turns"] = [message.to_json() for message in messages]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def final_metrics(self) -> dict[str, float]:
        """Return further metrics for summary.json, beside the last ones logged."""
        return {}

    def encode(self, data: Split, tokenizer: PreTrainedTokenizerBase) -> None:
        """Set ``examples`` and ``held_out`` from the records of ``data``; print what was dropped or truncated."""
        self.examples, training = data.encode(tokenizer, "train")
        self.held_out, held_out = data.encode(tokenizer, "validation")
        self.note(f"{data.report}; training: {training}; held out: {held_out}")

    def fit_prompts(self, data: Split, sampler: Sampler, held_out_sampled: int | None = None) -> Split:
        """Return the prompts that fit ``data.max_length`` and ``data.max_prompt_length``.

        Prints how many were dropped or truncated.

        Args:
            data: Prompts, each tokenized once.
            sampler: The sampler that generates the responses.
            held_out_sampled: Only this many of the first held-out prompts get a response; None: all.

        Raises:
            UserError: A prompt leaves too little context for the longest response. Raised before anything is sampled.
        """
        fitted, training, held_out = data.fit_prompts(self.policy.tokenizer)
        sampler.check_lengths(self.policy, fitted.train, training.lengths)
        sampled = slice(held_out_sampled)
        sampler.check_lengths(self.policy, fitted.validation[sampled], held_out.lengths[sampled])
        if any(part.truncated or part.dropped for part in (training, held_out)):
            self.note(f"prompts: {training}; held out: {held_out}")
        return fitted

    def note(self, text: str) -> None:
        """Print one line, prefixed with the stage's name, on the first rank."""
        if self.trainer.is_global_zero:
            print(f"  {self.name}: {text}", flush=True)

    # -- batches --------------------------------------------------------------------------------------------------

    # -- randomness and resume ------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Check the strategy and the precision, then call ``prepare`` once the weights are on their device."""
        sharded = self.shardable and isinstance(self.trainer.strategy, ShardedStrategy)
        if not sharded and not isinstance(self.trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise sharding_error(type(self.trainer.strategy).__name__)
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            # The wrapper has broadcast the weights to all ranks. It would now average gradients in every backward pass,
            # whose number may differ between ranks, and require every pass to reach every parameter.
            self.trainer.strategy.model = self
            self._averages = True
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, HalfPrecision):
            self.trainer.strategy.precision_plugin = HalfWeights(plugin.precision)
        if not self._prepared:
            self._prepared = True
            with self.trainer.precision_plugin.forward_context():
                check_repeatable(self.modules_trained())
                check_resolution(self.trainer.optimizers)
                self.prepare()

    on_predict_start = on_fit_start

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Call ``finish`` in the precision of the training; then make sharded models whole."""
        with self.trainer.precision_plugin.forward_context(), gathered(*self.modules_trained()):
            self.finish()
        self.make_whole()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep only trained parameters, buffers and counters in the checkpoint."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        buffers = {name for name, _ in self.named_buffers()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained or k in buffers}
        checkpoint["stage"] = self.counters()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters."""
        for name, value in checkpoint["stage"].items():
            setattr(self, name, value)

    def counters(self) -> dict[str, Any]:
        """Return the plain values that a resumed run needs: attributes of the stage by name."""
        return {name: getattr(self, name) for name in ("updates_done",)}

    # -- the update -----------------------------------------------------------------------------------------------
