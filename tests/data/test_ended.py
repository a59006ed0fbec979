"""Responses that were truncated at a length limit are never trained on as if they had ended."""

from dataclasses import replace
from itertools import pairwise

import pytest

from rlhf.data.chat_templates import TEMPLATES
from rlhf.data.data import Data
from rlhf.data.encoding import (
    encode_comparison,
    encode_dialogue,
    encode_label,
    encode_prompt,
    encode_response,
    encode_turns,
)
from rlhf.data.end_tokens import end_of_turn_id
from rlhf.data.format_detection import detect
from rlhf.data.formats import FORMATS
from rlhf.data.record_conversion import convert
from rlhf.data.records import Comparison, Demonstration, Label, Message
from rlhf.data.tokenizer import train_tokenizer

ASKED = (Message("user", "What is Mia's pet?"),)
CUT = "Mia's pet is a"


@pytest.fixture(params=["plain", "chatml", "llama2"])
def reader(request, world):
    """Yield tokenizers whose templates end a turn with a token, a token and a newline, and a space and a token."""
    found = train_tokenizer([text.text for text in world.texts(100, 0)], 400)
    found.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    found.chat_template = TEMPLATES[request.param]
    return found


def test_a_truncated_response_has_its_sampled_tokens_and_no_end(reader):
    """The ids of prompt and truncated response read as the dialogue up to the cut, without template text after it."""
    whole, cut = encode_response(reader, CUT), encode_response(reader, CUT, ended=False)
    assert whole[: len(cut)] == cut and whole[-1] == end_of_turn_id(reader) not in cut
    written = reader.decode([*encode_prompt(reader, ASKED), *cut])
    assert written.endswith("Mia's pet is a")
    assert encode_turns(reader, [Message("assistant", CUT)], ended=False) == cut
    empty = encode_response(reader, "", ended=False)
    assert not reader.decode(empty).strip()  # a reward model then reads the prompt alone, and DPO nothing


def test_only_the_last_turn_of_a_dialogue_is_truncated(reader):
    turns = (*ASKED, Message("assistant", "A dog."), Message("user", "Sure?"), Message("assistant", CUT))
    whole, cut = encode_dialogue(reader, turns), encode_dialogue(reader, turns, ended=False)
    assert cut.ids == whole.ids[: len(cut)] and cut.mask == whole.mask[: len(cut)]
    targets = [token for token, counts in zip(cut.ids, cut.mask, strict=True) if counts]
    assert targets.count(end_of_turn_id(reader)) == 1  # the first response's
    assert targets == encode_response(reader, "A dog.") + encode_response(reader, CUT, ended=False)
    data = Data("demonstration", "testbed", 1, 0, 96)
    (row,), report = data.encode(reader, [Demonstration(turns, ended=False)])
    assert (row.ids, row.mask, report.missing_eos) == (cut.ids, cut.mask, 1)
    assert "1 responses were cut off" in str(report)
    # A row that data.max_length cuts differs: its tokens stay, and its response ended.
    data.max_length = len(whole) - 1
    (row,), report = data.encode(reader, [Demonstration(turns)])
    assert row.ids == whole.ids[:-1] and report.truncated == 1 and report.missing_eos == 0


def test_comparisons_and_labels_are_encoded_by_response(reader):
    end = end_of_turn_id(reader)
    comparison = Comparison(ASKED, ("A dog.", CUT, "A"), ended=(True, False, False))
    encoded, _ = encode_comparison(reader, comparison)
    assert [response.count(end) for response in encoded.responses] == [1, 0, 0]
    for desirable in (True, False):
        label, _ = encode_label(reader, Label(ASKED, CUT, desirable, ended=False))
        assert label.response == encode_response(reader, CUT, ended=False)
    assert Data("comparison", "testbed", 1, 0, 96).encode(reader, [comparison])[1].missing_eos == 2


