"""What a word on the command line means: a run's model, a model folder, a GGUF file, a hub id. No torch here."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rlhf import runs
from rlhf.config import Plain, targets
from rlhf.errors import UserError
from rlhf.model_config import scores
from rlhf.runs import Run


@dataclass(frozen=True)
class Named:
    """A model as it was typed.

    Attributes:
        ref: What was typed.
        path: The model folder, file or hub id.
        run: The run that made it; None where no run did.
    """

    ref: str
    path: str
    run: Run | None = None

    @property
    def label(self) -> str:
        """Its name in tables: the last two parts of the run's folder, or of the path."""
        place = Path(self.path if self.run is None else self.run.folder)
        return "/".join(place.parts[-2:]).removeprefix("/")

    @property
    def slug(self) -> str:
        """Its name in names of files."""
        return "-".join(part for part in self.label.replace(":", "-").split("/") if part not in ("", ".", ".."))

    def home(self, outputs: Path, kind: str) -> Path:
        """The folder for results about it: the run's own, else OUTPUTS/KIND/NAME."""
        return self.run.folder if self.run is not None else outputs / kind / self.slug


def policy(ref: str, outputs: Path, key: str = "RUN") -> Named:
    """The language model that is meant.

    Raises:
        UserError: there is none, its run is not finished, or it is a reward model.
    """
    named = _model(ref, "policy", outputs, key)
    if scalar(named.path):
        raise UserError(f"{key}={ref}: is a reward or value model, which writes nothing; name a policy's run")
    return named


def reward_model(ref: str, outputs: Path, key: str = "--reward-model") -> Named:
    """The reward model that is meant.

    Raises:
        UserError: there is none, its run is not finished, or it is a language model.
    """
    named = _model(ref, "reward_model", outputs, key)
    if Path(named.path).is_dir() and not scalar(named.path):
        raise UserError(f"{key}={ref}: is no reward model; name a run of stage=reward_model")
    return named


def model(ref: str, outputs: Path, key: str = "RUN") -> Named:
    """The model of either kind that is meant. Raises UserError where there is none."""
    return _model(ref, "policy", outputs, key)


def _model(ref: str, role: str, outputs: Path, key: str) -> Named:
    found = runs.resolve(ref, role, outputs, key)
    return Named(ref, found.path, None if found.run is None else Run(found.run))


def scalar(path: str) -> bool:
    """Whether a model folder holds a reward or value model. False for what is not there to be looked at."""
    return bool(scores(path))


# Lineage


def ancestors(run: Run) -> list[Run]:
    """All runs that a run was made from, each before those made from it; those since removed are folders without files.

    A folder that is not where the lineage says (outputs/ was moved) is looked for beside the run.
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
    """``folder``, or where it lies now that the outputs folder of ``run`` has been moved."""
    if folder.exists():
        return folder
    depth = 3 if folder.name == "model" else 2
    here = run.folder.parent.parent.joinpath(*folder.parts[-depth:])
    return here if here.exists() else folder


def started_from(run: Run) -> str | None:
    """The model that a run's policy started from, which its KL is measured against; None for random weights."""
    config = _config(run)
    reference = (config.get("inputs") or {}).get("reference") or (config.get("model") or {}).get("path")
    if reference is None:
        return None
    return str(moved(Path(reference), run)) if Path(reference).is_absolute() or "/" in reference else str(reference)


def testbed(run: Run) -> Plain | None:
    """The testbed's world that a run or one of its ancestors learnt from (a node of a config); None without one."""
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
