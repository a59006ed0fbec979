"""Mask of every chat format, with a real tokenizer: exactly the decoded response and its end of turn."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlhf.data.chat_templates import TEMPLATES
from rlhf.data.collate import collate
from rlhf.data.data import Data
from rlhf.data.encoded_rows import Encoded
from rlhf.data.encoding import encode_dialogue, encode_prompt, encode_response
from rlhf.data.end_tokens import end_of_turn_id
from rlhf.data.records import Comparison, Demonstration, Message
from rlhf.data.template_check import check_template
from rlhf.errors import UserError
from rlhf.models.causal_lm import CausalLM
from tests import smollm2

pytestmark = pytest.mark.slow  # the first use on a machine converts the GGUF file

SYSTEM = Message("system", "Answer in\n\none line.")
ONE = [Message("user", "Where does Mia live?"), Message("assistant", "In Rome: naïve 中文 🙂, 12345.")]
MORE = [Message("user", "And  Tom?"), Message("assistant", "Tom lives in\n\n- Paris, or\n- Oslo.")]
TOOL = [Message("user", "3+4?"), Message("assistant", "<tool_call>\n{}\n</tool_call>"), Message("tool", "7")]
DIALOGUES = {
    "one turn": ONE,
    "one turn, system": [SYSTEM, *ONE],
    "several turns": [*ONE, *MORE],
    "several turns, system": [SYSTEM, *ONE, *MORE],
    "a tool": [SYSTEM, *TOOL, Message("assistant", "It is 7.")],
}
# The text before and after a response, the end-of-turn token included. SmolLM2's eos is <|im_end|>.
FRAMES = {
    "own": ("<|im_start|>assistant\n", "", "<|im_end|>"),
    "chatml": ("<|im_start|>assistant\n", "", "<|im_end|>"),
    "zephyr": ("<|assistant|>\n", "", "<|im_end|>"),
    "llama2": (" [/INST]", " ", " <|im_end|>"),
    "llama3": ("<|start_header_id|>assistant<|end_header_id|>\n\n", "", "<|eot_id|>"),
    "plain": ("<|assistant|>", "", "<|end|>"),
}
# The first dialogue with a system message, written by hand from the publications that the templates name.
WRITTEN = {
    "own": "<|im_start|>system\nAnswer in\n\none line.<|im_end|>\n<|im_start|>user\nWhere does Mia live?<|im_end|>\n"
    "<|im_start|>assistant\nIn Rome: naïve 中文 🙂, 12345.<|im_end|>",
    "zephyr": "<|system|>\nAnswer in\n\none line.<|im_end|>\n<|user|>\nWhere does Mia live?<|im_end|>\n"
    "<|assistant|>\nIn Rome: naïve 中文 🙂, 12345.<|im_end|>",
    "llama2": "<|im_start|>[INST] <<SYS>>\nAnswer in\n\none line.\n<</SYS>>\n\nWhere does Mia live? [/INST] "
    "In Rome: naïve 中文 🙂, 12345. <|im_end|>",
    "llama3": "<|im_start|><|start_header_id|>system<|end_header_id|>\n\nAnswer in\n\none line.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nWhere does Mia live?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nIn Rome: naïve 中文 🙂, 12345.<|eot_id|>",
    "plain": "<|system|>Answer in\n\none line.<|end|><|user|>Where does Mia live?<|end|>"
    "<|assistant|>In Rome: naïve 中文 🙂, 12345.<|end|>",
}
WRITTEN["chatml"] = WRITTEN["own"]


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, Any]:
    """Return SmolLM2's tokenizer with each template, as a run would have it."""
    place = smollm2.folder()
    chosen = {name: None if name == "own" else name for name in FRAMES}
    return {key: CausalLM(place, None, None, chat_template=name).load_tokenizer() for key, name in chosen.items()}


@pytest.fixture
def tokenizer(tokenizers: dict[str, Any], name: str) -> Any:
    return tokenizers[name]


def spans(tokenizer: Any, encoded: Encoded) -> list[str]:
    """Return the decoded text of every contiguous span of target tokens."""
    found: list[list[int]] = []
    before = False
    for index, counts in zip(encoded.ids, encoded.mask, strict=True):
        if counts and not before:
            found.append([])
        if counts:
            found[-1].append(index)
        before = counts
    return [tokenizer.decode(ids) for ids in found]


def test_every_named_template_is_tested() -> None:
    assert set(FRAMES) == {*TEMPLATES, "own"} == set(WRITTEN)


