"""Readable rows of tokens that show which are trained, context or padding, by colour or by marks."""

from collections.abc import Iterator, Sequence
from itertools import groupby

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rlhf import console
from rlhf.data.collate import TokenBatch

BETWEEN = "¦"  # between two tokens
NEXT_DOCUMENT = " // "  # between two documents of a packed row
STYLES = {"trained": "bold green", "context": "", "padding": "dim"}


def key(colour: bool) -> Text:
    """Return the legend of the marks."""
    if colour:
        words = [Text("trained", STYLES["trained"]), Text("context"), Text("padding", STYLES["padding"])]
        return Text("tokens: ").append_text(Text(", ").join(words)).append(f"; {BETWEEN} between tokens")
    return Text(f"tokens: [trained], context, (padding); {BETWEEN} between tokens")


def batch_lines(
    tokenizer: PreTrainedTokenizerBase, batch: TokenBatch, rows: Sequence[int], colour: bool
) -> Iterator[Text]:
    """Yield two lines for each row of a batch: its numbers, and its tokens."""
    for row in rows:
        columns = (batch.ids[row], batch.attention_mask[row], batch.loss_mask[row], batch.position_ids[row])
        ids, present, trained, positions = (column.tolist() for column in columns)
        shown = [position for position, there in zip(positions, present, strict=True) if there]
        documents = list(segments(shown))
        ranges = " | ".join(f"{first}-{last}" for first, last in documents)
        yield Text(
            f"row {row}: {sum(present)} tokens, {sum(trained)} trained, {len(ids) - sum(present)} padding; "
            + (f"{len(documents)} documents, " if len(documents) > 1 else "")
            + f"positions {ranges}",
            "bold" if colour else "",
        )
        yield row_text(tokenizer, ids, present, trained, positions, colour)


def segments(positions: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Yield (first, last position) of each document of a row; a document starts where positions restart."""
    start = 0
    for index in range(1, len(positions) + 1):
        if index == len(positions) or positions[index] != positions[index - 1] + 1:
            if positions:
                yield positions[start], positions[index - 1]
            start = index


def row_text(
    tokenizer: PreTrainedTokenizerBase,
    ids: Sequence[int],
    present: Sequence[bool],
    trained: Sequence[bool],
    positions: Sequence[int] | None,
    colour: bool,
) -> Text:
    """Return the tokens of one row as text; padding is counted, not printed token by token."""
    kinds = [
        "padding" if not there else "trained" if counts else "context"
        for there, counts in zip(present, trained, strict=True)
    ]
    starts = {
        index
        for index in range(1, len(ids))
        if positions is not None
        and present[index]
        and present[index - 1]
        and positions[index] != positions[index - 1] + 1
    }
    text = Text()
    for (kind, _), group in groupby(
        enumerate(kinds), key=lambda pair: (pair[1], sum(start <= pair[0] for start in starts))
    ):
        places = [index for index, _ in group]
        if places[0] in starts:
            text.append(NEXT_DOCUMENT, "bold" if colour else "")
        elif places[0]:
            text.append(BETWEEN, "dim" if colour else "")
        if kind == "padding":
            words = f"{token(tokenizer, ids[places[0]])} x {len(places)}"
        else:
            words = BETWEEN.join(token(tokenizer, ids[index]) for index in places)
        around = {"trained": "[]", "padding": "()", "context": ("", "")}[kind] if not colour else ("", "")
        text.append(f"{around[0]}{words}{around[1]}", STYLES[kind] if colour else "")
    return text


def token(tokenizer: PreTrainedTokenizerBase, index: int) -> str:
    """Return one token as text on one line."""
    piece, name = tokenizer.decode([index]), tokenizer.convert_ids_to_tokens(index)
    if isinstance(name, str) and name.startswith("\u2581") and not piece.startswith(" "):
        piece = f" {piece}"  # SentencePiece drops the space of the first word
    return piece.replace("\\", "\\\\").replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t")


def coloured() -> bool:
    """Return whether the terminal shows colours."""
    return console.console().is_terminal and not console.console().no_color
