"""Best-of-K sampling: K responses per prompt, at one temperature or several."""

from typing import Annotated

import torch
from pydantic import Field

from rlhf.data.batches import mix_seed
from rlhf.data.collate import collate, collate_prompts
from rlhf.data.encoded_rows import Encoded
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Prompt
from rlhf.errors import UserError, key
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout, joined


class BestOfK(AncestralSampler):
    """Sampler of K responses per prompt, at one temperature or distributed over several.

    Args:
        max_new_tokens: Longest response, in tokens, end-of-turn included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        samples: Responses per prompt (K), 2 or more.
        batch_size: Rows sampled at a time; bounds the cache's memory.
        temperatures: Temperatures over which the K responses are distributed as evenly as possible; replaces
            ``temperature``.
    """

    def __init__(
        self,
        max_new_tokens: Annotated[int, Field(gt=0)] = 32,
        temperature: Annotated[float, Field(ge=0)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        samples: Annotated[int, Field(ge=2)] = 4,
        batch_size: Annotated[int, Field(gt=0)] = 512,
        temperatures: Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=1)] | None = None,
    ) -> None:
        super().__init__(max_new_tokens, temperature, top_k, top_p, samples, batch_size)
        self.check_hyperparameters(samples, temperatures)
        self.temperatures = [float(one) for one in temperatures] if temperatures else None

    @staticmethod
    def check_hyperparameters(samples: int = 4, temperatures: list[float] | None = None, **_: object) -> None:
        """Validate the hyperparameters alone.

        Raises:
            UserError: If there are more temperatures than samples.
        """
        if temperatures and len(temperatures) > samples:
            raise UserError(
                f"has {len(temperatures)} temperatures for {samples} samples, so that some have no response",
                fix=f"type {key('sampler.samples', len(temperatures))} or more",
                option="sampler.temperatures",
                value=temperatures,
            )

    @property
    def exact(self) -> bool:
        """Return whether every response is from the model's own distribution at one temperature."""
        return super().exact and not self.temperatures

    @property
    def spread(self) -> list[float]:
        """Temperatures of a prompt's K responses, in their order."""
        if not self.temperatures:
            return super().spread
        count = len(self.temperatures)
        return [t for i, t in enumerate(self.temperatures) for _ in range(len(range(i, self.samples, count)))]

    @torch.no_grad()
    def sample(self, policy: LanguageModel, prompts: list[Prompt], seed: int) -> Rollout:
        """Sample as ``AncestralSampler.sample``; the responses to a prompt are in the order of ``spread``.

        Raises:
            UserError: For a prompt that is too long for the context.
        """
        if not self.temperatures:
            return super().sample(policy, prompts, seed)
        parts = []
        for index, temperature in enumerate(self.temperatures):
            share = len(range(index, self.samples, len(self.temperatures)))
            one = AncestralSampler(self.max_new_tokens, temperature, self.top_k, self.top_p, share, self.batch_size)
            parts.append(one.sample(policy, prompts, mix_seed(seed, index)))
        return interleave(parts, len(prompts), policy.pad_id)


def interleave(parts: list[Rollout], prompts: int, pad_id: int) -> Rollout:
    """Merge rollouts of the same prompts: the rows of a prompt are consecutive, in the order of the parts."""
    rows: list[int] = []
    starts = [sum(len(part.texts) for part in parts[:index]) for index in range(len(parts))]
    for prompt in range(prompts):
        for start, part in zip(starts, parts, strict=True):
            share = len(part.texts) // prompts
            rows += range(start + prompt * share, start + (prompt + 1) * share)
    return joined(parts, pad_id).rows(torch.tensor(rows, device=parts[0].mask.device))


def build_rollout(policy: LanguageModel, prompts: list[Prompt], texts: list[str], ended: list[bool]) -> Rollout:
    """Return given responses as a rollout, so that a reward can score them.

    The responses were not sampled here, so ``logp`` is 0.
    """
    tokenizer, device = policy.tokenizer, policy.device
    asked = collate_prompts([encode_prompt(tokenizer, prompt.messages) for prompt in prompts], policy.pad_id).to(device)
    responses = []
    for text, whole in zip(texts, ended, strict=True):
        # Every row of a rollout has a token, so an empty truncated response gets an end-of-turn.
        ids = encode_response(tokenizer, text, whole) or [policy.end_id]
        responses.append(Encoded(ids, [True] * len(ids)))
    answered = collate(responses, policy.pad_id).to(device)
    return Rollout(
        prompts=prompts,
        prompt_ids=asked.ids,
        prompt_mask=asked.attention_mask,
        response_ids=answered.ids,
        mask=answered.attention_mask,
        logp=torch.zeros(answered.ids.shape, device=device),
        ended=torch.tensor(ended, device=device),
        texts=texts,
    )