@pytest.mark.parametrize("turns", DIALOGUES)
@pytest.mark.parametrize("name", FRAMES)
def test_the_mask_covers_every_response_and_its_end_of_turn(tokenizer: Any, name: str, turns: str) -> None:
    dialogue = DIALOGUES[turns]
    check_template(tokenizer, dialogue)
    encoded = encode_dialogue(tokenizer, dialogue)
    before, start, end = FRAMES[name]
    responses = [message.content for message in dialogue if message.role == "assistant"]
    assert spans(tokenizer, encoded) == [f"{start}{response}{end}" for response in responses]
    text = tokenizer.decode(encoded.ids)
    assert all(f"{before}{start}{response}{end}" in text for response in responses)
    assert all(message.content in text for message in dialogue)
    # Trained tokens are sampled tokens: the prompt's first, then the response's.
    last = encode_response(tokenizer, responses[-1])
    assert encoded.ids == encode_prompt(tokenizer, dialogue[:-1]) + last


@pytest.mark.parametrize("name", FRAMES)
def test_rendered_text_equals_the_published_format(tokenizer: Any, name: str) -> None:
    assert tokenizer.decode(encode_dialogue(tokenizer, DIALOGUES["one turn, system"]).ids) == WRITTEN[name]


@pytest.mark.parametrize("name", ["own"])
def test_padding_with_the_end_of_turn_keeps_every_target(tokenizer: Any) -> None:
    """The published tokenizer pads with its end of turn. Masks are computed by position, so this is correct."""
    raw = AutoTokenizer.from_pretrained(smollm2.folder())
    end = end_of_turn_id(raw)
    assert raw.pad_token_id == raw.eos_token_id == end != tokenizer.pad_token_id
    rows = [encode_dialogue(raw, dialogue) for dialogue in (ONE, [*ONE, *MORE])]
    for pad in (end, tokenizer.pad_token_id):
        batch = collate(rows, pad)
        for row, encoded in enumerate(rows):
            assert batch.attention_mask[row].sum() == len(encoded)
            assert batch.ids[row][batch.loss_mask[row]].tolist() == [
                index for index, counts in zip(encoded.ids, encoded.mask, strict=True) if counts
            ]
            assert batch.ids[row][batch.loss_mask[row]].tolist().count(end) == (1, 2)[row]


# -- against other implementations -----------------------------------------------------------------------------------

TAG = "{{% generation %}}{}{{% endgeneration %}}"
MARKED = {  # the same formats again, with the tags that mark the assistant's tokens for transformers
    "own": "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a helpful AI "
    "assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}{{ '<|im_start|>' + m.role + '\\n' }}"
    "{% if m.role == 'assistant' %}" + TAG.format("{{ m.content + '<|im_end|>' }}") + "{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}",
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    + TAG.format("{{ m.content + '<|im_end|>' }}")
    + "{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}",
    "zephyr": "{% for m in messages %}{{ '<|' + m.role + '|>\\n' }}{% if m.role == 'assistant' %}"
    + TAG.format("{{ m.content + eos_token }}")
    + "{% else %}{{ m.content + eos_token }}{% endif %}{{ '\\n' }}{% endfor %}",
}


def marked_by_transformers(tokenizer: Any, text: str, dialogue: list[Message]) -> tuple[list[int], list[bool]]:
    found = tokenizer.apply_chat_template(
        [message.to_json() for message in dialogue],
        chat_template=text,
        tokenize=True,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    return list(found["input_ids"]), [bool(counts) for counts in found["assistant_masks"]]


def same(tokenizer: Any, encoded: Encoded, ids: list[int], mask: list[bool]) -> None:
    """Equal, but for the white space that a template writes after an end of turn: here it is no target."""
    length, end = len(encoded), end_of_turn_id(tokenizer)
    assert encoded.ids == ids[:length] and not tokenizer.decode(ids[length:]).strip()
    for place in range(1, len(ids)):
        if mask[place] and not tokenizer.decode(ids[place]).strip() and ids[place - 1] == end:
            mask[place] = False
    assert encoded.mask == mask[:length]


@pytest.mark.parametrize("turns", ["one turn", "one turn, system", "several turns", "several turns, system"])
@pytest.mark.parametrize("name", MARKED)
def test_masks_equal_those_of_transformers(tokenizer: Any, name: str, turns: str) -> None:
    ids, mask = marked_by_transformers(tokenizer, MARKED[name], DIALOGUES[turns])
    same(tokenizer, encode_dialogue(tokenizer, DIALOGUES[turns]), ids, mask)


def published(name: str) -> str:
    """Return a chat template as a model's authors published it, from TRL's collection."""
    folder = Path(pytest.importorskip("trl").__file__).parent / "chat_templates"
    return (folder / f"{name}.jinja").read_text()


@cache
def published_tokenizer() -> Any:
    """Return SmolLM2's tokenizer as it was published, which takes a second to load."""
    return AutoTokenizer.from_pretrained(smollm2.folder())


def with_tokens_of(text: str) -> Any:
    """Return that tokenizer with the special tokens of a template of another family."""
    tokenizer = published_tokenizer()
    names = set(re.findall(r"<\|[A-Za-z_]+\|>|<(?:start|end)_of_turn>", text)) - set(tokenizer.get_vocab())
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(names)}, replace_extra_special_tokens=False)
    tokenizer.chat_template = text
    return tokenizer


