"""Models without a chat template: refused with an option that works, --chat-template."""

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf.data.chat_templates import CHAT_TEMPLATE
from rlhf.errors import UserError, key
from rlhf.models.vocabulary import lacks_template
from rlhf.using import templates

Typed = Callable[..., tuple[int, str]]


@pytest.fixture(scope="module")
def bare(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the trained policy with a tokenizer without a chat template."""
    folder = tmp_path_factory.mktemp("bare") / "model"
    shutil.copytree(outputs / "sft" / "none0" / "model", folder)
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    own = json.loads(file.read_text())
    own.pop("chat_template", None)
    file.write_text(json.dumps(own))
    assert lacks_template(str(folder))
    return folder


@pytest.fixture(scope="module")
def whole(outputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save the policy with its template, in a separate directory: no eval.json is written to a run of other tests."""
    return shutil.copytree(outputs / "sft" / "none0" / "model", tmp_path_factory.mktemp("whole") / "model")


@pytest.fixture(autouse=True)
def question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "asked.txt").write_text("Hello\n")
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))


COMMANDS = {
    "chat": ["--temperature", 0, "--max-new-tokens", 8],
    "generate": ["--prompts", "asked.txt", "--out", "out.jsonl", "--temperature", 0, "--max-new-tokens", 8],
    "eval": ["--prompts", "asked.txt", "--reference", "none", "--temperature", 0, "--max-new-tokens", 8],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_missing_template_is_reported_at_once_with_the_option(rlhf: Typed, bare: Path, command: str) -> None:
    status, out = rlhf(command, bare, *COMMANDS[command])
    assert status == 2 and "model.chat_template" not in out
    line = out.strip().splitlines()[-1]
    assert "its tokenizer has no chat template" in line and "type --chat-template chatml (chatml, llama2," in line


@pytest.mark.parametrize("command", COMMANDS)
def test_the_template_of_training_restores_the_responses(
    rlhf: Typed, bare: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    (tmp_path / "own.jinja").write_text(CHAT_TEMPLATE)
    said: list[object] = []
    for words in (
        [whole],
        [bare, "--chat-template", "plain"],
        [bare, "--chat_template", "own.jinja"],
    ):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        status, out = rlhf(command, *words, *COMMANDS[command], *(["--force"] if command == "generate" else []))
        assert status == 0, out
        if command == "chat":
            said.append(out)
        elif command == "generate":
            said.append((tmp_path / "out.jsonl").read_text())
        else:
            said.append([line.split() for line in out.splitlines() if "±" in line and "prompts of" not in line])
    assert said[0] and said[0] == said[1] == said[2]
    if command == "generate":
        assert json.loads((tmp_path / "out.jsonl.meta.json").read_text())["chat_template"].startswith(
            "own.jinja (sha256 "
        )


def test_the_option_is_refused_for_models_with_a_template(rlhf: Typed, bare: Path, whole: Path, tmp_path: Path) -> None:
    status, out = rlhf("chat", whole, "--chat-template", "chatml")
    assert status == 2 and "came with one; leave it out" in out
    status, out = rlhf("eval", whole, bare, *COMMANDS["eval"], "--chat-template", "plain")
    assert status == 0, out
    for word, said in (("chatlm", "did you mean chatml?"), ("broken.jinja", "is not a Jinja template")):
        (tmp_path / "broken.jinja").write_text("{% for %}")
        status, out = rlhf("chat", bare, "--chat-template", word)
        assert status == 2 and said in out and "model.chat_template" not in out and out.count("\n") == 1


def test_tokens_that_a_template_adds_are_reported_and_deterministic(
    rlhf: Typed, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    responses = []
    for _ in range(2):
        monkeypatch.setattr("sys.stdin", io.StringIO("Hello\n"))
        status, out = rlhf("chat", bare, "--chat-template", "chatml", *COMMANDS["chat"])
        assert status == 0 and "adds tokens that the model has never seen: <|im_start|> <|im_end|>" in out
        responses.append(out)
    assert responses[0] == responses[1]


def test_errors_of_the_template_of_the_model_name_no_config_key() -> None:
    def raised(given: bool) -> str:
        with pytest.raises(UserError) as caught, templates.as_typed(given):
            raise UserError("leaves out the system turn", f"type {key(templates.KEY, 'chatml')}", templates.KEY)
        return str(caught.value)

    assert raised(True) == "--chat-template: leaves out the system turn; type --chat-template chatml"
    assert raised(False).startswith(
        "the model's chat template: leaves out the system turn; fix the template: `rlhf export"
    )


def test_the_card_of_an_export_names_its_missing_template(
    rlhf: Typed, bare: Path, outputs: Path, tmp_path: Path
) -> None:
    status, out = rlhf("export", bare, "--to", "taken")
    note = "its tokenizer has no chat template"
    assert status == 0 and note in " ".join(out.split()) and note in (tmp_path / "taken" / "README.md").read_text()
    scorer = tmp_path / "scorer"
    shutil.copytree(outputs / "reward_model" / "b0" / "model", scorer)
    for name in ("chat_template.jinja", "tokenizer_config.json"):
        (scorer / name).unlink(missing_ok=True)
        if (bare / name).exists():
            shutil.copy(bare / name, scorer / name)
    status, out = rlhf("export", scorer, "--to", "scores")
    assert status == 2 and f"one into {scorer / 'chat_template.jinja'}" in out
    assert not (tmp_path / "scores").exists()
