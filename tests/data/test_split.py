"""Held-out split: whole prompts, as close to the requested number as they allow."""

import itertools
import json

import pytest

from rlhf.data.data import Data
from rlhf.data.held_out import nearest_groups, prompt_key
from rlhf.data.records import prompt_text
from rlhf.data.split import load_split
from rlhf.errors import UserError

SAME = "equal prompts stay on one side"


def load(tmp_path, *sizes, record="demonstration", **hyperparameters):
    """Load records of as many prompts as there are sizes, each with that many responses, interleaved."""
    rows = [{"prompt": f"Prompt {p}", "completion": f"Answer {n}"} for p, size in enumerate(sizes) for n in range(size)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sorted(rows, key=lambda row: row["completion"])))
    return Data(record, str(path), **{"size": None, "validation": 0.1, "max_length": 64} | hyperparameters).load()


def test_a_rare_prompt_is_held_out_before_a_common_one(tmp_path):
    split = load(tmp_path, 54, 6)
    assert (len(split.train), len(split.validation), split.report.split) == (54, 6, "")
    assert {prompt_text(record) for record in split.validation} == {"Prompt 1"}


@pytest.mark.parametrize(
    ("sizes", "validation", "held_out", "line"),
    [
        ((60,), 0.1, 0, "none held out: all 60 records have the same prompt, and equal prompts stay on one side"),
        ((60,), 6, 0, "none held out: all 60 records have the same prompt, and equal prompts stay on one side"),
        ((1,), 0.1, 0, "none held out: the only record is trained on"),
        (
            (20, 20, 20),
            0.1,
            0,
            f"0 held out where 6 were requested: {SAME}, and the 3 prompts have 20 records each; "
            "type data.validation=20 to hold out one prompt",
        ),
        ((20, 20, 20), 20, 20, ""),
        (
            (54, 6),
            0.5,
            6,
            f"6 held out where 30 were requested: {SAME}, and the 2 prompts have 6 to 54 records each",
        ),
        ((4,) * 5, 0.15, 4, f"4 held out where 3 were requested: {SAME}, and the 5 prompts have 4 records each"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("streaming", [False, True])
def test_the_split_of_equal_prompts_is_reported(tmp_path, sizes, validation, held_out, line, streaming):
    split = load(tmp_path, *sizes, validation=validation, streaming=streaming)
    assert (len(split.train), len(split.validation)) == (sum(sizes) - held_out, held_out)
    assert split.report.split == line and (not line or line in str(split.report))
    assert {prompt_text(record) for record in split.train}.isdisjoint(
        prompt_text(record) for record in split.validation
    )


def test_nearest_groups_is_the_best_choice_of_whole_prompts():
    """Compared with all choices of groups; never everything, and the smaller of two that are equally close."""
    for sizes in itertools.product((1, 2, 5, 9), repeat=4):
        sums = {sum(part) for count in range(4) for part in itertools.combinations(sizes, count)}
        for wanted in range(1, sum(sizes)):
            found = sum(sizes[place] for place in nearest_groups(sizes, wanted))
            assert found == min(sums, key=lambda one: (abs(one - wanted), one)), (sizes, wanted)


def test_distinct_prompts_are_held_out_by_hash_alone(tmp_path):
    """The prompts with the smallest hashes, exactly as many as requested; one prompt more moves at most one other."""
    split = load(tmp_path, *[1] * 50, validation=7)
    by_hash = sorted([*split.train, *split.validation], key=lambda record: prompt_key(record, split.data.seed))
    assert {prompt_text(r) for r in split.validation} == {prompt_text(r) for r in by_hash[:7]}
    assert split.report.split == ""
    more = load(tmp_path, *[1] * 51, validation=7)
    assert len({prompt_text(r) for r in split.validation} & {prompt_text(r) for r in more.validation}) >= 6


@pytest.mark.parametrize(("sizes", "fix"), [((1,), "data.validation=0,"), ((30,), "data.validation=0.1,")])
def test_holding_out_every_record_is_refused_with_a_valid_number(tmp_path, sizes, fix):
    with pytest.raises(UserError, match=f"holds out all of .* and leaves none to train on; type {fix}"):
        load(tmp_path, *sizes, validation=sum(sizes))


@pytest.mark.parametrize("validation", [0, 3, 0.25])
def test_size_includes_the_held_out_records_of_a_file(tmp_path, validation):
    """Held-out records are among the `size` records, as conf/data documents; of the testbed, `size` are trained on."""
    split = load(tmp_path, *[1] * 30, size=12, validation=validation)
    held_out = {0: 0, 3: 3, 0.25: 3}[validation]
    assert (split.report.kept, len(split.train), len(split.validation)) == (12, 12 - held_out, held_out)
    made = Data("demonstration", "testbed", 12, 3, 64).load()
    assert (len(made.train), len(made.validation)) == (12, 3)
    # the two labels of a comparison count as two
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text("".join(json.dumps({"prompt": f"Q{n}", "chosen": "a", "rejected": "b"}) + "\n" for n in range(9)))
    assert Data("label", str(pairs), 5, 0, 64).load().report.kept == 5


@pytest.mark.parametrize("group", ["data", "text", "demonstrations"])
def test_errors_name_the_group_of_the_data(tmp_path, tokenizer, group):
    """Errors of loading, and later those of a stage that encodes, name the group and not the class's own name of it."""
    with pytest.raises(UserError, match=rf"^{group}\.source=none\.jsonl: "):
        load_split(Data("demonstration", "none.jsonl", None, 0.1, 64), group)
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"Prompt {n}", "completion": "Yes"}) + "\n" for n in range(4)))
    read = load_split(Data("prompt", str(path), None, 0, 64, max_prompt_length=1), group)
    with pytest.raises(UserError, match=rf"^{group}\.max_prompt_length=1: .* larger {group}\.max_prompt_length$"):
        read.fit_prompts(tokenizer)
    read = load_split(Data("demonstration", str(path), None, 0, 2), group)
    with pytest.raises(UserError, match=rf"^{group}\.max_length=2: .* type a larger {group}\.max_length$"):
        read.encode(tokenizer, "train")
    own, tokenizer.chat_template = tokenizer.chat_template, "{{ raise_exception('no') }}"
    try:
        with pytest.raises(UserError, match=rf"^{group}\.source=.*raise {group}\.max_bad "):
            read.data.max_bad = 0.0
            read.encode(tokenizer, "train")
    finally:
        tokenizer.chat_template = own