@pytest.mark.parametrize("name", ["gemma3", "qwen3_instruct_2507", "lfm2"])
def test_masks_of_published_templates_equal_those_of_trl(name: str) -> None:
    tokenizer = with_tokens_of(published(name))
    for dialogue in (DIALOGUES["one turn"], DIALOGUES["several turns, system"]):
        check_template(tokenizer, dialogue)
        ids, mask = marked_by_transformers(tokenizer, published(f"{name}_training"), dialogue)
        same(tokenizer, encode_dialogue(tokenizer, dialogue), ids, mask)


def test_the_llama3_template_equals_the_published_one() -> None:
    tokenizer = with_tokens_of(published("llama3"))
    rows = [encode_dialogue(tokenizer, dialogue) for dialogue in (ONE, [SYSTEM, *ONE, *MORE])]
    assert spans(tokenizer, rows[1]) == [f"{response.content}<|eot_id|>" for response in (ONE[1], MORE[1])]
    tokenizer.chat_template = TEMPLATES["llama3"]
    assert [encode_dialogue(tokenizer, dialogue) for dialogue in (ONE, [SYSTEM, *ONE, *MORE])] == rows


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("qwen3", "rewrites earlier turns"),  # it removes the thoughts from all turns but the last
        ("gptoss", r"does not end every assistant turn with <\|return\|>"),  # only the last has thoughts
        (
            "deepseek_r1_distill",
            "begins an assistant turn with other text than its generation prompt",
        ),  # it adds <think>
        ("glm4moe", "ends an assistant turn without a special token"),
        ("smolvlm", "does not render the content of user turns"),  # it writes only typed parts
    ],
)
def test_published_templates_that_cannot_be_trained_with_are_refused(name: str, message: str) -> None:
    tokenizer = with_tokens_of(published(name))
    with pytest.raises(UserError, match=message) as caught:
        check_template(tokenizer, [*ONE, *MORE])
    assert "\n" not in str(caught.value) and "model.chat_template=chatml" in str(caught.value)


# -- real files -----------------------------------------------------------------------------------------------------

FILES = {
    "alpaca_en_demo.json": "demonstration",
    "tool_use_demo_50.jsonl": "demonstration",  # system messages, typed parts, tool calls, tool results
    "gsm8k_train_1000.jsonl": "demonstration",
    "dpo_en_demo.json": "comparison",  # several turns
    "hh_harmless.jsonl.gz": "comparison",
    "kto_en_demo.json": "label",
}


@pytest.mark.parametrize("name", ["own", "chatml", "zephyr", "llama2"])
@pytest.mark.parametrize("file", FILES)
def test_masks_of_real_dialogues(tokenizer: Any, name: str, file: str, shared_data: Path) -> None:
    """In every dialogue the responses are trained, whole and with their end; no token of users and tools is."""
    data = Data(FILES[file], str(shared_data / file), 40, 0, 4096)  # type: ignore[arg-type]
    split = data.load()
    rows, report = split.encode(tokenizer, "train")
    assert report.kept == len(split.train) and not report.refused and not report.dropped
    end = FRAMES[name][2].strip()
    for record, row in zip(split.train, rows, strict=True):
        if isinstance(record, Demonstration):
            found = spans(tokenizer, row)
            said = [message.content for message in record.messages if message.role == "assistant"]
        else:
            responses = row.responses if isinstance(record, Comparison) else [row.response]
            found = [tokenizer.decode(response) for response in responses]
            said = list(record.responses) if isinstance(record, Comparison) else [record.response]
            prompt = tokenizer.decode(row.prompt)
            assert all(message.content.strip() in prompt for message in record.prompt)
        assert all(text.endswith(end) for text in found)
        assert [text.removesuffix(end).strip() for text in found] == [text.strip() for text in said]
    if file.startswith("tool_use"):
        roles = {message.role for record in split.train for message in record.messages}
        assert roles == {"system", "user", "assistant", "tool"}
        responses = "".join(text for row in rows for text in spans(tokenizer, row))
        assert "<think>" in responses and "<tool_call>" in responses
