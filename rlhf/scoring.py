"""Rewards: one call signature, a Rollout of B replies in, one score per reply [B] out."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rlhf import functions
from rlhf.data.collate import collate
from rlhf.data.records import Message, Prompt
from rlhf.data.template import Encoded, encode_prompt, encode_turns
from rlhf.data.testbed.gold import gold
from rlhf.errors import UserError
from rlhf.functional.scores import MissingEnd
from rlhf.model_config import no_head, scores
from rlhf.models.causal_lm import CausalLM
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_base import SharedBase
from rlhf.rollout import Rollout

MISSING_END_PENALTY = 1.0
"""Default penalty for a response without EOS, in units of the score: one deviation of a normalised reward model."""


class Reward(Protocol):
    """What a reward is to the stages: a callable, perhaps with weights that must be moved to the device first."""

    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores of the replies, [B] float, on the rollout's device."""
        ...


def make_ready(
    reward: Reward, device: torch.device | None, prompts: Sequence[Prompt] = (), max_new_tokens: int = 1
) -> None:
    """Moves a reward's weights, if it has any, to ``device``; lets it refuse prompts before anything is trained.

    Args:
        reward: Any reward; its ``to(device)``, ``check(prompts)`` and ``check_length(prompts, max_new_tokens)`` are
            called if it has them.
        device: Where its weights are to be; None leaves them.
        prompts: All prompts whose replies it will score.
        max_new_tokens: Longest of these replies, answers of tools included, in the policy's tokens.
    """
    if device is not None and hasattr(reward, "to"):
        reward.to(device)
    if prompts and hasattr(reward, "check"):
        reward.check(prompts)
    if prompts and hasattr(reward, "check_length"):
        reward.check_length(prompts, max_new_tokens)


class GoldReward:
    """The testbed's own labeller: the true score, without error (see docs/testbed.md for its scale).

    Args:
        aspect: Which score: "total" is safety where the prompt is tagged unsafe, helpfulness elsewhere.
    """

    def __init__(self, aspect: Literal["total", "helpfulness", "safety"] = "total") -> None:
        self.aspect = aspect

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError for a prompt that is not the testbed's."""
        for prompt in prompts:
            gold(prompt, "")

    def __call__(self, rollout: Rollout) -> Tensor:
        """Gold scores, [B]."""
        pairs = zip(rollout.prompts, rollout.texts, strict=True)
        scores = [getattr(gold(prompt, text), self.aspect) for prompt, text in pairs]
        return torch.tensor(scores, dtype=torch.float32, device=rollout.mask.device)


