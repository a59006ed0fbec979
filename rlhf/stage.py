"""What every stage is: a LightningModule whose ``training_step`` reads as its algorithm does.

A stage fills in ``read_examples``, ``training_step`` and, if it likes, ``validation_step``. The base class owns what
must be the same everywhere: the order of batches, the randomness of each step, exact accumulation, clipping, the
learning rate.

Exactness by construction: the i-th batch is a function of (seed, i), the randomness of step i of (seed, i), so a run
that was killed and goes on from a checkpoint ends with the same bits as one that was not. `seed` is the stage's own,
derived by `build` from the command's seed, the stage and its round, so that no two rounds share random numbers. And a
loss is a sum over what counts divided by how much counts in the *whole* batch, over all micro-batches and all
processes, so that neither micro-batches nor processes change the gradient.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar
from zlib import crc32

import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import HalfPrecision
from pytorch_lightning.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from rlhf.data.batches import Batches, mix_seed
from rlhf.data.data import Split
from rlhf.data.records import Prompt
from rlhf.data.template import encode_prompt
from rlhf.distributed import add_up, average_gradients
from rlhf.errors import RunFailed, UserError
from rlhf.functional.reduction import weighted_mean
from rlhf.half_weights import HalfWeights
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM, Corpus
from rlhf.models.language_model import LanguageModel, check_gradients
from rlhf.models.precision import Precision
from rlhf.objective import Metrics
from rlhf.rollout import Sampler
from rlhf.signatures import signature_of
from rlhf.strategies import sharded

Schedule = Callable[[int, int], float]
Optimizer = Callable[..., torch.optim.Optimizer]
T = TypeVar("T")


def seed_of(*parts: int | str) -> int:
    """Derive a seed from numbers and names, such as (seed, purpose, count): independent streams, no state to save."""
    return mix_seed(*(crc32(part.encode()) if isinstance(part, str) else part for part in parts))


class Parts(Generic[T]):
    """A batch as its micro-batches; opaque to Lightning, which would take records and batches apart."""

    def __init__(self, parts: Sequence[T]) -> None:
        self.parts = list(parts)

    def __iter__(self) -> Iterator[T]:
        return iter(self.parts)

    def __len__(self) -> int:
        return len(self.parts)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Parts[T]":
        """Moves what can be moved; records stay as they are."""
        return Parts([part.to(device, non_blocking) if hasattr(part, "to") else part for part in self.parts])


class Stage(pl.LightningModule):
    """Base class of all stages.

    Args:
        model: The policy, or whatever language model the stage starts from.
        optimizer: Called with the parameter groups, returns the optimizer.
        scheduler: Called with (update, total updates), returns the factor on the learning rate.
        batch_size: Examples per batch, all processes together.
        micro_batch_size: Examples per forward pass, null: the whole batch. Changes memory, not the gradient.
        gradient_clip: Largest norm of the gradient, null: no clipping.
    """

    #: what the stage leaves in its run folder
    produces: ClassVar[str] = "model"
    #: metrics worth a place in the progress bar
    telling: ClassVar[tuple[str, ...]] = ("loss",)
    #: the metric that a sweep optimises
    headline: ClassVar[str] = "val/loss"
    #: whether a reference, if there is one, stays in memory while the stage trains
    keeps_reference: ClassVar[bool] = True
    #: knobs that name another model, and whether that one is trained too: they can sit on the policy's base
    models_beside: ClassVar[dict[str, bool]] = {}
    #: groups of data, and the record types each may hold; what is not named is not checked
    reads: ClassVar[dict[str, tuple[str, ...]]] = {}

    def __init__(
        self,
        model: LanguageModel,
        optimizer: Optimizer | None,
        scheduler: Schedule | None,
        *,
        batch_size: int,
        micro_batch_size: int | None = None,
        gradient_clip: float | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.strict_loading = False  # checkpoints hold what is trained, not the frozen base
        self.policy = model
        self._optimizer, self._scheduler = optimizer, scheduler
        self.batch_size, self.micro_batch_size, self.gradient_clip = batch_size, micro_batch_size, gradient_clip
        self.seed = 0  # set by build: of (seed, stage, round), and every seed of the stage is derived from it
        self.run_folder = Path(".")  # set by build
        self.name = type(self).__name__  # set by build
        self.updates_done = 0
        self.tokens_seen = 0
        self.examples_seen = 0
        self._sums: dict[str, Tensor] = {}
        self._norm = torch.zeros(())  # of the last gradient, before clipping
        self._validated: dict[str, Tensor] = {}
        self._averages = False
        self._prepared = False

    def __init_subclass__(cls, **arguments: Any) -> None:
        """Makes the knobs that a constructor hands on as ``**knobs`` part of its signature, which configs go by."""
        super().__init_subclass__(**arguments)
        cls.__signature__ = signature_of(cls)  # type: ignore[attr-defined]

    # -- what a stage fills in ------------------------------------------------------------------------------------

    @classmethod
    def check_parts(cls, *, batch_size: int = 1, processes: int = 1, **_: Any) -> None:
        """Refuses knobs and groups that do not go together. Called before anything runs, and by constructors.

        A stage with a rule of its own adds the parameters it reads, has a default for each, and calls this one.

        Args:
            batch_size: Every knob is given by its name.
            processes: How many will train, if the config says.
            _: Groups, by the constructor's names: those that only hold knobs (objective, rollout) themselves; of those
                that may be left out None, or anything else where they are not; and ``record``, what the data holds.

        Raises:
            UserError: One line, with the keys to type.
        """
        if batch_size % processes:
            raise UserError(
                f"stage.batch_size={batch_size} is no multiple of the {processes} processes: "
                f"type stage.batch_size={-(-batch_size // processes) * processes}"
            )

    @classmethod
    def unread(cls, **_: Any) -> tuple[str, ...]:
        """Groups of data that these knobs leave unread: they are not loaded. Knobs and groups as in ``check_parts``."""
        return ()

    @staticmethod
    def load_model(spec: CausalLM, adapter: NoAdapter, precision: Precision, corpus: Corpus | None) -> Any:
        """What the constructor gets as ``model``: a language model, unless the stage can start from something else."""
        return spec.load(adapter, precision, corpus)

    def read_examples(self) -> None:
        """Makes ``self.examples``, ``self.held_out`` and ``self.batches``.

        It reads the tokenizer and no weights, so that ``rlhf inspect`` can show what will be trained on.
        """
        raise NotImplementedError

    def prepare(self) -> None:
        """Reads the examples and makes all else that training needs; called once, on the device."""
        self.read_examples()

    def finish(self) -> None:
        """What is left to do once trained and before the model is saved; without gradients."""

    @property
    def total_steps(self) -> int:
        """Training batches in the whole run."""
        return len(self.batches)

    @property
    def total_updates(self) -> int:
        """Optimizer steps in the whole run: what the schedule counts towards."""
        return self.total_steps

    def schedule_position(self) -> tuple[int, int]:
        """How far the schedule of the learning rate is, and where it ends."""
        return self.updates_done, self.total_updates

    def modules_trained(self) -> Sequence[nn.Module]:
        """The modules whose parameters the optimizer gets."""
        return [self.policy]

    def roles(self) -> dict[str, Any]:
        """The models that are held, by role: modules or references."""
        return {"policy": self.policy} if self.policy is not None else {"model": self.modules_trained()[0]}

    def save(self, folder: Path) -> None:
        """Writes the result as a Hugging Face folder."""
        self.policy.save(folder)

    def prompts_to_show(self) -> list[Prompt]:
        """Held-out prompts whose replies go into ``samples.jsonl``; a stage without a policy has none."""
        return []

    @torch.no_grad()
    def write_samples(self, count: int = 8, sampler: Sampler | None = None) -> None:
        """Writes replies of the trained policy for a person to read; prompts too long for its context are left out."""
        sampler = sampler or Sampler()
        room = self.policy.context_length - sampler.max_new_tokens if self.policy is not None else 0
        fitting = (x for x in self.prompts_to_show() if len(encode_prompt(self.policy.tokenizer, x.messages)) <= room)
        prompts = list(islice(fitting, count))
        if not prompts:
            return
        self.policy.eval()
        rollout = sampler.sample(self.policy, prompts, seed_of(self.seed, "show"))
        with (self.run_folder / "samples.jsonl").open("w", encoding="utf-8") as file:
            turns = rollout.turns or [()] * len(rollout.texts)
            ended = rollout.ended.tolist()
            for prompt, text, said, whole in zip(rollout.prompts, rollout.texts, turns, ended, strict=True):
                row: dict[str, Any] = {"prompt": [message.to_json() for message in prompt.messages], "response": text}
                row["ended"] = whole
                if said:
                    row["turns"] = [message.to_json() for message in said]
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    def final_metrics(self) -> dict[str, float]:
        """More numbers for summary.json than the last ones logged."""
        return {}

    def encode(self, data: Split, tokenizer: PreTrainedTokenizerBase) -> None:
        """Sets ``examples`` and ``held_out`` from the records of ``data``; says what was dropped or cut."""
        self.examples, training = data.encode(tokenizer, "train")
        self.held_out, held_out = data.encode(tokenizer, "validation")
        self.note(f"{data.report}; training: {training}; held out: {held_out}")

    def fit_prompts(self, data: Split, sampler: Sampler, held_out_answered: int | None = None) -> Split:
        """Prompts within ``data.max_length`` and ``data.max_prompt_length``; says what was dropped or cut.

        Args:
            data: Prompts, each tokenised once.
            sampler: Who answers them.
            held_out_answered: Of the held-out prompts only so many of the first are; None: all.

        Raises:
            UserError: For a prompt that leaves no room for the longest reply, before the first is sampled.
        """
        fitted, training, held_out = data.fitting(self.policy.tokenizer)
        sampler.check_lengths(self.policy, fitted.train, training.lengths)
        answered = slice(held_out_answered)
        sampler.check_lengths(self.policy, fitted.validation[answered], held_out.lengths[answered])
        if any(part.truncated or part.dropped for part in (training, held_out)):
            self.note(f"prompts: {training}; held out: {held_out}")
        return fitted

    def note(self, text: str) -> None:
        """A line for the screen."""
        if self.trainer.is_global_zero:
            print(f"  {self.name}: {text}", flush=True)

    # -- batches --------------------------------------------------------------------------------------------------

    examples: Sequence[Any] = ()
    held_out: Sequence[Any] = ()
    batches: Batches

    def collate(self, examples: list[Any]) -> Any:
        """A micro-batch of examples as tensors."""
        raise NotImplementedError

    def parts(self, examples: list[Any]) -> Parts[Any]:
        """A batch as its micro-batches."""
        return Parts([self.collate(examples[rows]) for rows in chunks(len(examples), self.micro_batch_size)])

    def order(self, examples: int | Sequence[int], *, epochs: float | None = None, steps: int | None = None) -> Batches:
        """The batches of the run over so many examples, or over examples of these lengths (like to like)."""
        return Batches(
            examples,
            self.batch_size,
            seed=self.seed,
            epochs=epochs,
            steps=steps,
            rank=self.trainer.global_rank,
            world_size=self.trainer.world_size,
        )

    def train_dataloader(self) -> DataLoader:
        """Batches in the order that (seed, index) fixes, going on from where a checkpoint left off."""
        self.batches.start = self.batches_done
        return DataLoader(self.examples, batch_sampler=self.batches, collate_fn=self.parts)  # type: ignore[arg-type]

    def val_dataloader(self) -> DataLoader | list:
        """The held-out examples in their own order, shared out over the processes."""
        if not self.held_out:
            return []
        if len(self.held_out) < self.trainer.world_size:  # one without any would not wait for the others
            raise UserError(
                f"{len(self.held_out)} held-out examples for {self.trainer.world_size} processes: each needs one; "
                f"type data.validation={self.trainer.world_size} or more, or trainer.limit_val_batches=0"
            )
        mine = self.held_out[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=self.batch_size, collate_fn=self.parts)  # type: ignore[arg-type]

    # -- randomness and resume ------------------------------------------------------------------------------------

    def on_fit_start(self) -> None:
        """Prepares once the weights are on their device."""
        if not isinstance(self.trainer.strategy, DDPStrategy | SingleDeviceStrategy):
            raise UserError(sharded(type(self.trainer.strategy).__name__))
        if isinstance(self.trainer.strategy.model, DistributedDataParallel):
            # It has given every process the same weights. From here on it would average gradients in every backward
            # pass, of which processes may have different numbers, and ask that each pass reach every parameter.
            self.trainer.strategy.model = self
            self._averages = True
        plugin = self.trainer.precision_plugin
        if isinstance(plugin, HalfPrecision):
            self.trainer.strategy.precision_plugin = HalfWeights(plugin.precision)
        if not self._prepared:
            self._prepared = True
            with self.trainer.precision_plugin.forward_context():
                self.check_repeatable()
                self.check_resolution()
                self.prepare()

    on_predict_start = on_fit_start

    def check_repeatable(self) -> None:
        """Check that what is trained without dropout computes the same in every pass of training.

        Raises:
            UserError: As ``LanguageModel.check_repeatable``.
        """
        for trained in self.modules_trained():
            for module in trained.modules():
                if isinstance(module, LanguageModel):
                    module.check_repeatable()

    @torch.no_grad()
    def check_resolution(self) -> None:
        """Check that 16-bit weights can move by the learning rate, which is how far Adam and Lion move them.

        Raises:
            UserError: If most of the weights that are trained would be rounded back to what they are.
        """
        lost = count = 0
        lr = 0.0
        for group in (group for optimizer in self.trainer.optimizers for group in optimizer.param_groups):
            lr = group["lr"]
            for weight in (p for p in group["params"] if p.dtype == torch.bfloat16):
                lost += int(((weight + lr) == weight).sum())
                count += weight.numel()
        if lost > count / 2:
            raise UserError(
                f"precision=bf16_true with optimizer.lr={lr:g}: weights of 8 significant bits cannot move by that "
                f"little, so {lost / count:.0%} of those trained would stay as they are; type precision=bf16 (weights "
                "in 32 bits), or a larger optimizer.lr"
            )

    @torch.no_grad()
    def on_train_end(self) -> None:
        """Finishes in the precision that was trained in."""
        with self.trainer.precision_plugin.forward_context():
            self.finish()

    @property
    def batches_done(self) -> int:
        """Training batches finished, over all resumes. Lightning keeps the count in its checkpoint."""
        return self.trainer.fit_loop.epoch_loop.batch_progress.current.processed  # type: ignore[attr-defined]

    def step_seed(self, purpose: str, index: int | None = None) -> int:
        """The seed of one purpose at this step, different on every process."""
        return seed_of(self.seed, purpose, self.batches_done if index is None else index, self.trainer.global_rank)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout and the like depend on (seed, step) alone."""
        torch.manual_seed(self.step_seed("train"))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keeps what is trained, and the counters."""
        trained = {name for name, parameter in self.named_parameters() if parameter.requires_grad}
        buffers = {name for name, _ in self.named_buffers()}
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {k: v for k, v in state.items() if k in trained or k in buffers}
        checkpoint["stage"] = self.counters()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Takes the counters up again."""
        for name, value in checkpoint["stage"].items():
            setattr(self, name, value)

    def counters(self) -> dict[str, Any]:
        """Plain numbers that a resumed run needs; attributes of the stage by name."""
        return {name: getattr(self, name) for name in ("updates_done",)}

    # -- the update -----------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """One optimizer over everything that is trained; matrices decay, vectors (norms, biases) do not."""
        if self._optimizer is None:
            return None
        trained = {id(p): p for m in self.modules_trained() for p in m.parameters() if p.requires_grad}
        groups = [[p for p in trained.values() if p.ndim >= 2], [p for p in trained.values() if p.ndim < 2]]
        named: list[dict[str, Any]] = [{"params": groups[0]}, {"params": groups[1], "weight_decay": 0.0}]
        optimizer = self._optimizer([group for group in named if group["params"]])
        for group in optimizer.param_groups:
            group["initial_lr"] = group["lr"]
        return optimizer

    def total(self, count: Tensor) -> Tensor:
        """How much counts in the batch, to divide each process's sum by (gradients are averaged over processes)."""
        if self.trainer.world_size > 1:
            count = self.trainer.strategy.reduce(count.float(), reduce_op="mean")  # type: ignore[assignment]
        return count.float().clamp(min=1e-8)

    def sum_over_processes(self, part: Tensor) -> Tensor:
        """Sum of a tensor over all processes; each must call it, and just as often."""
        if self.trainer.world_size == 1:
            return part
        return self.trainer.strategy.reduce(part.clone(), reduce_op="sum")  # type: ignore[return-value]

    def backward_mean(
        self, losses: Tensor, weights: Tensor, total: Tensor, metrics: Metrics | None = None, scale: float = 1.0
    ) -> None:
        """Adds the gradient of ``scale * sum(losses * weights) / total``; gathers the metrics in the same mean.

        Args:
            losses: The objective's values, any shape.
            weights: What counts, of the same shape.
            total: Sum of the weights over the whole batch, from ``total``.
            metrics: More values of that shape, for the log.
            scale: Coefficient of this term of the loss.
        """
        weights = weights.to(losses.dtype)
        loss = scale * weighted_mean(losses, weights, total)
        self.manual_backward(loss)
        self._sums["loss"] = self._sums["loss"] + loss.detach() if "loss" in self._sums else loss.detach()
        self.gather_means(metrics or {}, weights, total)

    def gather_means(self, metrics: Metrics, weights: Tensor, total: Tensor) -> None:
        """Add ``sum(values * weights) / total`` of each metric to what this update logs."""
        for name, values in metrics.items():
            mean = weighted_mean(values.float(), weights.float(), total)
            self._sums[name] = self._sums[name] + mean if name in self._sums else mean

    def step(self, frozen: nn.Module | None = None) -> Metrics:
        """Clips, sets the learning rate and makes one optimizer step; returns what ``backward_mean`` gathered.

        Under DDP the gradients are averaged over processes here, once per update, however many backward passes each
        process made. With a gradient scaler (precision=fp16) the optimizer skips a step whose gradient overflows. It
        counts as an update, so that the schedule ends where it should; ``skipped_steps`` is then 1.

        The parameters of ``frozen`` are left as they are in this step.
        """
        optimizer = self.optimizers()
        assert not isinstance(optimizer, list)
        metrics, self._sums = self._sums, {}
        loss = self.sum_over_processes(metrics["loss"])  # all stop if one must, or they would wait for it
        if not torch.isfinite(loss):
            raise RunFailed(self._not_finite(loss))
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        if self._averages:
            average_gradients(parameters)
        if self.updates_done == 0:
            for module in self.modules_trained():
                check_gradients(module)
        if frozen is not None:
            frozen.zero_grad(set_to_none=True)
        factor = self._scheduler(*self.schedule_position()) if self._scheduler else 1.0
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = 0.0 if scaler is None else scaler.get_scale()
        self._norm = torch.zeros((), device=self.device)
        if scaler is None or any(p.grad is not None for p in parameters):  # a scaler cannot step over nothing
            optimizer.step()
        optimizer.zero_grad()
        self.updates_done += 1
        metrics["learning_rate"] = torch.tensor(optimizer.param_groups[0]["lr"])
        if scaler is None:
            return {**metrics, "gradient_norm": self._norm}
        skipped = scaler.get_scale() < scale
        if skipped and scale <= 1.0:
            raise RunFailed(
                f"gradients overflow in 16 bits at a loss scale of {scale:g}, at batch {self.batches_done}: "
                "type precision=bf16, or a smaller optimizer.lr"
            )
        if not skipped:
            metrics["gradient_norm"] = self._norm
        return {**metrics, "skipped_steps": torch.tensor(float(skipped)), "loss_scale": torch.tensor(scale)}

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Clip the gradient; called within the optimizer's step, where a loss scale has been taken out of it.

        Raises:
            RunFailed: If the gradient is not finite, unless a gradient scaler is there, which skips such steps.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self._norm = nn.utils.clip_grad_norm_(parameters, self.gradient_clip or float("inf")).detach()
        if getattr(self.trainer.precision_plugin, "scaler", None) is None and not torch.isfinite(self._norm):
            raise RunFailed(self._not_finite(self._norm, "gradient of the loss"))

    def record(self, metrics: Metrics, **more: float | Tensor) -> None:
        """Logs one row of metrics."""
        self.log_dict({**metrics, **more}, sync_dist=self.trainer.world_size > 1, on_step=True, on_epoch=False)

    def log_mean(self, name: str, values: Tensor, weights: Tensor) -> None:
        """Logs a weighted mean over the whole validation set, however it is cut into batches and over processes.

        A name that some process or batch has nothing to say of is right too; one that nobody has is not logged.
        """
        total = float(weights.sum())
        if total > 0:
            self.log_share(name, weighted_mean(values.detach().float(), weights.float(), total), total)

    def log_share(self, name: str, mean: Tensor, weight: float) -> None:
        """As ``log_mean``, of what is a mean already: ``mean`` of something that weighs ``weight``."""
        share = torch.stack(
            [mean.detach().float() * weight, torch.tensor(weight, dtype=torch.float32, device=mean.device)]
        )
        self._validated[name] = self._validated[name] + share if name in self._validated else share

    def on_validation_epoch_start(self) -> None:
        """Nothing is measured yet."""
        self._validated = {}

    def on_validation_epoch_end(self) -> None:
        """Logs the means over the whole validation set. Lightning's own go by position, not by name."""
        for name, (total, weight) in add_up(self._validated, self.device).items():
            self.log(name, total / weight, sync_dist=self.trainer.world_size > 1)
        self._validated = {}

    def count(self, examples: int, tokens: int | Tensor) -> None:
        """Counts what was trained on, for the throughput."""
        self.examples_seen += examples * self.trainer.world_size
        self.tokens_seen += int(tokens) * self.trainer.world_size

    def _not_finite(self, value: Tensor, name: str = "loss") -> str:
        where = self.run_folder / "failed_step.txt"
        where.write_text(
            f"batch {self.batches_done}, update {self.updates_done}, {name} {value.item()}\n", encoding="utf-8"
        )
        return (
            f"the {name} became {value.item()} at batch {self.batches_done} (see {where}); "
            "try a smaller optimizer.lr, stage.gradient_clip=1.0 or precision=fp32"
        )


def chunks(count: int, size: int | None) -> Iterator[slice]:
    """Slices of at most ``size`` (null: one slice) that cover ``range(count)``."""
    size = size or max(count, 1)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def check_context(model: LanguageModel, length: int, key: str) -> None:
    """Refuses a length that the model's context cannot hold."""
    if length > model.context_length:
        raise UserError(
            f"{key}={length} is more than the model's context of {model.context_length} tokens: "
            f"type {key}={model.context_length} or less"
        )
