import gzip
import json
import subprocess
import sys
from dataclasses import replace

import pytest

from rlhf.data import Data, Mixture
from rlhf.data.encoding import encode_prompt
from rlhf.data.records import Message, Prompt
from rlhf.data.sources import find_files
from rlhf.data.testbed.world import Testbed
from rlhf.errors import UserError


def data(source, record="text", **hyperparameters):
    return Data(
        record=record, source=str(source), **{"size": None, "validation": 0.1, "max_length": 64, **hyperparameters}
    )


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


ROWS = [{"text": f"document {i}"} for i in range(50)]


def test_every_file_type_is_read(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    lines = write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.json").write_text(json.dumps(ROWS))
    (tmp_path / "c.json").write_text(json.dumps({"data": ROWS}))
    (tmp_path / "d.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "e.txt").write_text("\n".join(row["text"] for row in ROWS))
    (tmp_path / "f.txt").write_text("\n\n".join(row["text"] for row in ROWS))
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "g.parquet")
    expected = data(lines).load()
    for path in sorted(tmp_path.iterdir()):
        split = data(path).load()
        assert (split.train, split.validation) == (expected.train, expected.validation), path
        assert split.report.read == 50 and not split.report.bad
    assert data(tmp_path).load().report.read == 7 * 50
    assert data(tmp_path / "*.json").load().report.read == 100


def test_split_is_by_content_not_by_order(tmp_path):
    held_out = {text.text for text in data(write(tmp_path / "a.jsonl", ROWS)).load().validation}
    turned = data(write(tmp_path / "b.jsonl", ROWS[::-1] + [{"text": "more"}])).load()
    assert len(held_out) == 5
    assert len(held_out & {text.text for text in turned.validation}) >= 4
    assert {text.text for text in data(tmp_path / "a.jsonl", seed=1).load().validation} != held_out
    assert data(tmp_path / "a.jsonl", validation=0).load().validation == []
    assert len(data(tmp_path / "a.jsonl", validation=7).load().validation) == 7
    with pytest.raises(UserError, match="holds out all of the 50 records and leaves none to train on"):
        data(tmp_path / "a.jsonl", validation=50).load()


def test_records_with_one_prompt_stay_on_one_side(tmp_path):
    rows = [{"prompt": f"q{i % 10}", "chosen": f"c{i}", "rejected": f"r{i}"} for i in range(100)]
    split = data(write(tmp_path / "a.jsonl", rows), "comparison").load()
    sides = [{record.prompt for record in side} for side in (split.train, split.validation)]
    assert not sides[0] & sides[1] and len(split.validation) == 10


def test_bad_rows_are_named_by_file_row_and_field_and_too_many_are_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    write(path, ROWS)
    path.write_text(path.read_text() + '{"text": 5}\n{broken\n')
    report = data(path).load().report
    assert str(report.bad[0]) == "a.jsonl, row 51: text: expected a string, got int"
    assert str(report.bad[1]).startswith("a.jsonl, row 52: not JSON")
    assert "2 dropped" in str(report) and report.read == 52 and report.kept == 50
    with pytest.raises(UserError, match=r"2 of 52 rows .* a\.jsonl, row 51: text"):
        data(path, max_bad=0.01).load()


def test_ties_and_equal_texts_are_counted_separately(tmp_path):
    rows = [
        {"prompt": "q", "chosen": "a", "rejected": "a"},
        {"prompt": "q2", "chosen": "a", "rejected": "b", "grade": "tie"},
        *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(5)),
    ]
    report = data(write(tmp_path / "a.jsonl", rows), "comparison").load().report
    assert (report.ties, report.kept, report.bad) == (2, 5, [])


def test_size_limits_the_records_read(tmp_path):
    split = data(write(tmp_path / "a.jsonl", ROWS), size=20).load()
    assert len(split.train) + len(split.validation) == 20


def test_records_of_a_run_directory_are_read(tmp_path):
    rows = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b", "grade": "better"} for i in range(20)]
    write(tmp_path / "comparisons.jsonl", rows)
    (tmp_path / "status.json").write_text("{}")
    assert data(tmp_path, "comparison").load().report.kept == 20
    assert data(tmp_path, "label").load().report.kept == 40
    with pytest.raises(UserError, match="the run has no texts.jsonl"):
        find_files(str(tmp_path), "text")


@pytest.mark.parametrize("source", ["nowhere.jsonl", "./nowhere", "/a/b/c", "x/*.jsonl"])
def test_a_missing_path_is_not_taken_for_a_hub_id(source):
    with pytest.raises(UserError, match="no"):
        data(source).load()


def test_digest_follows_content_and_hyperparameters(tmp_path):
    first = data(write(tmp_path / "a.jsonl", ROWS)).digest()
    assert data(write(tmp_path / "b.jsonl", ROWS)).digest() == first
    assert data(write(tmp_path / "b.jsonl", ROWS[:-1])).digest() != first
    world = data("testbed").digest()
    assert data("testbed").digest() == world != data("testbed", testbed=Testbed(noise=0.2)).digest()


def test_tags_apply_to_records_that_have_them(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"prompt": f"p{i}"} for i in range(20)])
    assert all(prompt.unsafe for prompt in data(path, "prompt", tags=["unsafe"]).load().train)
    with pytest.raises(UserError, match="has no tags"):
        data(write(tmp_path / "b.jsonl", ROWS), tags=["unsafe"]).load()


