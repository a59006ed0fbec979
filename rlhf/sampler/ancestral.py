"""Ancestral sampling: generate responses to prompts, with their log-probabilities."""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import collate_prompts
from rlhf.data.records import Prompt
from rlhf.data.special_tokens import has_special_tokens
from rlhf.models.language_model import LanguageModel
from rlhf.models.packed_weights import packed_weights
from rlhf.sampler.base import Sampler
from rlhf.sampler.continuous_batching import ContinuousBatch, can_decode_in_slots
from rlhf.sampler.rollout import Rollout, positions
from rlhf.sampler.weight_copy import WeightCopy

BLOCK = 256  # tokens whose probabilities are summed first when a token is drawn


class AncestralSampler(Sampler):
    """Ancestral sampler with a key-value cache and continuous batching.

    The prompt is computed once for all K samples of it, and a row that has ended gives its place to the next one. The
    randomness is one uniform number per row and decode step, drawn for all rows in advance, so a response does not
    depend on its place or on which other rows have ended.

    The returned log-probabilities are those of the sampling distribution. ``top_k`` and ``top_p`` truncate that
    distribution, so with them the log-probabilities differ from the model's own (algorithms that score the policy must
    then refuse).

    Args:
        max_new_tokens: Longest response, in tokens, end-of-turn included.
        temperature: Divides the logits; 0 takes the most likely token.
        top_k: Keep only the k most likely tokens; 0 keeps all.
        top_p: Keep the smallest set of tokens with at least this probability; 1 keeps all.
        samples: Responses per prompt (K).
        batch_size: Rows sampled at a time; bounds the cache's memory.
        precision: Weights that sample: the policy's own ("policy"), or a copy of them in bfloat16 that is renewed
            before each rollout ("bf16"), whose distribution is not quite the policy's.
    """

    def __init__(
        self,
        max_new_tokens: Annotated[int, Field(gt=0)] = 32,
        temperature: Annotated[float, Field(ge=0)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        samples: Annotated[int, Field(gt=0)] = 1,
        batch_size: Annotated[int, Field(gt=0)] = 512,
        precision: Literal["policy", "bf16"] = "policy",
    ) -> None:
        super().__init__(max_new_tokens, temperature, samples, batch_size)
        self.top_k = top_k
        self.top_p = top_p
        self.precision = precision
        self._copy = WeightCopy(torch.bfloat16)

    @property
    def exact(self) -> bool:
        """Return whether the sampling distribution is the model's own at this temperature: neither top_k nor top_p."""
        return super().exact and self.top_k == 0 and self.top_p == 1.0

    @property
    def matches_policy(self) -> bool:
        """Return whether responses are sampled with the policy's own weights, and not with a copy in 16 bits."""
        return self.precision == "policy"

    @torch.no_grad()
    def sample(self, policy: LanguageModel, prompts: list[Prompt], seed: int) -> Rollout:
        """Sample K responses to each of N prompts: a Rollout of B = N * K rows, deterministic by ``seed``.

        Raises:
            UserError: For a prompt that is too long for the context.
        """
        encoded = self.check(policy, prompts)
        batch = collate_prompts(encoded, policy.pad_id).to(policy.device)
        ids, mask = batch.ids, batch.attention_mask
        noise = self._noise(len(prompts) * self.samples, self.max_new_tokens, seed).to(policy.device)
        model = policy if self.precision == "policy" else self._copy.of(policy)
        response, logp = self._continue(model, ids, mask, noise, self.samples)
        response_mask, ended = _until_end(response, policy.end_id)
        longest = int(response_mask.sum(dim=1).max())
        response, response_mask, logp = (x[:, :longest] for x in (response, response_mask, logp))
        rows = zip(response.cpu(), response_mask.cpu(), strict=True)  # a GPU would wait twice for each row
        texts = policy.tokenizer.batch_decode([row[keep].tolist() for row, keep in rows], skip_special_tokens=True)
        return Rollout(
            prompts=[prompt for prompt in prompts for _ in range(self.samples)],
            prompt_ids=ids.repeat_interleave(self.samples, dim=0),
            prompt_mask=mask.repeat_interleave(self.samples, dim=0),
            response_ids=torch.where(response_mask, response, policy.pad_id),
            mask=response_mask,
            logp=torch.where(response_mask, logp, 0.0),
            ended=ended,
            texts=[text.strip() for text in texts],
            special_tokens=has_special_tokens(policy.tokenizer, policy.end_id, response, response_mask),
        )

    def _noise(self, rows: int, columns: int, seed: int) -> Tensor:
        """Return one uniform number per row and token, from the CPU so that it is the same on every device."""
        return torch.rand(rows, columns, generator=torch.Generator(device="cpu").manual_seed(seed))

    def _continue(
        self, policy: LanguageModel, ids: Tensor, mask: Tensor, noise: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Return token ids and log-probabilities of the continuations of N rows, [N * samples, max_new_tokens]."""
        if can_decode_in_slots(policy):
            with packed_weights(policy):
                return ContinuousBatch(policy, ids, mask, noise, samples, self.batch_size, self._draw).run()
        per_chunk = max(1, self.batch_size // samples)
        chunks = [
            self._decode(policy, ids[i : i + per_chunk], mask[i : i + per_chunk], noise[i * samples :], samples)
            for i in range(0, len(ids), per_chunk)
        ]
        response, logp = (torch.cat(part) for part in zip(*chunks, strict=True))
        return response, logp

    def _decode(
        self, policy: LanguageModel, ids: Tensor, mask: Tensor, noise: Tensor, samples: int
    ) -> tuple[Tensor, Tensor]:
        """Return the same as ``_continue``, for one chunk of rows, with the cache of transformers.

        For architectures that cannot decode in slots.
        """
        rows = len(ids) * samples
        response = torch.full((rows, self.max_new_tokens), policy.end_id, device=ids.device)
        logp = torch.zeros(rows, self.max_new_tokens, device=ids.device)

        hidden, cache = policy.step(ids, mask, positions(mask), cache=None)
        if samples > 1:
            cache.batch_repeat_interleave(samples)
        hidden = hidden[:, -1].repeat_interleave(samples, dim=0)
        mask = mask.repeat_interleave(samples, dim=0)
        position = mask.sum(dim=1, keepdim=True)
        alive = torch.arange(rows, device=ids.device)  # rows still in the batch

        for t in range(self.max_new_tokens):
            token, token_logp = self._draw(policy.head(hidden), noise[alive, t])
            response[alive, t] = token
            logp[alive, t] = token_logp

            going = token != policy.end_id
            if t + 1 == self.max_new_tokens:
                break
            left = int(going.sum())  # the one number of a decode step that the CPU waits for
            if left == 0:
                break
            if left < 0.75 * len(going):  # dropping rows copies the cache, so it waits for a quarter of them
                keep = going.nonzero()[:, 0]
                cache.batch_select_indices(keep)
                alive, token, mask, position = alive[keep], token[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            step_hidden, cache = policy.step(token[:, None], mask, position, cache)
            hidden, position = step_hidden[:, -1], position + 1
        return response, logp

    def _draw(self, logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
        """Return a token for each row of logits [N, V] and its log-probability in the sampling distribution, [N] each.

        Args:
            logits: Of the model; kept as they are.
            uniform: Random numbers in [0, 1), [N].
        """
        logits = self._shape(logits)
        if self.temperature > 0:
            return draw_tokens(logits, uniform)
        token = logits.argmax(dim=-1)
        return token, logits.gather(1, token[:, None])[:, 0] - logits.logsumexp(dim=-1)

    def _shape(self, logits: Tensor) -> Tensor:
        """Return logits whose softmax is the sampling distribution, [N, V] -> [N, V]."""
        logits = logits.float()
        if self.temperature not in (0, 1):
            logits = logits / self.temperature
        if self.top_k:
            kth = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        if self.top_p < 1:
            ordered, order = logits.sort(descending=True)
            probability = ordered.softmax(dim=-1)
            beyond = probability.cumsum(dim=-1) - probability >= self.top_p
            logits = logits.masked_fill(torch.zeros_like(beyond).scatter(1, order, beyond), -torch.inf)
        return logits


def draw_tokens(logits: Tensor, uniform: Tensor) -> tuple[Tensor, Tensor]:
    """Sample a token per row by inverting the cumulative distribution; return it and its log-probability, [N] each.

    The cumulative sum runs over blocks of tokens first, and then over the tokens of one block.

    Args:
        logits: [N, V] float32; -inf for tokens that must not be drawn.
        uniform: Random numbers in [0, 1), [N].
    """
    vocabulary = logits.shape[-1]
    peak = logits.amax(dim=-1, keepdim=True)
    weights = (logits - peak).exp_()  # of each token; the largest is 1
    whole = vocabulary // BLOCK * BLOCK
    blocks = weights[:, :whole].unflatten(1, (-1, BLOCK)).sum(dim=-1)
    if whole < vocabulary:
        blocks = torch.cat([blocks, weights[:, whole:].sum(dim=-1, keepdim=True)], dim=1)
    sums = blocks.cumsum(dim=-1)
    block, rest = _find(sums, uniform[:, None] * sums[:, -1:])
    tokens = block * BLOCK + torch.arange(BLOCK, device=logits.device)
    within = weights.gather(1, tokens.clamp(max=vocabulary - 1)).masked_fill(tokens >= vocabulary, 0.0)
    place, _ = _find(within.cumsum(dim=-1), rest)
    token = block * BLOCK + place
    logp = logits.gather(1, token) - peak - sums[:, -1:].log()
    return token[:, 0], logp[:, 0]


def _find(sums: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Return the interval of cumulative sums [N, n] that each target [N, 1] is in, and how far inside it is.

    A target that rounding put at or beyond the last sum counts as just before it, so that no empty interval is found.
    """
    target = torch.minimum(target, torch.nextafter(sums[:, -1:], torch.zeros_like(target)))
    found = torch.searchsorted(sums, target, right=True)
    before = torch.where(found > 0, sums.gather(1, (found - 1).clamp(min=0)), 0.0)
    return found, target - before


def _until_end(response: Tensor, end_id: int) -> tuple[Tensor, Tensor]:
    """Return the mask [B, R] up to and including the first end-of-turn, and whether there is one, [B]."""
    is_end = response == end_id
    mask = is_end.long().cumsum(dim=1) - is_end.long() == 0
    return mask, is_end.any(dim=1)
