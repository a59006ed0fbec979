"""Batch adapter for losses that contrast good with bad responses, of any prompts."""

import torch
from torch import Tensor

from rlhf.data.collate import LabelBatch
from rlhf.errors import UserError, key
from rlhf.functional.distributed import gather_rows, world_size
from rlhf.models.language_model import LanguageModel
from rlhf.objective import ContrastObjective, Metrics
from rlhf_dpo.gradient_caching import CachedLosses, cache_losses
from rlhf_dpo.labels import LabelledResponses


class Contrasts(LabelledResponses[CachedLosses | None]):
    """Batch adapter of a ``ContrastObjective``, which reads the log-probabilities of the whole batch, of all ranks.

    Uses gradient caching. The mean over responses of their losses is the mean over contrasts.
    """

    objective: ContrastObjective

    def check_batch_size(self, batch_size: int) -> None:
        """Raise UserError for a batch too small to hold a contrast."""
        if batch_size < 2:
            raise UserError(
                "this objective contrasts the good responses of a batch with its bad ones",
                fix=f"type {key('stage.batch_size', 2)} or more",
                option="stage.batch_size",
                value=batch_size,
            )

    def has_gradient(self, parts: list[LabelBatch], across_ranks: bool = True) -> bool:
        """Return whether the batch, of all ranks if ``across_ranks``, holds responses of both kinds."""
        desirable = torch.cat([part.desirable for part in parts])
        good = (gather_rows(desirable.float())[0] if across_ranks else desirable.float()) > 0.5
        return bool(good.any()) and not bool(good.all())

    def batch_terms(
        self, policy: LanguageModel, parts: list[LabelBatch], across_ranks: bool = True
    ) -> CachedLosses | None:
        """Return the losses of the batch and their derivatives; None if one micro-batch holds the whole batch."""
        if len(parts) == 1 and not (across_ranks and world_size() > 1):
            return None
        with torch.no_grad():
            logp = torch.cat([policy.logprobs(part.tokens)[0].sum(dim=1) for part in parts])
        reference, desirable, embedding = (
            torch.cat([getattr(part, name) for part in parts]) if getattr(parts[0], name) is not None else None
            for name in ("reference", "desirable", "embedding")
        )
        assert reference is not None and desirable is not None
        own = slice(None)
        if across_ranks:
            logp, own = gather_rows(logp)
            reference, desirable = gather_rows(reference)[0], gather_rows(desirable.float())[0] > 0.5
            embedding = None if embedding is None else gather_rows(embedding)[0]
        return cache_losses(
            lambda whole: self.objective(whole, reference, desirable, embedding),
            [logp],
            torch.ones_like(logp),
            own,
            [len(part) for part in parts],
        )

    def losses(
        self, policy: LanguageModel, part: LabelBatch, terms: CachedLosses | None, index: int
    ) -> tuple[Tensor, Metrics]:
        """Return the objective per response and its metrics, [N] each, of micro-batch number ``index``."""
        assert part.reference is not None
        logp = policy.logprobs(part.tokens)[0].sum(dim=1)
        if terms is None:
            losses, metrics = self.objective(logp, part.reference, part.desirable, part.embedding)
        else:
            # The value is the cached loss; the gradient is that of the whole batch's sum.
            slope = terms.slope(index, logp)
            losses, metrics = terms.losses[index] + slope - slope.detach(), terms.metrics[index]
        return losses, {**metrics, "reference_gap": (logp - part.reference).abs().detach()}