@pytest.mark.parametrize("record", ["text", "demonstration", "comparison", "label", "prompt"])
def test_testbed_records_are_encoded(record, tokenizer):
    split = data("testbed", record, size=200, validation=50).load()
    assert len(split.train) >= 199 and len(split.validation) >= 50
    again = data("testbed", record, size=200, validation=50).load()
    assert (again.train, again.validation) == (split.train, split.validation)
    other = data("testbed", record, size=200, validation=50, seed=1).load()
    assert other.train != split.train
    rows, report = data("testbed", record).encode(tokenizer, split.train)
    assert report.kept == len(split.train) and report.dropped == report.truncated == 0
    assert max(len(row) for row in rows) <= 64


def test_records_that_do_not_fit_are_counted(tokenizer):
    split = data("testbed", "comparison", size=50).load()
    rows, report = data("testbed", "comparison", max_length=25).encode(tokenizer, split.train)
    assert report.dropped > 0 and report.kept == len(rows) == len(split.train) - report.dropped
    split = data("testbed", "demonstration", size=50).load()
    rows, report = data("testbed", "demonstration", max_length=20).encode(tokenizer, split.train)
    assert report.truncated > 0 and max(len(row) for row in rows) <= 20 and all(any(row.mask) for row in rows)


def test_mixture_follows_its_weights(tmp_path):
    left = data(write(tmp_path / "a.jsonl", [{"text": f"a{i}"} for i in range(40)]))
    right = data(write(tmp_path / "b.jsonl", [{"text": f"b{i}"} for i in range(40)]))
    mixture = Mixture({"left": left, "right": right}, {"left": 9, "right": 1}, size=100)
    split = mixture.load()
    counts = [sum(text.text.startswith(letter) for text in split.train) for letter in "ab"]
    assert counts == [90, 10] and len(split.validation) == 8
    assert mixture.load().train == split.train and mixture.digest() != left.digest()
    # As Llama 2 mixes for its safety model: all of the first part once, and one of the second to nine.
    whole = Mixture({"left": left, "right": right}, {"left": 9, "right": 1}, size=None).load()
    lefts = [text.text for text in whole.train if text.text.startswith("a")]
    assert sorted(lefts) == sorted(text.text for text in left.load().train) and len(lefts) == 36
    assert len(whole.train) - len(lefts) == 4
    with pytest.raises(UserError, match=r"data\.parts\.right: has no weight; type data\.weights\.right=1"):
        Mixture({"left": left, "right": right}, {"left": 1}, size=10)


def test_errors_of_a_part_of_a_mixture_name_the_key_of_the_part(tmp_path):
    left = data(write(tmp_path / "a.jsonl", ROWS))
    mixture = Mixture({"left": left, "right": data(tmp_path / "gone.jsonl")}, {"left": 1, "right": 1}, size=10)
    with pytest.raises(
        UserError, match=r"^data\.parts\.right\.source=.*gone.jsonl: no such file; .* or data\.parts\.right"
    ):
        mixture.load()


def test_importing_the_data_package_costs_no_torch():
    code = "import rlhf.data, sys; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("file", "record", "kept"),
    [
        ("alpaca_en_demo.json", "demonstration", 999),
        ("c4_demo.jsonl", "text", 300),
        ("wiki_demo.txt", "text", 30),
        ("tinyshakespeare.txt", "text", 7222),
        ("dpo_en_demo.json", "comparison", 200),
        ("kto_en_demo.json", "label", 150),
        ("hh_harmless.jsonl.gz", "comparison", 1500),
        ("graded_preferences.jsonl", "comparison", 876),
        ("gsm8k_train_1000.jsonl", "prompt", 1000),
        ("gsm8k_train_1000.jsonl", "demonstration", 1000),
        ("tool_use_demo_50.jsonl", "demonstration", 50),
    ],
)
def test_real_files_are_read_in_full(shared_data, file, record, kept):
    split = data(shared_data / file, record).load()
    assert split.report.kept == kept and not split.report.bad
    if file.startswith("gsm8k") and record == "prompt":
        assert all(prompt.reference for prompt in split.train)
    if file.startswith("graded"):
        assert {grade for record in split.train for *_, grade in record.pairs()} == {"negligible", "slightly", "better"}


def test_long_prompts_lose_their_oldest_turns_or_are_dropped(tokenizer):
    turns = [Message("user", "Hello."), Message("assistant", "Hello."), Message("user", "Who is Mia?")]
    short, long = Prompt(tuple(turns[2:])), Prompt((Message("user", "who " * 60),))
    lengths = [len(encode_prompt(tokenizer, messages)) for messages in (turns, turns[2:])]
    made = data("testbed", "prompt", max_length=500, max_prompt_length=lengths[0] - 1)
    kept, report = made.fit_prompts(tokenizer, [Prompt(tuple(turns), tags=("a",)), short, long])
    assert kept == [Prompt(tuple(turns[2:]), tags=("a",)), short]
    assert (report.kept, report.truncated, report.dropped, report.tokens) == (2, 1, 1, 2 * lengths[1])
    whole, report = data("testbed", "prompt", max_length=500).fit_prompts(tokenizer, [Prompt(tuple(turns)), long])
    assert len(whole) == 2 and report.truncated == report.dropped == 0
    split = replace(made.load(), train=[long])
    with pytest.raises(UserError, match="data.max_prompt_length"):
        split.fit_prompts(tokenizer)
