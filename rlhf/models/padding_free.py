"""Padding-free passes: every distinct token of a batch is computed once, without padding and without repeated prompts.

The tokens of all documents of a batch are laid out in one row. A document (a row, or a part of a packed row) whose
first tokens equal those of the document before it takes the hidden states of that document for them: a state depends on
the tokens up to it alone. So the prompt of a comparison is computed once for all its responses, and the prompt of a
group once for its K samples. Embeddings, projections and feed-forward layers see the row; attention is computed per
document, with the kernel of plain causal attention and no mask, or without padding: on a GPU in 16 bits
(``rlhf.models.varlen``), and on a CPU in fp32 where it saves time (``rlhf.models.blocked_attention``). The results are
those of a padded batch, up to rounding.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rlhf.models.blocked_attention import Document, attend_blocked, is_faster, is_supported, list_documents
from rlhf.models.slot_cache import PromptStates, SlotCache
from rlhf.models.varlen import Packing, attend_packed, is_usable, pack

NAME = "sdpa_per_document"
MIN_SAVING = 1 / 16  # least share of computed positions saved, below which the padded batch is as fast


@dataclass(frozen=True)
class Layout:
    """Distinct tokens of a batch in one row, and where each document finds its own.

    N distinct tokens, M documents of at most L tokens, in a batch of B rows and T columns.
    """

    ids: Tensor  # [1, N] long, the distinct tokens
    position_ids: Tensor  # [1, N] long
    documents: Tensor  # [M, L] long, index into the row of the document's tokens; 0 after its end
    lengths: Tensor  # [M] long, tokens of each document
    shared: Tensor  # [M] long, leading tokens of each document that are taken from the one before
    owned: Tensor  # [N] long, index into the flat [M * L] documents of the one that each token was taken from
    places: Tensor  # [B, T] long, index into the row of each token of the batch; 0 on padding

    @property
    def saving(self) -> float:
        """Share of the batch's positions that need no computation."""
        return 1 - self.ids.shape[1] / max(self.places.numel(), 1)

    @cached_property
    def packing(self) -> Packing:
        """Queries and keys of the documents without padding."""
        return pack(self.documents, self.lengths, self.shared)

    @cached_property
    def pieces(self) -> list[Document]:
        """Documents as ranges of the row."""
        return list_documents(self.documents, self.lengths, self.shared)


def find_starts(attention_mask: Tensor, position_ids: Tensor) -> Tensor:
    """Return a mask of the tokens that start a document, [B, T] bool.

    Args:
        attention_mask: True on tokens, [B, T] bool. Padding may be anywhere.
        position_ids: Positions in the document, [B, T] long: one that does not follow the one before starts a document.
    """
    starts = attention_mask.clone()
    starts[:, 1:] &= ~(attention_mask[:, :-1] & (position_ids[:, 1:] == position_ids[:, :-1] + 1))
    return starts