def test_records_without_ended_count_as_complete():
    """Records from before the field existed, and records by people, are complete; they are written unchanged."""
    demonstration = Demonstration((*ASKED, Message("assistant", "A dog.")))
    comparison = Comparison(ASKED, ("A dog.", "A"))
    label = Label(ASKED, "A dog.", True)
    for record in (demonstration, comparison, label):
        assert "ended" not in record.to_json() and type(record).from_json(record.to_json()) == record
    for record in (
        replace(demonstration, ended=False),
        replace(comparison, ended=(True, False)),
        replace(label, ended=False),
    ):
        assert type(record).from_json(record.to_json()) == record
    with pytest.raises(ValueError, match="last turn is of the user"):
        Demonstration((*demonstration.messages, *ASKED), ended=False)
    with pytest.raises(ValueError, match="3 marks in ended"):
        replace(comparison, ended=(True, False, True))


CHAT = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": CUT}]
ROWS = {
    "messages": {"messages": CHAT, "response": CUT, "ended": False},  # a line of `rlhf generate`
    "sharegpt": {"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": CUT}], "ended": False},
    "alpaca": {"instruction": "What?", "output": CUT, "ended": False},
    "prompt_completion": {"prompt": CHAT[:1], "response": CUT, "ended": False},  # a line of samples.jsonl
    "labelled": {"messages": CHAT, "label": True, "ended": False},
    "unpaired": {"prompt": "What?", "response": CUT, "desirable": True, "ended": False},
    "preference": {"prompt": "What?", "chosen": CUT, "rejected": "A dog.", "ended": [False, True]},
    "ranking": {
        "prompt": "What?",
        "responses": ["No.", CUT, "A dog."],
        "ranks": [3, 1, 2],
        "ended": [True, False, True],
    },
}


@pytest.mark.parametrize("name", ROWS)
def test_every_format_and_conversion_keeps_ended(name):
    raw = ROWS[name]
    record = FORMATS[detect(raw)](raw)
    if isinstance(record, Comparison):
        assert record.responses[0] == CUT and record.ended == (False, True, True)[: len(record.responses)]
    else:
        assert record.ended is False
    for wanted in ("demonstration", "label"):
        if wanted == "label" and isinstance(record, Demonstration):
            continue
        (best, *worse) = convert(record, wanted)
        assert best.ended is False and all(other.ended for other in worse)
    spoiled = raw | {"ended": "yes"}
    with pytest.raises(ValueError, match="ended: expected true or false"):
        FORMATS[detect(spoiled)](spoiled)


def test_labels_of_harm_are_read_from_files():
    """Labels that stage=collect writes were dropped, and each response then got its prompt's tag as label."""
    found = FORMATS["preference"]({"prompt": "q", "chosen": "a", "rejected": "b", "unsafe": [False, True]})
    assert found.unsafe == (False, True)
    ranking = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 3, 1], "unsafe": [True, False, False]}
    assert FORMATS["ranking"](ranking).unsafe == (False, True, False)
    with pytest.raises(ValueError, match="unsafe: 1 for 2 responses"):
        FORMATS["preference"]({"prompt": "q", "chosen": "a", "rejected": "b", "unsafe": [True]})


def test_testbed_comparisons_store_the_noisy_scores(world):
    """Whoever ranks with an error stores the scores with it: order, grades and scores say the same of every pair."""
    from rlhf.data.testbed.gold import gold
    from rlhf.data.testbed.world import Testbed, grade_gap

    for comparison in Testbed(noise=0.3, responses=3).comparisons(60, 0):
        assert all(better > worse for better, worse in pairwise(comparison.scores))
        gaps = [a - b for i, a in enumerate(comparison.scores) for b in comparison.scores[i + 1 :]]
        assert comparison.grades == tuple(map(grade_gap, gaps))
    (comparison, *_) = Testbed(noise=0.3).comparisons(1, 0)
    (exact, *_) = Testbed(noise=0.0).comparisons(1, 0)
    prompt = world.prompts(1, 0)[0]
    true = [
        gold(replace(prompt, messages=comparison.prompt, tags=comparison.tags), x).total for x in comparison.responses
    ]
    assert not set(true) & set(comparison.scores) and exact.scores != comparison.scores