class ModelReward:
    """A trained reward model, read at the last token of the reply.

    It reads the text of prompt and reply in its own tokens and its own chat template, as it did when it was trained, so
    the policy may have another tokenizer. A reply with tool calls is read whole: every turn, the tools' too.

    Its weights are read by ``load``, or when they are first needed.

    Args:
        path: Run folder or model folder of the reward model.
        batch_size: Replies scored at a time.
    """

    def __init__(self, path: str, batch_size: Annotated[int, Field(gt=0)] = 256) -> None:
        self.path = path
        self.batch_size = batch_size
        self._model: ScalarModel | None = None

    @staticmethod
    def check_knobs(path: str, **_: Any) -> None:
        """Raises UserError for a folder with a language model; what is no folder by now is looked at by ``load``."""
        if scores(path) is False:
            raise no_head("reward.path", path)

    def load(self, base: SharedBase | None = None) -> "ModelReward":
        """Reads the weights; on a shared base only the reward model's adapter and head."""
        if not CausalLM(self.path, None, None).scalar:
            raise no_head("reward.path", self.path)
        if base is not None:
            self._model = base.scalar(self.path)
        else:
            self._model = ScalarModel.load(self.path).disable_dropout().eval().requires_grad_(False)
        return self

    @property
    def model(self) -> ScalarModel:
        """The reward model, frozen, in eval mode."""
        if self._model is None:
            self.load()
        assert self._model is not None
        return self._model

    @property
    def log_odds(self) -> float:
        """What a score is multiplied by to be in the units of the reward model's loss, undoing its normalisation."""
        return self.model.log_odds

    def to(self, device: torch.device) -> "ModelReward":
        """Moves the weights to ``device``."""
        self.model.to(device)
        return self

    def check_length(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Raises UserError for a prompt that leaves no room for such a reply in the reward model's context."""
        for prompt in prompts:
            self._fits(len(encode_prompt(self.model.tokenizer, prompt.messages)) + max_new_tokens, prompt)

    def _fits(self, length: int, prompt: Prompt) -> None:
        if length > self.model.context_length:
            raise UserError(
                f"prompt '{prompt.messages[-1].content[:60]}' with its reply has {length} tokens, the reward model "
                f"{self.path} reads {self.model.context_length}: set a smaller data.max_prompt_length or "
                "rollout.max_new_tokens"
            )

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Scores, [B]."""
        tokenizer = self.model.tokenizer
        encoded = []
        said = rollout.turns or [(Message("assistant", text),) for text in rollout.texts]
        for prompt, turns, ended in zip(rollout.prompts, said, rollout.ended.tolist(), strict=True):
            # Of a reply that was cut off the reward model sees no end, as when it was trained.
            question, reply = encode_prompt(tokenizer, prompt.messages), encode_turns(tokenizer, turns, ended)
            self._fits(len(question) + len(reply), prompt)
            encoded.append(Encoded(question + reply, [False] * len(question) + [True] * len(reply)))
        device = rollout.mask.device
        scores = torch.empty(len(encoded), device=device)
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            batch = collate([encoded[i] for i in rows], self.model.pad_id).to(device)
            scores[rows] = self.model.scores(batch.ids, batch.attention_mask, batch.position_ids).float()
        return scores


MissingEndOption = Literal["auto", "replace", "subtract", "none"]


def resolve_missing_end(how: MissingEndOption, penalty: float, reward: Any) -> MissingEnd:
    """Return the treatment of responses without EOS that ``auto`` stands for under this reward.

    A trained reward model was made for complete responses, so that its score of a cut one means little: "replace" by
    a fixed penalty (Huang et al. 2024, arXiv 2403.17031). A rule (exact match, a function, gold) checks what the text
    says; a response that was cut before its answer is wrong already, so its score stays: "none".

    Raises:
        UserError: For a penalty that would not be read.
    """
    if how == "auto":
        how = "replace" if model_rewards(reward) else "none"
        why = "missing_end=auto leaves the scores of a rule as they are"
    else:
        why = f"missing_end={how} reads no penalty"
    if how == "none" and penalty not in (0.0, MISSING_END_PENALTY):
        raise UserError(
            f"stage.missing_end_penalty={penalty:g} is not read: stage.{why}; type stage.missing_end=subtract"
        )
    return how


def model_rewards(part: Any) -> dict[str, ModelReward]:
    """The reward models in a reward, in a combination of some, or in an annotator that asks one, by name."""
    if isinstance(part, ModelReward):
        return {"reward": part}
    inner = getattr(part, "rewards", None)
    if isinstance(inner, Mapping):
        found = {name: model_rewards(reward) for name, reward in inner.items()}
        return {name if len(of) == 1 else f"{name}.{key}": one for name, of in found.items() for key, one in of.items()}
    inner = getattr(part, "reward", None)
    return {} if inner is None else model_rewards(inner)


class FunctionReward:
    """A rule written in Python: any function ``(prompt: Prompt, reply: str, **arguments) -> float``.

    Args:
        function: Where it is, as ``package.module:name``.
        arguments: More keyword arguments of the function.
    """

    def __init__(self, function: str, arguments: dict[str, Any] | None = None) -> None:
        self.name, self.arguments = function, dict(arguments or {})
        self.function = self.check_knobs(function, arguments)

    @staticmethod
    def check_knobs(function: str, arguments: dict[str, Any] | None = None) -> Callable[..., Any]:
        """The function. Raises UserError for one that cannot be imported or takes other arguments."""
        found = functions.load("reward.function", function)
        try:
            inspect.signature(found).bind(None, "", **(arguments or {}))
        except (TypeError, ValueError) as error:
            raise UserError(
                f"reward.function={function}: {error}; it is called as function(prompt, reply"
                + "".join(f", {key}={value}" for key, value in (arguments or {}).items())
                + ")"
            ) from error
        return found

    def __call__(self, rollout: Rollout) -> Tensor:
        """The function's values, [B]."""
        pairs = zip(rollout.prompts, rollout.texts, strict=True)
        return torch.tensor([self._value(prompt, text) for prompt, text in pairs], device=rollout.mask.device)

    def _value(self, prompt: Prompt, text: str) -> float:
        try:
            value = self.function(prompt, text, **self.arguments)
        except Exception as error:  # whatever a stranger's rule raises is said with its name
            raise UserError(
                f"reward.function={self.name} failed on the reply {text[:60]!r}: {type(error).__name__}: {error}"
            ) from error
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(f"reward.function={self.name} gave {value!r} for the reply {text[:60]!r}: no finite number")
        return number
