"""Page `rlhf inspect batch`: the batch of one training step, built by the stage's own functions."""

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import torch
from rich.text import Text
from torch import Tensor

from rlhf import console
from rlhf.data.collate import LabelBatch, PairBatch, TokenBatch, collate_prompts
from rlhf.data.records import GRADES, Prompt
from rlhf.errors import UserError
from rlhf.inspection import tokens
from rlhf.inspection.composing import Look, chosen, planned, read_examples
from rlhf.models.language_model import LanguageModel
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import Parts


def show(words: Sequence[str], step: str | None, index: int, rows: int) -> None:
    """Print the page.

    Args:
        words: The command line of a run.
        step: Step of a pipeline; None: the last.
        index: Training step, from 0.
        rows: Number of rows, or pairs, to print.

    Raises:
        UserError: A command line that could not be run, data that has not been made, a step beyond the last.
    """
    made = planned(words)
    look = Look(made.steps)
    selected = chosen(made, step)
    stage = look.stage(selected)
    batch = batch_at(stage, index)
    colour = tokens.coloured()
    model = look.policy(stage)
    screen = console.console()
    for line in lines_of(stage, model, batch, rows, colour, f"{selected.name}: batch {index}"):
        screen.print(line)


def batch_at(stage: Stage, index: int) -> Parts[Any]:
    """Return the batch of a training step, from 0, as the stage's own loader gives it to ``training_step``.

    Raises:
        UserError: The run has fewer steps.
    """
    read_examples(stage)
    if stage.produces == "model":
        loader = stage.train_dataloader()
        total = len(stage.batches)
        if index < total:
            stage.batches.start = index
            return next(iter(loader))
    else:
        loader = stage.predict_dataloader()
        total = len(loader)
        if index < total:
            return next(islice(loader, index, None))
    raise UserError(f"the run has {total} steps, 0 to {total - 1}", option="--step", value=index)


def lines_of(
    stage: Stage, model: LanguageModel, batch: Parts[Any], rows: int, colour: bool, title: str
) -> Iterator[Text]:
    """Yield the lines of the page: a title, the meaning of the marks, and the first rows or pairs."""
    if _prompts(batch):
        yield from _of_prompts(stage, model, list(batch), rows, colour, title)
        return
    shapes = ", ".join(" x ".join(map(str, _tokens(part).ids.shape)) for part in batch)
    what = "tokens of responses (a score is read at the last)" if stage.policy is None else "tokens trained on"
    counts = sum(int(_tokens(part).loss_mask.sum()) for part in batch)
    total = sum(_tokens(part).ids.numel() for part in batch)
    padding = total - sum(int(_tokens(part).attention_mask.sum()) for part in batch)
    cut = sum(int(_cut(_tokens(part), model.end_id).sum()) for part in batch if not isinstance(part, TokenBatch))
    missing = f", {cut} responses cut off (no end-of-turn)" if cut else ""
    yield Text(f"{title}: micro-batches of {shapes} (rows x tokens), {counts} {what}, {padding} padding{missing}")
    yield tokens.key(colour)
    left = rows
    for number, part in enumerate(batch):
        if left <= 0:
            break
        if len(batch) > 1:
            yield Text(f"micro-batch {number}", "bold" if colour else "")
        if isinstance(part, PairBatch):
            yield from _of_pairs(model, part, left, colour)
        elif isinstance(part, LabelBatch):
            yield from _of_labels(model, part, left, colour)
        else:
            shown = range(min(left, len(part)))
            yield from tokens.batch_lines(model.tokenizer, part, list(shown), colour)
        left -= len(part)
    whole = sum(len(part) for part in batch)
    if rows < whole:
        yield Text(f"... {whole - rows} more; type --rows {whole}")


def _of_pairs(model: LanguageModel, part: PairBatch, rows: int, colour: bool) -> Iterator[Text]:
    prompts = list(dict.fromkeys(part.prompt_index.tolist()))
    for pair in range(min(rows, len(part))):
        grade = int(part.grade[pair])
        better, worse = int(part.chosen[pair]), int(part.rejected[pair])
        facts = [f"prompt {prompts.index(int(part.prompt_index[pair]))}", f"weight {float(part.weight[pair]):.3g}"]
        facts += [f"grade {GRADES[grade]}"] if grade >= 0 else []
        if part.scores is not None:
            facts.append(f"scores {float(part.scores[better]):.3g} and {float(part.scores[worse]):.3g}")
        yield Text(f"pair {pair}: row {better} chosen, row {worse} rejected; {', '.join(facts)}")
        for name, row in (("chosen", better), ("rejected", worse)):
            numbers, shown = tokens.batch_lines(model.tokenizer, part.tokens, [row], colour)
            yield Text(f"{name}: ").append_text(numbers)
            yield shown


def _of_labels(model: LanguageModel, part: LabelBatch, rows: int, colour: bool) -> Iterator[Text]:
    for row in range(min(rows, len(part))):
        yield Text("good response" if part.desirable[row] else "bad response")
        yield from tokens.batch_lines(model.tokenizer, part.tokens, [row], colour)
    if part.mismatched is not None:
        yield Text("responses to other prompts, for the KL estimate:")
        yield from tokens.batch_lines(model.tokenizer, part.mismatched, list(range(min(rows, len(part)))), colour)


def _of_prompts(
    stage: Stage, model: LanguageModel, prompts: list[Prompt], rows: int, colour: bool, title: str
) -> Iterator[Text]:
    """Yield the lines of a batch of prompts to sample from, padded on the left as the sampler does it."""
    sampler: Any = stage.sampler
    batch = collate_prompts(sampler.check(model, prompts), model.pad_id)
    shape = " x ".join(map(str, batch.ids.shape))
    yield Text(
        f"{title}: {shape} (prompts x tokens), {sampler.samples} responses each of at most {sampler.room(model)}"
    )
    yield tokens.key(colour)
    for row in range(min(rows, len(batch))):
        if prompts[row].tags or prompts[row].reference is not None:
            yield Text(f"tags: {', '.join(prompts[row].tags) or 'none'}; reference answer: {prompts[row].reference}")
        yield from tokens.batch_lines(model.tokenizer, batch, [row], colour)
    if rows < len(batch):
        yield Text(f"... {len(batch) - rows} more; type --rows {len(batch)}")


def _cut(rows: TokenBatch, end_id: int) -> Tensor:
    """Return which responses, one per row and padded on the right, do not end with end-of-turn, [B] bool."""
    last = rows.attention_mask.sum(dim=1) - 1
    return rows.ids[torch.arange(len(rows)), last] != end_id


def _tokens(part: Any) -> TokenBatch:
    return part if isinstance(part, TokenBatch) else part.tokens


def _prompts(batch: Parts[Any]) -> bool:
    return all(isinstance(part, Prompt) for part in batch)
