"""Code that is part of a fingerprint: the modules with which a stage computes, and nothing else."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.runs import source_code
from rlhf.storage.plain import targets
from rlhf.storage.yaml_files import load

ROOT = Path(__file__).resolve().parents[2]
# Parts of rlhf that stages import and that cannot change a result: writing, display, naming and validation.
WATCHES = (
    "callbacks",
    "console",
    "discovery",
    "errors",
    "importing",
    "logger",
    "planning",
    "runs",
    "signatures",
    "storage",
)
STAGES = sorted(
    {
        str(node["_target_"])
        for path in ROOT.glob("plugins/*/conf/stage/*.yaml")
        for key, node in targets(load(path))
        if key == "stage"
    }
)


LOADED = ["rlhf_ppo.stage.PPOStage", "rlhf_reward_model.stage.RewardModelStage", STAGES[0]]
# Libraries are imported once; each stage is then imported by a fork, in which no module of this project is loaded yet.
IMPORT = """
import importlib, json, os, sys
import peft, pytorch_lightning, torch, transformers
for module in sys.argv[1:]:
    read, write = os.pipe()
    if os.fork() == 0:
        assert not any(name.startswith("rlhf") for name in sys.modules)
        importlib.import_module(module)
        os.write(write, json.dumps([name for name in sys.modules if name.startswith("rlhf.")]).encode())
        os._exit(0)
    os.close(write)
    print(os.fdopen(read).read())
    assert os.wait()[1] == 0
"""


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """Return stage -> the modules of rlhf that an interpreter imports with it."""
    modules = [target.rpartition(".")[0] for target in LOADED]
    words = [sys.executable, "-c", IMPORT, *modules]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    return {target: set(json.loads(line)) for target, line in zip(LOADED, done.stdout.split("\n"), strict=False)}


def names(target: str) -> list[str]:
    return [*source_code.STARTS, target, *source_code.plugin_imports(target.partition(".")[0])]


@pytest.mark.parametrize("target", LOADED)
def test_imports_of_a_stage_that_compute_are_in_the_fingerprint(imported: dict[str, set[str]], target: str) -> None:
    loaded, counted = imported[target], source_code.reached(names(target))
    assert target.rpartition(".")[0] not in loaded and "rlhf.stage.base" in loaded
    uncounted = {name for name in loaded - counted if name.split(".")[1] not in WATCHES}
    packages = {name for name in uncounted if (ROOT / name.replace(".", "/")).is_dir()}  # their __init__ is a docstring
    assert uncounted <= packages
    assert {name for name in loaded if source_code.computes(name)} <= counted | packages


def test_each_fingerprinted_part_is_a_module_or_package() -> None:
    for part in source_code.COMPUTES:
        path = ROOT / "rlhf" / part.replace(".", "/")
        assert path.is_dir() or path.with_suffix(".py").is_file(), part


def test_a_module_of_one_stage_is_in_the_fingerprint_of_that_stage_alone() -> None:
    reached = {target: source_code.reached(names(target)) for target in STAGES}
    with_groups = {target for target, modules in reached.items() if "rlhf.stage.group_stage" in modules}
    assert with_groups == {"rlhf_grpo.stage.GRPOStage", "rlhf_rloo.stage.RLOOStage"}
    assert all("rlhf.functional.masking" in modules for modules in reached.values())
    assert not any(
        name.startswith(("rlhf.report", "rlhf.using", "rlhf.cli")) for name in set().union(*reached.values())
    )


@pytest.fixture
def copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a small copy of rlhf, to be edited."""
    files = {
        "__init__.py": "",
        "running/build.py": "import rlhf.stage.base\n",
        "stage/base.py": "from rlhf.functional import add\nfrom rlhf.report import page\n",
        "stage/other.py": "x = 1\n",
        "functional/__init__.py": "",
        "functional/add.py": "def add(x):\n    return x + 1\n",
        "report/page.py": "x = 1\n",
        "data/templates.py": "",
        "data/templates/a.jinja": "{{ x }}",
    }
    for name, text in files.items():
        path = tmp_path / "rlhf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(source_code, "package_folder", lambda package: tmp_path / package)
    return tmp_path / "rlhf"


@pytest.mark.parametrize(
    "file,text,counts",
    [
        ("functional/add.py", "def add(x):\n    return x + 2\n", True),
        ("functional/add.py", '"""Words."""\n\n\ndef add(x):\n    """More."""\n    return x + 1  # a comment\n', False),
        ("functional/unused.py", "x = 1\n", False),
        ("stage/other.py", "x = 2\n", False),
        ("report/page.py", "x = 2\n", False),
        ("stage/base.py", "def f():\n    import rlhf.functional.add\n", True),
    ],
)
def test_reached_code_changes_the_fingerprint(copy: Path, file: str, text: str, counts: bool) -> None:
    before = source_code.source_digest(["rlhf.stage.base.Stage"])
    (copy / file).write_text(text)
    assert (source_code.source_digest(["rlhf.stage.base.Stage"]) != before) is counts


def test_chat_templates_are_fingerprinted_with_their_module(copy: Path) -> None:
    before = [source_code.source_digest([name]) for name in ("rlhf.stage.base", "rlhf.data.templates")]
    (copy / "data/templates/a.jinja").write_text("{{ y }}")
    after = [source_code.source_digest([name]) for name in ("rlhf.stage.base", "rlhf.data.templates")]
    assert after[0] == before[0] and after[1] != before[1]


def test_a_damaged_cache_is_rebuilt(copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLHF_CACHE", str(tmp_path / "cache"))
    before = source_code.source_digest(["rlhf.stage.base"])
    (kept,) = (tmp_path / "cache" / "code").iterdir()
    kept.write_text("{")
    assert source_code.source_digest(["rlhf.stage.base"]) == before


def test_every_computing_target_of_conf_is_in_the_fingerprint() -> None:
    """A class outside the fingerprinted modules that a config names could change results under the same fingerprint."""
    watching = {"logger", "callbacks", "trainer"}
    for path in (*ROOT.glob("conf/*/*.yaml"), *ROOT.glob("plugins/*/conf/*/*.yaml")):
        for _, node in targets(load(path)):
            target = str(node["_target_"])
            if target.startswith("rlhf.") and path.parent.name not in watching:
                assert source_code.reached([target]), f"{path}: {target}"
