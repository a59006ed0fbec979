"""References to runs, fingerprints of sources, and atomic files."""

import json
from pathlib import Path

import pytest

from rlhf.cli import main
from rlhf.cli import runs as command
from rlhf.errors import UserError
from rlhf.planning import references
from rlhf.runs import fingerprint
from rlhf.runs.run_directory import Run
from rlhf.storage import files


def make(outputs: Path, stage: str, name: str, status: str = "finished", parent: Run | None = None) -> Run:
    folder = outputs / stage / name
    run = Run(folder)
    ancestors = {parent.fingerprint: {"stage": parent.stage, "folder": str(parent.folder)}} if parent else {}
    inputs = {"policy": [parent.fingerprint]} if parent else {}
    lineage = {"fingerprint": name + "0" * 54, "ancestors": ancestors, "inputs": inputs}
    run.begin({"seed": 0}, lineage, f"rlhf stage={stage}")
    if stage == "collect":
        (folder / "comparisons.jsonl").touch()
    else:
        (folder / "model").mkdir()
        (folder / "model" / "config.json").write_text("{}")
    files.write_json(
        folder / "summary.json", {"metrics": {"loss": 0.5}, "headline": "loss", "value": 0.5, "wall_s": 62}
    )
    run.write_status(status)
    return run


@pytest.fixture
def outputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return Path("outputs")


@pytest.mark.parametrize(
    "ref",
    ["outputs/sft/3f2a91bc04", "outputs/sft/3f2a91bc04/", "outputs/sft/3f2a", "3f2a", "outputs/sft/3f2a91bc04/model"],
)
def test_every_form_of_run_reference_is_resolved(outputs: Path, ref: str) -> None:
    run = make(outputs, "sft", "3f2a91bc04")
    found = references.resolve(ref, "policy", outputs)
    assert found == references.Reference("outputs/sft/3f2a91bc04/model", run.fingerprint, run.folder)


def test_data_roles_resolve_to_the_run_directory(outputs: Path) -> None:
    run = make(outputs, "collect", "aaaa000000")
    assert references.resolve("aaaa", "comparisons", outputs).path == str(run.folder)


def test_hub_ids_and_model_directories_are_resolved(outputs: Path) -> None:
    assert references.resolve("Org/some-model.v2", "policy", outputs).identity == "hub:Org/some-model.v2"
    folder = Path("my_model")
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    first = references.resolve("my_model", "policy", outputs)
    assert first.path == "my_model" and first.identity.startswith("sha256:") and first.run is None
    (folder / "config.json").write_text('{"a": 1}')
    assert references.resolve("my_model", "policy", outputs).identity != first.identity


@pytest.mark.parametrize(
    ("ref", "role", "message"),
    [
        ("outputs/sft/9", "policy", r"inputs.policy=outputs/sft/9: no such run.*did you mean outputs/sft/3f2a91bc04"),
        ("gpt2", "policy", "type `rlhf runs list`"),
        ("3f2", "policy", "matches more than one run: .*3f2a91bc04, .*3f2b000000; type more letters"),
        ("bbbb", "policy", r"not finished \(failed\); finish it with: rlhf stage=sft"),
        ("outputs/sft/bbbb000000/model", "policy", "not finished"),
        ("cccc", "policy", "is a run of stage collect, which has no model; type another run"),
        ("3f2a", "comparisons", "is a run of stage sft, which has no comparisons"),
        ("empty", "policy", "is neither a run .* nor a model directory"),
        ("a/b/c", "policy", "no such run"),
    ],
)
def test_invalid_references_are_refused(outputs: Path, ref: str, role: str, message: str) -> None:
    make(outputs, "sft", "3f2a91bc04")
    make(outputs, "sft", "3f2b000000")
    make(outputs, "sft", "bbbb000000", status="failed")
    make(outputs, "collect", "cccc000000")
    Path("empty").mkdir()
    with pytest.raises(UserError, match=message):
        references.resolve(ref, role, outputs)


def test_a_half_written_run_is_not_finished(outputs: Path) -> None:
    run = make(outputs, "sft", "dddd000000", status="running")
    (run.folder / "status.json").write_text('{"status": "finis')
    assert run.status == "new" and not run.finished


