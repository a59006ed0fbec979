"""`inspect batch` shows exactly the batch that training reads, and its marks are the batch's masks."""

import re
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf

from rlhf.data.collate import TokenBatch, collate, pack
from rlhf.data.encoded_rows import Encoded
from rlhf.errors import UserError
from rlhf.inspection import tokens
from rlhf.inspection.batch_page import batch_at, lines_of
from rlhf.inspection.composing import Look
from rlhf.running.build import build_stage
from rlhf.stage.base import Stage
from rlhf.stage.batch_order import Parts
from rlhf.testing import tiny_model
from tests.inspection.conftest import SMALL
from tests.stages.conftest import fit


class Enough(Exception):
    """Exception that stops training at the watched step."""


def trained_batch(look: Look, index: int) -> Parts[Any]:
    """Return the batch that reaches ``training_step`` at that step of a real training of the last step of a plan."""
    step = look.steps[-1]
    stage = build_stage(OmegaConf.create(step.config), step.folder)
    seen: dict[int, Parts[Any]] = {}
    own = stage.training_step

    def watch(batch: Parts[Any], batch_idx: int) -> None:
        seen[batch_idx] = batch
        own(batch, batch_idx)
        if batch_idx == index:
            raise Enough

    stage.training_step = watch
    with pytest.raises(Enough):
        fit(stage, step.folder, limit_val_batches=0)
    return seen[index]


def same(left: Any, right: Any, ignore: tuple[str, ...] = ()) -> None:
    """Assert that two batches are equal, tensor by tensor."""
    for field in fields(left):
        a, b = getattr(left, field.name), getattr(right, field.name)
        if isinstance(a, TokenBatch):
            same(a, b)
        elif field.name not in ignore:
            assert (a is None and b is None) or torch.equal(a, b), field.name


@pytest.mark.parametrize(
    "words",
    [
        ["stage=sft", "stage.micro_batch_size=3", "stage.epochs=2"],
        ["stage=sft", "stage.packing=64", "stage.batch_size=2"],
        ["stage=reward_model"],
        ["stage=dpo", "inputs.policy=MODEL"],
    ],
    ids=["padded", "packed", "pairs", "with a reference"],
)
def test_the_batch_shown_is_the_batch_trained_on(looked: Callable[..., Look], words: list[str], tmp_path: Any) -> None:
    if "inputs.policy=MODEL" in words:
        tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "model")
        words = [word.replace("MODEL", str(tmp_path / "model")) for word in words]
    look = looked(*SMALL, *words)
    shown, trained = batch_at(look.stage(look.steps[-1]), 2), trained_batch(look, 2)
    assert len(shown) == len(trained) > 0
    for left, right in zip(shown, trained, strict=True):
        # The reference's log-probabilities need weights.
        same(left, right, ignore=("reference",))


def test_the_prompts_shown_are_those_of_the_rollout(looked: Callable[..., Look], tmp_path: Any) -> None:
    tiny_model(("Where does Amy live?", "Amy lives in Bath.")).save(tmp_path / "model")
    words = ["stage=grpo", f"inputs.policy={tmp_path / 'model'}", "reward=gold", "sampler.samples=2"]
    look = looked(*SMALL, *words, "sampler.max_new_tokens=4", "data.max_length=96")
    shown, trained = batch_at(look.stage(look.steps[-1]), 1), trained_batch(look, 1)
    assert list(shown) == list(trained)


def test_a_step_beyond_the_last_is_refused(looked: Callable[..., Look]) -> None:
    look = looked("stage=sft", *SMALL)
    with pytest.raises(UserError, match="--step 99: the run has 6 steps, 0 to 5"):
        batch_at(look.stage(look.steps[-1]), 99)


def test_without_colour_brackets_mark_trained_tokens() -> None:
    model = tiny_model()
    rows = pack([Encoded([10, 11, 12], [False, True, True]), Encoded([13, 14], [True, True])], 8)
    batch = collate([*rows, Encoded([15], [False])], pad_id=model.pad_id)
    lines = [line.plain for line in tokens.batch_lines(model.tokenizer, batch, [0, 1], colour=False)]
    words = [tokens.token(model.tokenizer, index) for index in (10, 11, 12, 13, 14, 15)]
    assert lines[0] == "row 0: 5 tokens, 3 trained, 0 padding; 2 documents, positions 0-2 | 0-1"
    # The first token of a document has no predecessor and is never trained, whatever its mask is.
    assert lines[1] == f"{words[0]}¦[{words[1]}¦{words[2]}] // {words[3]}¦[{words[4]}]"
    assert lines[2] == "row 1: 1 tokens, 0 trained, 4 padding; positions 0-0"
    assert lines[3] == f"{words[5]}¦(<|pad|> x 4)"


def test_in_colour_the_text_has_no_brackets() -> None:
    model = tiny_model()
    batch = collate([Encoded([10, 11, 12], [False, True, False])], pad_id=model.pad_id)
    plain, coloured = (
        list(tokens.batch_lines(model.tokenizer, batch, [0], colour=colour))[1] for colour in (False, True)
    )
    assert re.sub(r"[\[\]]", "", plain.plain) == coloured.plain
    trained = [span for span in coloured.spans if span.style == tokens.STYLES["trained"]]
    assert [coloured.plain[span.start : span.end] for span in trained] == [tokens.token(model.tokenizer, 11)]


def test_pairs_show_both_sides_and_their_grade(looked: Callable[..., Look]) -> None:
    look = looked("stage=reward_model", *SMALL)
    stage: Stage = look.stage(look.steps[-1])
    batch = batch_at(stage, 0)
    page = [line.plain for line in lines_of(stage, look.policy(stage), batch, 1, False, "")]
    grade = ["negligible", "slightly", "better", "significantly"][int(batch.parts[0].grade[0])]
    assert f"grade {grade}" in page[2]
    assert page[3].startswith("chosen: row 0") and page[5].startswith("rejected: row 1")
