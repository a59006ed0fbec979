"""Models named on the command line: a run's model, a model directory, a GGUF file or a hub id.

This module imports no torch.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf.errors import UserError
from rlhf.models.saved_config import is_scalar_model
from rlhf.planning import references
from rlhf.runs.run_directory import Run
from rlhf.storage.plain import Plain, targets


@dataclass(frozen=True)
class Named:
    """Model as it was typed.

    Attributes:
        ref: The word as typed.
        path: The model directory, file or hub id.
        run: The run that made the model; None if it is not from a run.
    """

    ref: str
    path: str
    run: Run | None = None

    @property
    def label(self) -> str:
        """Return the name for tables: the last two parts of the run directory or of the path."""
        place = Path(self.path if self.run is None else self.run.folder)
        return "/".join(place.parts[-2:]).removeprefix("/")

    @property
    def slug(self) -> str:
        """Return the name for use in file names."""
        return "-".join(part for part in self.label.replace(":", "-").split("/") if part not in ("", ".", ".."))

    def home(self, outputs: Path, kind: str) -> Path:
        """Return the directory for results about the model: the run's own, else OUTPUTS/KIND/NAME."""
        return self.run.folder if self.run is not None else outputs / kind / self.slug


def policy(ref: str, outputs: Path, option: str = "RUN") -> Named:
    """Return the language model that ``ref`` names, the value of ``option``.

    Raises:
        UserError: There is none, its run is not finished, or it is a reward or value model.
    """
    named = _model(ref, "policy", outputs, option)
    if scalar(named.path):
        problem = "is a reward or value model, which generates no text"
        raise UserError(problem, fix="type a run of a policy", option=option, value=ref)
    return named


def reward_model(ref: str, outputs: Path, option: str = "--reward-model") -> Named:
    """Return the reward model that ``ref`` names, the value of ``option``.

    Raises:
        UserError: There is none, its run is not finished, or it is a language model.
    """
    named = _model(ref, "reward_model", outputs, option)
    if Path(named.path).is_dir() and not scalar(named.path):
        raise UserError("is not a reward model", "type a run of stage=reward_model", option, ref)
    return named


def model(ref: str, outputs: Path, option: str = "RUN") -> Named:
    """Return the model of either kind that ``ref`` names, the value of ``option``.

    Raises:
        UserError: There is none.
    """
    return _model(ref, "policy", outputs, option)


def _model(ref: str, role: str, outputs: Path, option: str) -> Named:
    found = references.resolve(ref, role, outputs, option)
    return Named(ref, found.path, None if found.run is None else Run(found.run))


def scalar(path: str) -> bool:
    """Return whether a model directory holds a reward or value model; False if it does not exist."""
    return bool(is_scalar_model(path))


# Lineage


def ancestors(run: Run) -> list[Run]:
    """Return all runs that a run was made from, each before those made from it.

    A removed run is returned as a `Run` of a directory without files. A directory that is not where the lineage records
    it (outputs/ was moved) is looked up beside the run.
    """
    known: Plain = run.lineage.get("ancestors", {})
    ordered: list[str] = []
    seen: set[str] = set()

    def visit(fingerprint: str) -> None:
        if fingerprint in seen or fingerprint not in known:
            return
        seen.add(fingerprint)
        for parent in known[fingerprint].get("parents") or ():
            visit(str(parent))
        ordered.append(fingerprint)

    for fingerprint in known:
        visit(fingerprint)
    return [Run(moved(Path(str(known[fingerprint].get("folder"))), run)) for fingerprint in ordered]


def moved(folder: Path, run: Run) -> Path:
    """Return ``folder``, or its new place if the outputs directory of ``run`` was moved."""
    if folder.exists():
        return folder
    depth = 3 if folder.name == "model" else 2
    here = run.folder.parent.parent.joinpath(*folder.parts[-depth:])
    return here if here.exists() else folder


def started_from(run: Run) -> str | None:
    """Return the model that a run's policy started from, the reference of its KL; None for random weights."""
    config = _config(run)
    reference = (config.get("inputs") or {}).get("reference") or (config.get("model") or {}).get("path")
    if reference is None:
        return None
    return str(moved(Path(reference), run)) if Path(reference).is_absolute() or "/" in reference else str(reference)


def testbed(run: Run) -> Plain | None:
    """Return the config node of the testbed's world that a run or an ancestor was trained on; None without one."""
    for one in (run, *reversed(ancestors(run))):
        for node in _worlds(_config(one)):
            return node
    return None


def _worlds(config: Plain) -> Iterator[Plain]:
    for _, node in targets(config.get("data") or {}):
        if node.get("source") == "testbed" and isinstance(node.get("testbed"), dict):
            yield node["testbed"]


def _config(run: Run) -> Plain:
    return run.plain_config
