"""Model reward: a trained reward model."""

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import collate
from rlhf.data.encoded_rows import Encoded
from rlhf.data.encoding import encode_prompt, encode_turns
from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError, key, renaming
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import stored_precision
from rlhf.models.saved_config import is_scalar_model, missing_head_error
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_base import SharedBase
from rlhf.reward.base import Reward
from rlhf.sampler.rollout import Rollout


class ModelReward(Reward):
    """Trained reward model, whose score is read at the last token of the response.

    It reads the text of prompt and response with its own tokenizer and its own chat template, as in its training, so
    the policy may have another tokenizer. It reads all turns of a response with tool calls, the tools' turns included.

    The weights are loaded by ``load``, or on first use.

    Args:
        path: Run directory or model directory of the reward model.
        batch_size: Responses scored per batch.
    """

    def __init__(self, path: str, batch_size: Annotated[int, Field(gt=0)] = 256) -> None:
        self.path = path
        self.batch_size = batch_size
        self._model: ScalarModel | None = None

    @staticmethod
    def check_hyperparameters(path: str, **_: Any) -> None:
        """Check that ``path`` is not a language model; a path that does not exist yet is checked by ``load``.

        Raises:
            UserError: For the directory of a language model.
        """
        if is_scalar_model(path) is False:
            raise missing_head_error("reward.path", path)

    def load(self, base: SharedBase | None = None) -> "ModelReward":
        """Load the weights; on a shared base, only the reward model's adapter and head.

        Raises:
            UserError: For a model without a scalar head.
        """
        with renaming("model.path", "reward.path"):
            spec = CausalLM(self.path, None, None)
            if not spec.scalar:
                raise missing_head_error("reward.path", self.path)
            if base is not None:
                self._model = base.scalar(self.path)
            else:
                model = ScalarModel.load(spec, precision=stored_precision(spec.config()))
                self._model = model.disable_dropout().eval().requires_grad_(False)
        return self

    @property
    def model(self) -> ScalarModel:
        """The reward model, frozen, in eval mode; loaded on first use."""
        if self._model is None:
            self.load()
        assert self._model is not None
        return self._model

    @property
    def log_odds(self) -> float:
        """Factor that converts a score to the units of the reward model's loss, undoing its normalisation."""
        return self.model.log_odds

    def to(self, device: torch.device) -> None:
        """Move the weights to ``device``."""
        self.model.to(device)

    def check_length(self, prompts: Sequence[Prompt], max_new_tokens: int) -> None:
        """Check that every prompt leaves room for a response in the reward model's context.

        Raises:
            UserError: For a prompt that does not, with a response of ``max_new_tokens`` tokens.
        """
        for prompt in prompts:
            self._fits(len(encode_prompt(self.model.tokenizer, prompt.messages)) + max_new_tokens, prompt)

    def _fits(self, length: int, prompt: Prompt) -> None:
        if length > self.model.context_length:
            raise UserError(
                f"the prompt '{prompt.messages[-1].content[:60]}' with its response has {length} tokens, and the "
                f"reward model {self.path} reads {self.model.context_length}",
                fix=f"type a smaller {key('data.max_prompt_length')} or {key('sampler.max_new_tokens')}",
            )

    @torch.no_grad()
    def __call__(self, rollout: Rollout) -> Tensor:
        """Return the scores, [B]."""
        tokenizer = self.model.tokenizer
        encoded = []
        responses = rollout.turns or [(Message("assistant", text),) for text in rollout.texts]
        for prompt, turns, ended in zip(rollout.prompts, responses, rollout.ended.tolist(), strict=True):
            # A truncated response gets no end-of-turn token, as in the training of the reward model.
            question, response = encode_prompt(tokenizer, prompt.messages), encode_turns(tokenizer, turns, ended)
            self._fits(len(question) + len(response), prompt)
            encoded.append(Encoded(question + response, [False] * len(question) + [True] * len(response)))
        device = rollout.mask.device
        scores = torch.empty(len(encoded), device=device)
        by_length = sorted(range(len(encoded)), key=lambda i: len(encoded[i].ids))
        for start in range(0, len(by_length), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            batch = collate([encoded[i] for i in rows], self.model.pad_id).to(device)
            scores[rows] = self.model.scores(batch).float()
        return scores


def find_model_rewards(reward: Reward) -> dict[str, ModelReward]:
    """Return the model rewards in a reward by name: itself, or those among the rewards that it combines."""
    if isinstance(reward, ModelReward):
        return {"reward": reward}
    found = {name: find_model_rewards(inner) for name, inner in reward.rewards.items()}
    return {name if len(of) == 1 else f"{name}.{part}": one for name, of in found.items() for part, one in of.items()}
