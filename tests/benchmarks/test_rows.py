"""Rows: the same tokens for both sides, from the tokenizers and collators of both."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks import models
from benchmarks.cases import CASES
from benchmarks.ours import rows_of
from benchmarks.rows import ALPACA, DATA, HH, build_rows
from rlhf.data.collate import collate, collate_comparisons
from rlhf.data.encoded_rows import Encoded, EncodedComparison

NOWHERE = Path("no such directory")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(models.tokenizer_folder(models.TINY_VOCABULARY))


def test_a_filled_vocabulary_encodes_as_before(tokenizer):
    filled = models.fill_vocabulary(tokenizer, 700)
    assert len(filled) == 700 and len(tokenizer) == 512
    messages = [{"role": "user", "content": "What is ice made of?"}]
    for text in ("What is two plus two?", filled.apply_chat_template(messages, tokenize=False)):
        assert filled(text)["input_ids"] == tokenizer(text)["input_ids"]
    assert (filled.pad_token_id, filled.eos_token_id) == (tokenizer.pad_token_id, tokenizer.eos_token_id)


def tiny(name):
    return CASES[name].fitted(128)


def test_lengths_fit_the_context():
    for case in CASES.values():
        fitted = case.fitted(128)
        assert fitted.length <= 128 and fitted.prompt + fitted.response <= 128


def test_dialogues_have_lengths_in_equal_steps(tokenizer):
    rows, source = build_rows(tiny("sft"), tokenizer, NOWHERE)
    assert source == "random"
    assert [len(row["ids"]) for row in rows] == [16, 32, 48, 64, 80, 96, 112, 128]
    assert all(len(row["ids"]) == len(row["mask"]) for row in rows)
    assert build_rows(tiny("sft"), tokenizer, NOWHERE)[0] == rows


def test_prompts_are_tokens_of_the_chat_template(tokenizer):
    rows, source = build_rows(tiny("grpo"), tokenizer, NOWHERE)
    assert source == "testbed" and len(rows) == 4
    for row in rows:
        text = tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == row["ids"]
        assert 0.8 * tiny("grpo").prompt < len(row["ids"]) <= tiny("grpo").prompt


@pytest.mark.skipif(not (DATA / HH).is_file() or not (DATA / ALPACA).is_file(), reason=f"{DATA} has no real data")
@pytest.mark.parametrize("name", ["sft", "dpo", "grpo"])
def test_real_rows_fit_and_have_targets(tokenizer, name):
    case = CASES[name]
    rows, source = build_rows(case, tokenizer)
    assert source in (ALPACA, HH) and len(rows) == case.batch
    if name == "sft":
        assert [len(row["ids"]) for row in rows] == [64 * (index + 1) for index in range(8)]
        assert all(sum(row["mask"]) >= len(row["ids"]) // 4 for row in rows)
    if name == "dpo":
        lengths = [len(row["prompt"]) + max(len(row["chosen"]), len(row["rejected"])) for row in rows]
        assert lengths == sorted(lengths) and lengths[-1] <= case.length


def test_collators_of_both_sides_give_the_same_pairs(tokenizer):
    pytest.importorskip("trl", reason="TRL is the peer: pip install 'rlhf[dev]'")
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    from benchmarks.trl_side import attended

    rows, _ = build_rows(tiny("dpo"), tokenizer, NOWHERE)
    named = [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in rows]
    theirs = DataCollatorForPreference(pad_token_id=0)(named)
    ours = collate_comparisons(
        [EncodedComparison(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1, None)]) for row in rows], 0
    )
    assert sorted(rows_of(ours, None)) == sorted(attended(theirs["input_ids"], theirs["attention_mask"]))


def test_collators_of_both_sides_give_the_same_targets(tokenizer):
    pytest.importorskip("trl", reason="TRL is the peer: pip install 'rlhf[dev]'")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    rows, _ = build_rows(replace(tiny("sft"), batch=3), tokenizer, NOWHERE)
    labels = [[i if kept else -100 for i, kept in zip(row["ids"], row["mask"], strict=True)] for row in rows]
    theirs = DataCollatorForLanguageModeling(pad_token_id=0)(
        [{"input_ids": row["ids"], "labels": label} for row, label in zip(rows, labels, strict=True)]
    )
    ours = collate([Encoded(row["ids"], row["mask"]) for row in rows], 0)
    assert (theirs["input_ids"] == ours.ids).all()
    assert ((theirs["labels"] != -100) == ours.loss_mask).all()
