"""User code: found in the directory of the command, and part of a run's fingerprint."""

import importlib
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf import discovery, importing
from rlhf.errors import UserError
from rlhf.running import processes
from rlhf.runs import fingerprint, user_code

FILES = {
    "myrew.py": "import json\nimport yaml\nfrom helpers import scale\nfrom pack.inner import deep\n\n\ndef f(p, r):\n"
    "    import late\n    import importlib\n    importlib.import_module('named_late')\n    return 1.0\n",
    "helpers.py": "scale = 2\n",
    "late.py": "x = 1\n",
    "named_late.py": "x = 1\n",
    "pack/__init__.py": "from . import sibling\n",
    "pack/sibling.py": "from .inner import base\n",
    "pack/inner/__init__.py": "from ..cousin import c\n",
    "pack/inner/deep.py": "from . import *\nfrom .base import b\n",
    "pack/inner/base.py": "b = 1\n",
    "pack/cousin.py": "c = 1\n",
    "pack/unused.py": "u = 1\n",
    "space/node.py": "class Reward:\n    pass\n",
    "space/far/out.py": "import space.node\n",
    "unrelated.py": "x = 1\n",
    "broken.py": "def f(:\n",
}
READ = {"myrew", "helpers", "late", "named_late", "pack", "pack.sibling", "pack.inner", "pack.inner.deep"}
READ |= {"pack.inner.base", "pack.cousin"}


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory of the user's modules, in which a command is typed."""
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delenv(discovery.DIRECTORY, raising=False)
    for module in [
        name for name in sys.modules if name.partition(".")[0] in {Path(f).parts[0].split(".")[0] for f in FILES}
    ]:
        monkeypatch.delitem(sys.modules, module)
    importlib.invalidate_caches()
    discovery.add_working_directory()
    return tmp_path


def test_installed_packages_take_precedence_over_the_working_directory(
    here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sys.path[-1] == str(here)
    (here / "yaml.py").write_text("raise SystemExit(0)\n")
    assert importing.load_function("reward.function", "myrew:f")("p", "r") == 1.0
    other = here / "job"
    other.mkdir()
    monkeypatch.chdir(other)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(here)])
    monkeypatch.setenv(discovery.DIRECTORY, processes.environment(str(here))[discovery.DIRECTORY])
    discovery.add_working_directory()
    assert sys.path[-1] == str(here)


@pytest.mark.parametrize(
    "config",
    [
        {"reward": {"_target_": "rlhf.reward.function.FunctionReward", "function": "myrew:f"}},
        {"data": {"parts": {"a": {"format": "myrew:f"}}}},
        {"reward": {"_target_": "myrew.f"}},
        {"reward": {"_target_": "hydra.utils.get_method", "path": "myrew.f"}},
    ],
)
def test_the_fingerprint_covers_all_user_code_that_a_run_reaches(here: Path, config: dict) -> None:
    assert user_code.files(user_code.named(config)).keys() == READ
    first, whole = fingerprint.user_sources(config), fingerprint.compute(config, {}, {}, ())
    for name, text in FILES.items():
        module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        if module != "broken":
            (here / name).write_text(f'"""Words."""\n# a comment\n{text}')
            assert fingerprint.user_sources(config) == first, name
        (here / name).write_text(f"{text}\nchanged = True\n")
        assert (fingerprint.user_sources(config) != first) == (module in READ), name
        (here / name).write_text(text)
    (here / "pack/cousin.py").write_text("c = 2\n")
    assert fingerprint.compute(config, {}, {}, ()) != whole


def test_user_callbacks_are_in_the_fingerprint_and_built_in_ones_are_not(here: Path) -> None:
    def name(target: str) -> str:
        return fingerprint.compute({"callbacks": {"one": {"_target_": target}}}, {}, {}, ())

    assert (
        name("rlhf.callbacks.checkpoints.Checkpoints")
        == fingerprint.compute({}, {}, {}, ())
        != name("space.node.Reward")
    )
    # What is compared when a command starts anew covers the same code.
    own = fingerprint.code({"callbacks": {"one": {"_target_": "space.node.Reward"}}})
    built_in = fingerprint.code({"callbacks": {"one": {"_target_": "rlhf.callbacks.checkpoints.Checkpoints"}}})
    assert own.keys() - built_in.keys() == {"module space.node"}


def test_namespace_packages_and_invalid_files_are_fingerprinted(here: Path) -> None:
    assert list(user_code.files(["space.node.Reward"])) == ["space.node"]
    assert list(user_code.files(["space.far.out"])) == ["space.far.out", "space.node"]  # two directories deep
    assert list(user_code.files(["broken"])) == ["broken"]
    first = fingerprint.user_sources({"x": {"_target_": "broken.f"}})
    (here / "broken.py").write_text("def g(:\n")
    assert fingerprint.user_sources({"x": {"_target_": "broken.f"}}) != first


def test_installed_packages_are_not_fingerprinted(here: Path) -> None:
    assert (
        user_code.files(["torch.nn.Linear", "json", "rlhf.reward.gold.GoldReward", "no_such", "pytest", "__main__"])
        == {}
    )


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere:f", r"no module nowhere, neither in .* nor installed; type .* in the directory of nowhere.py"),
        ("pack.nowhere:f", "no module pack.nowhere, .* in the directory of pack/nowhere.py"),
        ("myrew:g", r"myrew.py has no function g \(one of: f"),
        ("helpers:scale", "helpers.py has no function scale"),
        ("broken:f", "importing broken failed with SyntaxError"),
        ("leaves:f", r"importing leaves failed with ModuleEnded: the module raises SystemExit\(0\)"),
        ("lacks:f", "lacks imports not_installed, which is not installed"),
        ("myrew", "is not of the form module:function; type for example my_module:my_function"),
        ("myrew:", "is not of the form module:function"),
        (":f", "is not of the form module:function"),
        ("../myrew:f", "is not of the form module:function"),
    ],
)
def test_an_invalid_function_reference_is_refused_with_its_cause(here: Path, name: str, message: str) -> None:
    (here / "leaves.py").write_text("import sys\n\nsys.exit(0)\n")
    (here / "lacks.py").write_text("import not_installed\n")
    with pytest.raises(UserError, match=f"^reward.function={name}: .*{message}"):
        importing.load_function("reward.function", name)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux alone ends a process with its parent")
def test_a_process_ends_with_its_parent(tmp_path: Path) -> None:
    """As with a job of a sweep whose parent is killed; a process started too late for the signal ends at once."""
    root = Path(__file__).parents[2]
    script = "import sys, time; from rlhf.running import processes; processes.end_with_parent(); print(1, flush=True); "
    words = [sys.executable, "-c", script + "time.sleep(100)"]

    def parent(pipe: int) -> None:
        environment = os.environ | processes.environment() | {"PYTHONPATH": str(root)}
        child = subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, start_new_session=True)
        assert child.stdout is not None and child.stdout.readline()
        os.write(pipe, str(child.pid).encode())
        time.sleep(100)

    ours, theirs = os.pipe()
    process = multiprocessing.get_context("fork").Process(target=parent, args=(theirs,))
    process.start()
    job = int(os.read(ours, 20))
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    deadline = time.monotonic() + 30
    while Path(f"/proc/{job}/cmdline").exists() and Path(f"/proc/{job}/cmdline").read_bytes():
        assert time.monotonic() < deadline
        time.sleep(0.01)
    late = subprocess.run(words, env=os.environ | {processes.PARENT: "1", "PYTHONPATH": str(root)}, check=False)
    assert late.returncode == 128 + signal.SIGTERM
