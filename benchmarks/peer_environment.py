"""Environment of the older peer: TRL 0.24, the last release with PPO, and transformers 4.

The environment reads torch and everything else from the one that makes it, so that both sides multiply matrices with
the same build; only TRL, transformers and what these pin are its own.
"""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from rlhf.errors import UserError

REQUIREMENTS = ("trl==0.24.0", "transformers>=4.56,<5")
COMMAND = "python -m benchmarks --peer-environment"


def environment_folder() -> Path:
    """Return the directory of the environment: RLHF_PEER_ENVIRONMENT, else .venv-trl-0.24 in the repository."""
    own = os.environ.get("RLHF_PEER_ENVIRONMENT")
    return Path(own) if own else Path(__file__).resolve().parents[1] / ".venv-trl-0.24"


def peer_python() -> str:
    """Return the environment's Python.

    Raises:
        UserError: The environment has not been made.
    """
    python = environment_folder() / "bin" / "python"
    if not python.exists():
        raise UserError("the environment with trl 0.24 and transformers 4 is absent", fix=f"type {COMMAND}")
    return str(python)


def make_environment() -> Path:
    """Make the environment and install the peer; return its directory."""
    folder = environment_folder()
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
    version = f"python{sys.version_info.major}.{sys.version_info.minor}"
    path = folder / "lib" / version / "site-packages" / "parent.pth"
    path.write_text(sysconfig.get_paths()["purelib"] + "\n", encoding="utf-8")
    install = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if subprocess.run([*install, *REQUIREMENTS], check=False).returncode:
        shutil.rmtree(folder)
        raise UserError(f"pip could not install {' and '.join(REQUIREMENTS)}", fix=f"type {COMMAND} with a network")
    return folder