def lay_out(ids: Tensor, attention_mask: Tensor, position_ids: Tensor, starts: Tensor | None = None) -> Layout:
    """Return the layout of a batch.

    Args:
        ids: Token ids, [B, T] long.
        attention_mask: True on tokens, [B, T] bool.
        position_ids: Positions in the document, [B, T] long.
        starts: `find_starts` of the two, if it is known.
    """
    device = ids.device
    if starts is None:
        starts = find_starts(attention_mask, position_ids)
    document = (starts.flatten().cumsum(0) - 1)[attention_mask.flatten()]  # [tokens], the document of each token
    tokens, positions = ids[attention_mask], position_ids[attention_mask]
    lengths = torch.bincount(document)
    column = torch.arange(len(tokens), device=device) - (lengths.cumsum(0) - lengths)[document]
    count, longest = len(lengths), int(lengths.max())

    def table(values: Tensor) -> Tensor:
        filled = torch.full((count, longest), -1, dtype=torch.long, device=device)
        filled[document, column] = values
        return filled

    by_id, by_position = table(tokens), table(positions)
    equal = (by_id[1:] == by_id[:-1]) & (by_position[1:] == by_position[:-1]) & (by_id[1:] >= 0)
    shared = torch.zeros(count, dtype=torch.long, device=device)  # leading tokens taken from the document before
    shared[1:] = equal.long().cumprod(dim=1).sum(dim=1)
    order = torch.arange(longest, device=device)
    is_own = order >= shared[:, None]
    # The document that a token is taken from: the last one, up to its own, that does not share this column.
    owner = torch.where(is_own, torch.arange(count, device=device)[:, None], 0).cummax(dim=0).values
    is_token = order < lengths[:, None]
    is_new = is_own & is_token
    number = (is_new.flatten().cumsum(0) - 1).view(count, longest)
    documents = torch.where(is_token, number[owner, order], 0)
    places = torch.zeros_like(ids)
    places[attention_mask] = documents[document, column]
    owned = is_new.flatten().nonzero().squeeze(1)
    distinct, positions = (values.flatten()[owned][None] for values in (by_id, by_position))
    return Layout(distinct, positions, documents, lengths, shared, owned, places)


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Compute attention as transformers' ``sdpa``; per document, if the pass has a layout, or to the rows of slots.

    Args:
        module: Attention layer.
        query: [1, H, N, d] with a layout, otherwise [B, H, T, d].
        key: As ``query``, with the number of key-value heads.
        value: As ``key``.
        attention_mask: Mask of a pass without a layout.
        options: ``layout`` (`Layout` or None), ``record`` (`PromptStates` or None: keeps the keys and values),
            ``slots`` (`SlotCache` or None: a decode step) and what ``sdpa_attention_forward`` takes.

    Returns:
        The output [1, N, H, d] or [B, T, H, d], and None.
    """
    layout: Layout | None = options.pop("layout", None)
    record: PromptStates | None = options.pop("record", None)
    slots: SlotCache | None = options.pop("slots", None)
    if slots is not None:
        return slots.attend(module, query, key, value, **options), None
    if record is not None:
        record.record(module, key, value)
    if layout is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window, scale = options.get("sliding_window"), options.get("scaling")
    if not options.get("dropout"):
        if is_usable(query, key, scale, window):
            return attend_packed(query, key, value, layout.packing, scale, window), None
        if is_supported(query) and is_faster(query.shape[1], len(layout.lengths), layout.pieces):
            return attend_blocked(query, key, value, layout.pieces, scale, window), None
    return attend_per_document(module, query, key, value, layout, **options), None


def attend_per_document(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, layout: Layout, **options: Any
) -> Tensor:
    """Compute attention with the documents of a layout padded to the longest, [1, N, H, d]."""
    count, longest = layout.documents.shape
    flat = layout.documents.flatten()

    def by_document(states: Tensor) -> Tensor:  # [1, H, N, d] -> [M, H, L, d]
        _, heads, _, width = states.shape
        rows = take(states[0].transpose(0, 1).flatten(1), flat)
        return rows.view(count, longest, heads, width).transpose(1, 2)

    states = (by_document(part) for part in (query, key, value))
    # Without a window no mask: padding is at the end of a document, where causal attention does not look.
    mask = None
    window = options.get("sliding_window")
    if window is not None and longest > window:
        order = torch.arange(longest, device=query.device)
        distance = order[:, None] - order
        mask = ((distance >= 0) & (distance < window))[None, None]
    output, _ = sdpa_attention_forward(module, *states, mask, **options)
    return take(output.flatten(0, 1).flatten(1), layout.owned).view(1, -1, *output.shape[2:])


def take(states: Tensor, index: Tensor) -> Tensor:
    """Return rows of states, [N, D] and [...] long -> [..., D]; a row may be taken several times.

    The gradient of an embedding is summed in a fixed order on every device, that of ``index_select`` is not on a GPU.
    """
    return F.embedding(index, states)


def hidden_states(decoder: PreTrainedModel, layout: Layout, record: PromptStates | None = None) -> Tensor:
    """Return the last hidden states of the distinct tokens, [N, D]; ``record`` receives their keys and values."""
    recording = {} if record is None else {"record": record}
    output = decoder(
        input_ids=layout.ids,
        position_ids=layout.position_ids,
        attention_mask=_unread(layout.ids.device),
        use_cache=False,
        layout=layout,
        **recording,
    )
    states: Tensor = output.last_hidden_state[0]
    return states


def decode(decoder: PreTrainedModel, tokens: Tensor, cache: SlotCache, width: int) -> Tensor:
    """Compute a decode step: return the last hidden states of each slot's new token, [S] long -> [S, D].

    Args:
        decoder: Decoder that ``enable`` accepted.
        tokens: Next token of each slot.
        cache: Keys and values of the slots; receives those of the new tokens.
        width: Tokens of the longest row, the new one included.
    """
    cache.start_step(width)
    output = decoder(
        input_ids=tokens[:, None],
        position_ids=cache.lengths[:, None],
        attention_mask=_unread(tokens.device),
        use_cache=False,
        slots=cache,
    )
    cache.finish_step()
    states: Tensor = output.last_hidden_state[:, 0]
    return states


def _unread(device: torch.device) -> Tensor:
    """Return a mask of four dimensions: it is passed on as it is, so that none is built, and attention ignores it."""
    return torch.empty(1, 1, 1, 1, dtype=torch.bool, device=device)


def hidden_states_by_document(decoder: PreTrainedModel, layout: Layout) -> Tensor:
    """Return what ``hidden_states`` does, [N, D], by a pass over a padded batch of documents.

    For architectures that ``enable`` refuses: their own code would let the documents of a packed row attend to each
    other (OPT, Bloom, MPT), or build a mask of all pairs of tokens.
    """
    states = decoder(input_ids=layout.ids[0][layout.documents], use_cache=False).last_hidden_state
    return states.flatten(0, 1)[layout.owned]


def enable(model: PreTrainedModel) -> bool:
    """Set the model's attention kernel to ``attend`` if its architecture can use it; return whether it can.

    It can if its layers look the kernel up and pass all arguments on to it (transformers'
    ``_supports_attention_backend``), and if a layer is nothing else than attention to the document, or to a window of
    it, and functions of single tokens. Where the weights have values, a small batch is computed in both ways.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    if config._attn_implementation not in ("sdpa", NAME) or not kinds <= {"full_attention", "sliding_attention"}:
        return False
    if not (type(model)._supports_attention_backend and type(model)._can_set_attn_implementation()):
        return False
    model.set_attn_implementation(NAME)
    return True


