"""Pages as they are printed, and mistakes: one line and status 2."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf.cli import main
from rlhf.data.chat_templates import TEMPLATES
from rlhf.errors import UserError
from rlhf.inspection.composing import planned
from rlhf.inspection.lengths import histogram
from rlhf.inspection.roles import Role
from rlhf.inspection.template_page import facts_of
from rlhf.planning.checks import memory as refusal
from rlhf.testing import tiny_model
from tests.inspection.conftest import MODEL, SMALL

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    """Return (exit status, output with single spaces between columns) of `rlhf inspect WORDS`."""
    code = main.run(["inspect", *words])
    captured = capsys.readouterr()
    return code, re.sub("  +", " ", captured.out + captured.err)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("", "rlhf inspect: names no page; type one of: data, batch, template, plan"),
        ("dat stage=sft", "rlhf inspect dat: no such page (did you mean data?)"),
        ("data", "nothing to run; type stage=NAME"),
        ("data stage=sfft", "stage=sfft: no such option (did you mean sft?)"),
        ("data stage=sft -m", "rlhf inspect data -m: shows one config, not a sweep; leave it out"),
        ("batch stage=dpo", "inputs.policy: has no value"),
        ("plan stage=sft data.betta=1", "data.betta: unknown option"),
        ("template", "rlhf inspect template: names no model; type model=NAME, "),
        ("template model=nope", "model=nope: no such option"),
        ("data stage=sft data.source=/nowhere.json", "data.source=/nowhere.json: no such file"),
        ("data stage=reward_model data=prompts", "data.record=prompt: stage=reward_model reads comparisons here"),
        ("plan pipeline=dpo data@sft.data=comparisons", "sft.data.record=comparison: stage=sft reads texts and demon"),
        (
            "plan stage=pretrain model.chat_template=chatlm",
            "model.chat_template=chatlm: is neither the name of a template nor",
        ),
        ("plan stage=pretrain model.chat_template=half.jinja", "model.chat_template: is not a Jinja template (line 1"),
        (
            "plan stage=sft model.path=bare",
            "model.path=bare: its tokenizer has no chat template, and chat data needs one",
        ),
        ("plan pipeline=dpo model.tokenizer=bare", "model.tokenizer=bare: its tokenizer has no chat template"),
        ("plan pipeline=instructgpt align.data.source=x*.jsonl", "align.data.source=x*.jsonl: no file matches"),
        ("plan stage=reward_model demonstrations.source=x*.json", "demonstrations.source=x*.json: no file matches"),
        ("plan pipeline=dpo sft.data.source=half.json", "sft.data.source=half.json: 1 of 1 rows are unusable"),
        ("data pipeline=dpo step=align", "data.source=outputs/collect/"),
        ("batch pipeline=dpo step=nope", "step=nope: is not among the steps that would run"),
    ],
)
def test_a_mistake_is_reported_in_one_line_with_status_2(
    capsys: pytest.CaptureFixture[str], line: str, said: str
) -> None:
    (Path("bare") / "model").mkdir(parents=True)
    (Path("bare") / "model" / "tokenizer_config.json").write_text("{}")
    Path("half.json").write_text('[{"prompt": ""}]')
    Path("half.jinja").write_text("{% for m in messages %}{{ m.content")
    code, out = typed(capsys, *line.split())
    assert code == 2 and said in out
    assert len(out.strip().splitlines()) == 1, out
    assert not Path("outputs").exists()


def test_every_bad_row_is_named_with_its_reason(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"instruction": f"Question {i}?", "output": "Yes. " * (1 + 60 * (i == 7))} for i in range(20)]
    rows[3] = {"instruction": "No answer", "output": ""}
    lines = [json.dumps(row) for row in rows]
    lines[5] = "{half"
    Path("mine.jsonl").write_text("\n".join(lines) + "\n")
    words = ["stage=sft", "data=alpaca", "data.source=mine.jsonl", "data.max_length=40", "data.validation=2"]
    code, out = typed(capsys, "data", *words, *MODEL)
    assert code == 0, out
    assert "dropped: mine.jsonl, row 4: a demonstration needs an assistant turn that is not empty" in out
    assert "dropped: mine.jsonl, row 6: not JSON" in out
    assert "training refuses this: data.max_bad=0.05 allows 1 such rows" in out
    assert "1 records cut to data.max_length=40" in out and "(mine.jsonl, row 8): Question 7?" in out
    assert "rows read 20" in out and "records kept 18 16 train, 2 held out" in out


def test_records_that_do_not_fit_are_named_or_counted(capsys: pytest.CaptureFixture[str]) -> None:
    """Ten are named and the rest is counted, so that nobody takes ten for all of them."""
    rows = [{"instruction": f"Question {i}?", "output": "Yes. " * 60} for i in range(15)]
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["stage=sft", "data=alpaca", "data.source=mine.jsonl", "data.max_length=40", "data.validation=2"]
    code, out = typed(capsys, "data", *words, *MODEL)
    assert code == 0 and "train: 13 records cut to data.max_length=40" in out, out
    named = [line for line in out.splitlines() if "(mine.jsonl, row " in line]
    assert len(named) == 12  # 10 to train on, 2 held out
    assert out.count(" more\n") == 1 and " ... 3 more\n" in out
    # prompts that are too long for the model's context
    Path("prompts.jsonl").write_text("".join(json.dumps({"prompt": "Who? " * 90}) + "\n" for _ in range(14)))
    words = ["pipeline=instructgpt", "align.data.source=prompts.jsonl", "align.data.validation=0", "until=align"]
    code, out = typed(capsys, "data", *words, *MODEL)
    assert code == 0 and "14 prompts are longer than" in out and " ... 4 more\n" in out, out


def test_effects_of_the_chat_template_on_records_are_reported(capsys: pytest.CaptureFixture[str]) -> None:
    """Spelled control tokens, dialogues that the template refuses, equal prompts that cannot be split."""
    rows = [{"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]} for _ in range(9)]
    rows[4]["messages"][1]["content"] = "Type <|end|>"
    rows.append({"messages": rows[0]["messages"][1:]})
    Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    opened = "messages and messages[0]['role'] == 'assistant'"
    refusing = f"{{%- if {opened} -%}}{{{{ raise_exception('user first') }}}}{{%- endif -%}}"
    Path("mine.jinja").write_text(refusing + TEMPLATES["plain"])
    words = ["stage=sft", "data=messages", "data.source=mine.jsonl", "data.validation=3", "data.max_bad=0"]
    code, out = typed(capsys, "data", *words, "model.chat_template=mine.jinja", *MODEL)
    assert code == 0, out
    out = " ".join(out.split())
    assert "1 records spell a control token, which is encoded as text (first: record 5 (mine.jsonl, row 5)" in out
    assert "held out: 1 records dropped, they cannot be encoded (mine.jsonl, row 10: model.chat_template: cannot" in out
    assert "1 held out where 3 were requested: equal prompts stay on one side" in out


def test_reading_the_testbed_with_a_user_model_is_reported(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "mine")
    words = ["stage=sft", "data.size=8", "data.validation=2", f"model.path={tmp_path / 'mine'}"]
    said = "this is the testbed's data, because the command names no data; type data=NAME data.source=FILE"
    for typed_words, there in ((words, True), ([*words, "data.source=testbed"], False), ([*words[:3], *MODEL], False)):
        code, out = typed(capsys, "data", *typed_words)
        assert code == 0 and (said in " ".join(out.split())) == there, out


def test_data_that_the_run_does_not_read_is_not_shown(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stage=reward_model", "data.size=12", "data.validation=4", "demonstrations.size=8", *MODEL]
    code, out = typed(capsys, "data", *words)
    assert code == 0 and "demonstrations is not read by this run" in out, out
    assert "data (comparisons of testbed)" in out and "(demonstrations of testbed)" not in out
    code, out = typed(capsys, "data", *words, "stage.normalize=demonstrations")
    assert code == 0 and "(demonstrations of testbed)" in out and "not read" not in out, out


def test_grades_and_tags_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"prompt": f"Question {i}?", "chosen": "a", "rejected": "b", "grade": grade, "tags": tags}
        for i, (grade, tags) in enumerate([("better", []), ("better", ["unsafe"]), ("slightly", []), ("tie", [])])
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["stage=reward_model", "data.source=pairs.jsonl", "data.validation=0", "stage.normalize=none"]
    code, out = typed(capsys, "data", *words, *MODEL, "model.tokenizer=null", "demonstrations.size=8")
    assert code == 0, out
    assert "grades: better 2, slightly 1" in out
    assert "tags: none 2, unsafe 1" in out
    assert "ties dropped 1 " in out


def test_the_plan_page_resolves_all_amounts(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stage=sft", "data.size=40", "data.validation=8", "stage.batch_size=8", "stage.micro_batch_size=3"]
    code, out = typed(capsys, "plan", *words, "stage.epochs=3", *MODEL)
    assert code == 0, out
    lines = [line.strip() for line in out.splitlines()]
    assert "examples 40 rows" in lines
    assert "accumulation 3" in lines  # 3 + 3 + 2 rows
    assert "optimizer steps 15" in lines  # 5 batches, 3 times
    assert "to compute" in out and "this machine:" in out
    assert not Path("outputs").exists()


def test_the_plan_page_shows_the_share_of_a_rank_under_fsdp(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["stage=sft", "data.size=40", "data.validation=8", "stage.batch_size=8", *MODEL]
    code, out = typed(capsys, "plan", *words, "trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2")
    assert code == 0 and "1/2 on each rank" in out, out
    policy, reward = Role("policy", 25, 25, 101, 100, 200), Role("reward", 25, 0, 101, 0, 0)
    assert (policy.shard(2).weights, policy.shard(2).total) == (51, 51 + 50 + 100)
    assert reward.shard(2) == reward


def test_the_plan_page_of_rollouts(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["align.stage.steps=5", "align.stage.epochs=2", "align.stage.minibatches=2", "align.stage.batch_size=8"]
    small = ["pretrain.data.size=64", "sft.data.size=40", "collect.data.size=8", "align.data.size=16"]
    words += ["align.sampler.samples=4", "align.sampler.max_new_tokens=10", "align.stage.micro_batch_size=6"]
    code, out = typed(capsys, "plan", "pipeline=instructgpt", "stage@align=grpo", *words, *small, *MODEL)
    assert code == 0, out
    lines = [line.strip() for line in out.split("Amounts")[1].splitlines()]

    def last(name: str) -> str:
        return next(line.split()[-1] for line in lines if line.startswith(name))

    assert last("responses per rollout") == "32"  # 8 prompts, 4 responses
    assert last("accumulation") == "3"  # minibatches of 16, micro-batches of 6
    assert last("optimizer steps") == "20"  # 5 rollouts, 2 epochs, 2 minibatches
    assert last("tokens sampled") == "1,600"  # 5 x 32 x 10


def test_the_plan_page_counts_prompts_as_training_reads_them(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """A long prompt that does not fit is dropped: it must not make the estimated batch longer either."""
    rows = [{"prompt": "Who lives in Rome?"}] * 15 + [{"prompt": "Who lives in Rome? " * 60}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    align = ["align.data.validation=0", "align.data.max_length=40", "align.sampler.max_new_tokens=10"]
    words = ["pipeline=instructgpt", f"align.data.source={tmp_path}/prompts.jsonl", *align, "align.stage.batch_size=8"]
    small = ["pretrain.data.size=64", "sft.data.size=40", "collect.data.size=8"]
    code, out = typed(capsys, "plan", *words, *small, *MODEL)
    assert code == 0, out
    (length,) = {int(found) for found in re.findall(r"rows of (\d+) tokens", out.partition("align policy")[2])}
    assert length <= 50
    amounts = next(line for line in out.split("Amounts")[1].splitlines() if line.strip().startswith("prompts "))
    assert amounts.split()[-1] == "15"


def test_the_template_page(capsys: pytest.CaptureFixture[str]) -> None:
    code, out = typed(capsys, "template", "stage=sft", *SMALL, *MODEL)
    assert code == 0, out
    for name in ("prefix-preserving", "end of turn is trained", "tool turn"):
        assert f"{name} yes" in out, out
    assert "[Rome.<|end|>]" in out.replace("¦", "")


def test_a_template_that_rewrites_earlier_turns_is_reported(tmp_path: Path) -> None:
    from rlhf.testing import tiny_model

    tokenizer = tiny_model().tokenizer
    facts = facts_of(tokenizer)
    assert facts["prefix-preserving"] == "yes" and facts["padding = end of turn"] == "no"
    tokenizer.chat_template = (
        "{{ messages | length }}{%- for m in messages -%}{{- '<|' + m['role'] + '|>' + m['content'] + '<|end|>' -}}"
        "{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )
    tokenizer.pad_token = "<|end|>"
    facts = facts_of(tokenizer)
    assert facts["prefix-preserving"].startswith("no: model.chat_template: rewrites earlier turns")
    assert facts["padding = end of turn"].startswith("yes")


def test_histogram_counts_every_length() -> None:
    lines = list(histogram("total", [3, 3, 4, 23]))
    assert lines[0] == "total: 3 to 23 tokens, mean 8.2, median 4, 95% within 23"
    assert sum(int(line.split()[-1]) for line in lines[1:]) == 4
    assert list(histogram("total", [])) == []


def test_a_model_too_large_for_the_machine_is_refused_before_it_is_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    (step,) = planned(["stage=sft", *SMALL, *MODEL]).steps
    refusal.check_memory([step])
    need = refusal.trained_bytes(step.config)
    # float32 weights, gradients and two moments: 16 bytes per weight, and a little for buffers and counters
    weights = refusal.rough_parameters(step.config["model"])
    assert 0 < need < 16 * weights * 1.2
    monkeypatch.setattr(refusal, "SMALL", 0)
    monkeypatch.setattr(refusal, "read_machine_memory", lambda: need - 1)
    with pytest.raises(UserError, match="sft: weights, gradients and optimizer state need .* type a smaller model="):
        refusal.check_memory([step])
    monkeypatch.setattr(refusal, "read_machine_memory", lambda: need)
    refusal.check_memory([step])
    monkeypatch.setattr(refusal, "read_machine_memory", lambda: 1)
    monkeypatch.setenv(refusal.SWITCH, "0")
    refusal.check_memory([step])
    monkeypatch.delenv(refusal.SWITCH)
    gpu = SimpleNamespace(config={**step.config, "trainer": {"accelerator": "gpu"}}, folder=step.folder, name="sft")
    refusal.check_memory([gpu])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("option", "name", "stage"),
    [("alpaca", "alpaca_en_demo.json", "sft"), ("graded_preferences", "graded_preferences.jsonl", "reward_model")],
)
def test_pages_of_real_files(capsys: pytest.CaptureFixture[str], option: str, name: str, stage: str) -> None:
    if not (SHARED / name).exists():
        pytest.skip(f"{SHARED / name} is absent")
    words = [f"stage={stage}", f"data={option}", f"data.source={SHARED / name}", "data.size=60"]
    code, out = typed(capsys, "data", *words, *MODEL)
    assert code == 0, out
    assert "records kept 60 " in out
    assert "trained on:" in out
