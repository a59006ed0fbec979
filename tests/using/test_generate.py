"""Responses to files of prompts: independent of the batch size, interruptions and the input format."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from rlhf.data.collate import TokenBatch
from rlhf.data.encoding import encode_dialogue, encode_prompt
from rlhf.data.records import Message, Prompt
from rlhf.evaluation.compare import load_policy
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.generation import SeededSampler, generate_batches, stream
from rlhf.using.given_data import load_prompts

Typed = Callable[..., tuple[int, str]]
QUESTIONS = ["What is two plus two?", "Hello", "Two plus two is", "Who?", "What is four, and why?"]


@pytest.fixture(scope="module")
def model(outputs: Path) -> LanguageModel:
    return load_policy(outputs / "sft" / "none0" / "model")


def asked() -> list[Prompt]:
    return [Prompt((Message("user", question),)) for question in QUESTIONS]


def responses(model: LanguageModel, temperature: float, batch_size: int, samples: int = 2, start: int = 0) -> list[str]:
    sampler = SeededSampler(16, temperature, samples=samples, batch_size=batch_size)
    return [text for part in generate_batches(model, asked(), sampler, 7, start) for text in part.texts]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_the_batch_size_does_not_change_a_response(model: LanguageModel, temperature: float) -> None:
    whole = responses(model, temperature, batch_size=64)
    assert len(set(whole)) > 1
    for size in (1, 2, 6):
        assert responses(model, temperature, size) == whole
    assert responses(model, temperature, 2, start=3) == whole[6:]
    assert responses(model, 1.0, 64)[0::2] != responses(model, 1.0, 64)[1::2]  # two samples of a prompt differ


def test_streamed_greedy_tokens_equal_those_of_the_sampler(model: LanguageModel) -> None:
    sampler = AncestralSampler(24, temperature=0.0)
    expected = sampler.sample(model, asked(), 0)
    for row, prompt in enumerate(asked()):
        tokens = list(stream(model, encode_prompt(model.tokenizer, prompt.messages), sampler, seed=3))
        assert tokens == expected.response_ids[row][expected.mask[row]].tolist()


def test_streamed_tokens_follow_the_distribution_of_the_model(model: LanguageModel) -> None:
    ids = encode_prompt(model.tokenizer, asked()[0].messages)
    with torch.no_grad():
        hidden = model.hidden(TokenBatch.of(torch.tensor([ids]), torch.ones(1, len(ids))))
        p = model.head(hidden[0, -1]).float().div(2.0).softmax(-1)
    token = int(p.argmax())
    drawn = [next(stream(model, ids, AncestralSampler(1, temperature=2.0), seed)) for seed in range(120)]
    share, expected = drawn.count(token) / 120, float(p[token])
    assert 0.05 < expected < 0.99
    assert abs(share - expected) < 4 * (expected * (1 - expected) / 120) ** 0.5


def test_lines_have_the_dialogue_and_its_likelihood(rlhf: Typed, outputs: Path, model: LanguageModel) -> None:
    Path("p.txt").write_text("\n".join(QUESTIONS))
    status, said = rlhf("generate", outputs / "sft" / "none0", "--prompts", "p.txt", "--out", "r.jsonl", "--samples", 2,
                        "--max-new-tokens", 12, "--batch-size", 3)  # fmt: skip
    assert status == 0 and "r.jsonl" in said and "rlhf eval" in said
    rows = [json.loads(line) for line in Path("r.jsonl").read_text().splitlines()]
    assert [(row["index"], row["sample"]) for row in rows] == [(i, k) for i in range(5) for k in range(2)]
    assert [row["messages"][0]["content"] for row in rows[::2]] == QUESTIONS
    for row in rows:
        assert row["messages"][-1] == {"role": "assistant", "content": row["response"]}
    whole = next(row for row in rows if row["ended"] and row["response"].strip() == row["response"] != "")
    messages = tuple(Message(**message) for message in whole["messages"])
    encoded = encode_dialogue(model.tokenizer, messages)
    if sum(encoded.mask) == whole["tokens"]:  # otherwise the same text has other tokens
        ids, mask = torch.tensor([encoded.ids]), torch.tensor([encoded.mask])
        with torch.no_grad():
            logp, _ = model.logprobs(TokenBatch.of(ids, torch.ones_like(ids), mask))
        assert whole["logprob"] == pytest.approx(logp.sum().item(), abs=1e-3)


@pytest.mark.parametrize("batch", [(), ("--batch-size", 4)])
def test_an_interrupted_file_is_resumed(rlhf: Typed, outputs: Path, batch: tuple) -> None:
    """To the same bytes: the interrupted batch is sampled as a whole, because padding changes the last digits."""
    Path("p.jsonl").write_text("".join(json.dumps({"prompt": q, "tags": ["x"]}) + "\n" for q in QUESTIONS))
    words = ("generate", outputs / "sft" / "none0", "--prompts", "p.jsonl", "--samples", 2, "--max-new-tokens", 8,
             *batch)  # fmt: skip
    assert rlhf(*words, "--out", "whole.jsonl")[0] == 0
    whole = Path("whole.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    # Three prompts, half a prompt more, and a line truncated by a kill.
    assert rlhf(*words, "--out", "part.jsonl", "--limit", 1)[0] == 0
    meta = Path("whole.jsonl.meta.json").read_text()
    Path("part.jsonl").write_bytes(b"".join(lines[:7]) + lines[7][:20])
    Path("part.jsonl.meta.json").write_text(meta)
    status, said = rlhf(*words, "--out", "part.jsonl")
    assert status == 0 and "5/5" in said
    assert Path("part.jsonl").read_bytes() == whole
    status, said = rlhf(*words, "--out", "part.jsonl")
    assert status == 0 and "is complete" in said
    status, said = rlhf(*words, "--out", "part.jsonl", "--seed", 1)
    assert status == 2 and "was made with seed=0, not seed=1" in said
    assert Path("part.jsonl").read_bytes() == whole
    Path("mine.jsonl").write_text("precious\n")
    status, said = rlhf(*words, "--out", "mine.jsonl")
    assert status == 2 and Path("mine.jsonl").read_text() == "precious\n"


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.txt", "Who?\nWhy?\n"),
        ("p.json", '[{"prompt": "Who?"}, {"prompt": "Why?"}]'),
        ("p.jsonl", '{"instruction": "Who?", "output": "I."}\n{"instruction": "Why?", "output": "So."}\n'),
        ("q.jsonl", '{"messages": [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "I"}]}\n'
                    '{"conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So"}]}\n'),
        ("r.jsonl", '{"chosen": "\\n\\nHuman: Who?\\n\\nAssistant: I", '
                    '"rejected": "\\n\\nHuman: Who?\\n\\nAssistant: U"}\n'
                    '{"prompt": "Why?", "completion": "So"}\n'),
    ],
)  # fmt: skip
def test_prompts_are_read_in_every_format(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    found = load_prompts(str(tmp_path / name), None, None)
    assert [prompt.messages for prompt in found] == [(Message("user", "Who?"),), (Message("user", "Why?"),)]
    assert load_prompts(str(tmp_path / name), None, 1) == found[:1]


def test_testbed_prompts_are_those_held_out_from_the_run(outputs: Path) -> None:
    from rlhf.data.testbed.world import Testbed
    from rlhf.runs.run_directory import Run
    from rlhf.using import named

    world = named.testbed(Run(outputs / "sft" / "lora0"))  # the pretrained model's own data are a file
    assert world is not None and world["people"] == 5
    found = load_prompts("testbed", world, 30)
    assert found == list(Testbed(seed=3, people=5).prompts(30, 0, held_out=True))
    assert found != load_prompts("testbed", None, 30)
    assert 30 < len(load_prompts("testbed", world, None)) < 400  # all that so small a world holds out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("sft/none0", "--prompts", "nothing.jsonl"), "--prompts nothing.jsonl: no such file"),
        (("sft/none0", "--prompts", "empty.jsonl"), "--prompts empty.jsonl: no usable prompts ("),
        (("sft/none0", "--prompts", "bad.jsonl"), "1 of 1 rows are unusable as prompts"),
        (("sft/none0", "--prompts", "good.txt", "--max-new-tokens", "500"), "type --max-new-tokens"),
        (("reward_model/b0", "--prompts", "good.txt"), "is a reward or value model"),
        (
            ("sft/stopped", "--prompts", "good.txt"),
            "not finished (stopped); finish it with: rlhf stage=sft",
        ),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_status_2(
    rlhf: Typed, outputs: Path, words: tuple[str, ...], said: str
) -> None:
    Path("empty.jsonl").touch()
    Path("bad.jsonl").write_text('{"colour": "red"}\n')
    Path("good.txt").write_text("Who?\n")
    stopped = outputs / "sft" / "stopped"
    stopped.mkdir(exist_ok=True)
    (stopped / "status.json").write_text('{"status": "stopped", "command": "rlhf stage=sft"}')
    status, out = rlhf("generate", outputs / words[0], *words[1:])
    assert status == 2 and said in out and "data." not in out, out
    assert len([line for line in out.splitlines() if line.startswith("error:")]) == 1