@torch.no_grad()
def agrees(decoder: PreTrainedModel, device: torch.device) -> bool:
    """Return whether the padded and the padding-free pass over a small batch with a shared prompt agree."""
    ids = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 2, 5, 0]], device=device) % decoder.config.get_text_config().vocab_size
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]], device=device).bool()
    positions = torch.arange(5, device=device).repeat(2, 1)
    layout = lay_out(ids, mask, positions)
    ours = hidden_states(decoder, layout)[layout.places][mask]
    theirs = decoder(input_ids=ids, position_ids=positions, use_cache=False).last_hidden_state[mask]
    return _close(ours, theirs)


@torch.no_grad()
def decodes_in_slots(decoder: PreTrainedModel, device: torch.device) -> bool:
    """Return whether two decode steps after two short prompts give the states of one pass over the whole rows."""
    ids = torch.tensor([[0, 1, 2, 3, 4], [0, 1, 5, 6, 0]], device=device) % decoder.config.get_text_config().vocab_size
    lengths = torch.tensor([3, 2], device=device)
    columns = torch.arange(5, device=device).repeat(2, 1)
    expected = decoder(input_ids=ids, position_ids=columns, use_cache=False).last_hidden_state
    layout, record = lay_out(ids, columns < lengths[:, None], columns), PromptStates()
    hidden_states(decoder, layout, record)
    rows = torch.arange(2, device=device)
    cache = SlotCache(2, 5, device)
    try:
        cache.fill(rows, record, layout.documents, lengths)
        for place in (lengths, lengths + 1):
            if not _close(decode(decoder, ids[rows, place], cache, 5), expected[rows, place]):
                return False
    except (AttributeError, KeyError):  # layers without a number, or that share states with another layer
        return False
    return True


def _close(ours: Tensor, theirs: Tensor) -> bool:
    ours, theirs = ours.float(), theirs.float()
    return bool((ours - theirs).abs().max() <= 2e-2 * theirs.abs().max() + 1e-3)  # loose: half precision


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, sdpa_mask)
