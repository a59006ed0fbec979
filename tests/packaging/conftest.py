"""Environments with the running one's packages but without rlhf: built in a second, without downloads."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = Path(__file__).resolve().parent / "sample_plugin"
PARTS = ("rlhf", "conf", "plugins", "pyproject.toml", "hatch_build.py", "README.md", "LICENSE")


@dataclass(frozen=True)
class Environment:
    """Virtual environment and a working directory."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    @property
    def packages(self) -> Path:
        return next(self.folder.glob("lib/python*/site-packages"))

    def pip_install(self, *what: str) -> None:
        """Install without dependencies, index or isolation: everything needed is installed already."""
        words = ["-m", "pip", "--python", str(self.python), "install", "--quiet", "--no-deps", "--no-index"]
        self.run(sys.executable, *words, "--no-build-isolation", *what, cwd=self.folder)

    def rlhf(self, *words: str, cwd: Path, ok: bool = True, **variables: str) -> str:
        """Return the output of `rlhf WORDS`."""
        script = self.folder / "bin" / "rlhf"
        program = [str(script)] if script.exists() else [str(self.python), "-m", "rlhf.cli"]
        return self.run(*program, *words, cwd=cwd, ok=ok, **variables)

    def run(self, *words: str, cwd: Path, ok: bool = True, **variables: str) -> str:
        dropped = ("PYTHONPATH", "RLHF_PLUGINS", "RLHF_RESULT", "HYDRA_FULL_ERROR", "VIRTUAL_ENV")
        kept = {k: v for k, v in os.environ.items() if k not in dropped}
        done = subprocess.run(
            words, cwd=cwd, env={**kept, "COLUMNS": "200", **variables}, text=True, capture_output=True, timeout=280
        )
        assert not ok or done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr


@pytest.fixture(scope="session")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a directory of links to all installed packages except this project."""
    folder = tmp_path_factory.mktemp("libraries")
    for place in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        for entry in Path(place).iterdir():
            ours = entry.name.startswith(("rlhf", "_rlhf", "__editable__")) or entry.suffix == ".pth"
            if not ours and not (folder / entry.name).exists():
                (folder / entry.name).symlink_to(entry)
    return folder


def create(folder: Path, libraries: Path) -> Environment:
    made = Environment(folder)
    venv.create(made.folder, with_pip=False, symlinks=True)
    (made.packages / "libraries.pth").write_text(f"{libraries}\n")
    return made


@pytest.fixture
def environment(tmp_path: Path, libraries: Path) -> Environment:
    """Return a new environment without rlhf."""
    return create(tmp_path / "venv", libraries)


@pytest.fixture(scope="session")
def installed(tmp_path_factory: pytest.TempPathFactory, libraries: Path, wheel: Path) -> Environment:
    """Return an environment with the wheel, in which nothing else may be installed."""
    made = create(tmp_path_factory.mktemp("installed") / "venv", libraries)
    made.pip_install(str(wheel))
    return made


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """Return an editable copy of the project."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, folder / part)
    return folder


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the project's wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    words = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (made,) = folder.glob("*.whl")
    return made


@pytest.fixture
def empty(tmp_path: Path) -> Path:
    """Return an empty directory."""
    folder = tmp_path / "empty"
    folder.mkdir()
    return folder