def test_json_is_replaced_atomically(tmp_path: Path) -> None:
    path = tmp_path / "a" / "status.json"
    files.write_json(path, {"status": "finished"})
    circle: list = []
    circle.append(circle)
    with pytest.raises(ValueError):
        files.write_json(path, circle)
    assert json.loads(path.read_text()) == {"status": "finished"} and len(list(path.parent.iterdir())) == 1


def test_fingerprints_are_not_read_as_numbers() -> None:
    names = [fingerprint.compute({"x": x}, {}, {}) for x in range(20)]
    assert all(name[0] in "abcdef" for name in names) and len(set(names)) == 20


def test_the_fingerprint_of_a_file_is_that_of_its_content(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.json").write_text("[1]")
    one, same = (fingerprint.compute({"x": f"{tmp_path}/{name}.json"}, {}, {}) for name in ("a", "b"))
    (tmp_path / "a.json").write_text("[2]")
    assert one == same != fingerprint.compute({"x": f"{tmp_path}/a.json"}, {}, {})


def test_equal_numbers_have_equal_fingerprints() -> None:
    assert fingerprint.compute({"x": 1}, {}, {}) == fingerprint.compute({"x": 1.0}, {}, {})
    assert fingerprint.compute({"x": 1}, {}, {}) != fingerprint.compute({"x": True}, {}, {})


# rlhf runs


def test_list_and_show_print_runs(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = make(outputs, "sft", "3f2a91bc04")
    make(outputs, "dpo", "eeee000000", parent=sft)
    make(outputs, "dpo", "ffff000000", status="failed")
    assert command.main(["list"]) == 0
    out = capsys.readouterr().out
    assert out.index("outputs/dpo/eeee000000") < out.index("outputs/sft/3f2a91bc04") and "1 min 02 s" in out
    assert command.main(["list", "--stage", "dpo", "--status", "failed"]) == 0
    out = capsys.readouterr().out
    assert "ffff000000" in out and "eeee000000" not in out
    assert command.main(["show", "eeee"]) == 0
    out = capsys.readouterr().out
    assert "outputs/sft/3f2a91bc04" in out and "loss" in out and "seed: 0" in out


def test_rm_removes_runs_after_confirmation(outputs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sft = make(outputs, "sft", "3f2a91bc04")
    dpo = make(outputs, "dpo", "eeee000000", parent=sft)
    failed = make(outputs, "dpo", "ffff000000", status="failed")
    with pytest.raises(UserError, match="outputs/dpo/eeee000000 was made from .*; type --force to remove"):
        command.main(["rm", "3f2a", "--yes"])
    assert command.main(["rm", "eeee"]) == 1 and dpo.folder.exists()  # no confirmation was typed
    assert command.main(["rm", "--unfinished", "--yes"]) == 0
    assert not failed.folder.exists() and dpo.folder.exists()
    assert command.main(["rm", "3f2a", "eeee", "--yes"]) == 0
    assert not sft.folder.exists() and not dpo.folder.exists()


def test_rm_refuses_running_and_unknown_runs(outputs: Path) -> None:
    run = make(outputs, "sft", "3f2a91bc04", status="running")
    with run.lock(), pytest.raises(UserError, match="is being computed by process .*; stop that process first"):
        command.main(["rm", "3f2a", "--yes"])
    with pytest.raises(UserError, match="no such run"):
        command.main(["rm", "1234"])
    with pytest.raises(UserError, match="rlhf runs rm: names no run; type a run, or --unfinished"):
        command.main(["rm"])


@pytest.mark.parametrize("words", ["runs list", "runs check", "report", "eval testbed"])
def test_outputs_must_be_a_directory(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A file has no runs, and an empty word meant the working directory."""
    (tmp_path / "file").touch()
    for given, said in ((str(tmp_path / "file"), str(tmp_path / "file")), ("", "''")):
        assert main.run([*words.split(), "--outputs", given]) == 2
        assert f"argument --outputs: {said} is not a directory; type rlhf" in capsys.readouterr().err
