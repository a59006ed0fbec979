"""Export of a model as a directory that plain transformers and peft load, with a model card.

torch is imported only if weights have to be loaded.
"""

import json
import shlex
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from rlhf.errors import UserError
from rlhf.models import gguf_source
from rlhf.models.gguf_source import GGUFSource
from rlhf.models.lineage import stored_base, stored_config
from rlhf.models.saved_config import check_file_limits, read_config, score_scale
from rlhf.runs import run_directory
from rlhf.storage import links
from rlhf.using import named
from rlhf.using.named import Named

Kind = Literal["model", "adapter", "reward_model"]
# Files of a model directory: the only ones that --force removes.
# fmt: off
PARTS = (
    "*.safetensors", "*.safetensors.index.json", "config.json", "generation_config.json", "adapter_config.json",
    "base.json", "gguf.json", "rlhf.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja",
    "README.md",
)
# fmt: on
WEIGHTS = ("*.safetensors", "*.safetensors.index.json", "*.bin")
SAFETY_HEAD = "safety_head.safetensors"


@dataclass
class Exported:
    """Description of an export.

    Attributes:
        kind: A language model with all its weights, an adapter alone, or a reward model.
        folder: The directory.
        base: The base of an adapter: a model directory, a GGUF file or a hub id.
        source: The GGUF file that this base was dequantised from, if any.
        bias: The number to add to a reward model's output.
        notes: Notes for the user of the directory, one line each.
    """

    kind: Kind
    folder: Path
    base: str | None = None
    source: GGUFSource | None = None
    bias: float | None = None
    notes: list[str] = field(default_factory=list)


def prepare(folder: Path, force: bool) -> None:
    """Create the directory, or remove the model files from it.

    Raises:
        UserError: It is a file, belongs to a run, or is not empty and ``force`` is not set.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError("is a file", fix="type the path of a directory", option="--to", value=folder)
    if run_directory.run_of(folder.absolute()) is not None:
        problem = "is inside a run directory, whose files must not change"
        raise UserError(problem, fix="type another directory", option="--to", value=folder)
    if folder.is_dir() and any(folder.iterdir()) and not force:
        fix = "type another directory, or type --force to replace a model in it"
        raise UserError("is not empty", fix=fix, option="--to", value=folder)
    folder.mkdir(parents=True, exist_ok=True)
    for pattern in PARTS:
        for file in folder.glob(pattern):
            file.unlink()


def adapter_of(model: Named) -> Path | None:
    """Return the directory of a model's separate adapter in PEFT's format; None if all weights were trained."""
    places = [Path(model.path)] if model.run is None else [model.run.folder / "adapter"]
    return next((place for place in places if (place / "adapter_config.json").is_file()), None)


def export(model: Named, folder: Path, merge: bool, force: bool = False) -> Exported:
    """Write the model's directory, except for the card.

    Args:
        model: A run's model of either kind, a model or adapter directory, a GGUF file or a hub id.
        folder: The directory to write.
        merge: Write the weights with the adapter merged into them, even if the adapter could be written alone.
        force: Replace a model that is in the directory.

    Raises:
        UserError: The directory cannot be used, an adapter has no base that others could load, a file is a link out of
            the run, or the model needs Python code that came with it.
    """
    adapter = None if merge or named.scalar(model.path) else adapter_of(model)
    base = None if adapter is None else _base(model, adapter)
    if folder.resolve() == Path(model.path).resolve():
        raise UserError("is the model itself", fix="type another directory", option="--to", value=folder)
    for inside in (Path(model.path), *([adapter] if adapter else [])):
        _refuse_links(inside, model)
    prepare(folder, force)
    if named.scalar(model.path):
        return _reward_model(Path(model.path), folder)
    if adapter is not None:
        assert base is not None
        return _adapter(model, adapter, base, folder)
    if (Path(model.path) / "config.json").is_file():
        if read_config(model.path) is None:
            raise UserError(f"{model.path}/config.json: is not a JSON object", fix="get the model again")
        _copy(Path(model.path), folder, ("*",))
        return Exported("model", folder)
    from rlhf.evaluation.compare import load_policy
    from rlhf.models.precision import Precision

    # A hub id, a GGUF file, or an adapter, which is merged in float32.
    load_policy(model.path, precision=Precision("32-true")).to("cpu").save(folder)
    return Exported("model", folder)


def _refuse_links(inside: Path, model: Named) -> None:
    """Raise for a directory with a link that would copy a file from elsewhere into the export."""
    root = inside if model.run is None else model.run.folder
    if model.run is None and inside.parent.name == "snapshots":
        root = inside.parents[1]  # the hub's cache stores files beside the snapshots, which link to them
    if (link := links.first_outside(inside, root)) is not None:
        problem = f"{link}: is a link to {link.resolve()}, outside of {root}"
        raise UserError(problem, fix="replace the link by the file itself")


def _adapter(model: Named, adapter: Path, base: str, folder: Path) -> Exported:
    """Write the adapter with the name of its base, and the tokenizer that it was trained with."""
    inside = Path(model.path)
    _copy(inside, folder, ("*",), (*WEIGHTS, "config.json", "rlhf.json", "README.md"))
    _copy(adapter, folder, ("adapter_config.json", *WEIGHTS))
    file = folder / "adapter_config.json"
    config = stored_config(folder)
    config["base_model_name_or_path"] = base
    file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    found = Exported("adapter", folder, base, gguf_source.read(Path(base)))
    if found.source is not None:
        found.notes += _of_gguf(base, found.source)
    elif Path(base).exists():
        found.notes.append(f"the adapter needs its base, {base}; --merge writes a model that needs no base")
    return found


def _of_gguf(base: str, source: GGUFSource) -> list[str]:
    """Return the notes for an adapter whose base is dequantised weights, which are not on the hub."""
    file = shlex.quote(source.path)
    if source.package:
        file = (
            f'"$(python -c "from rlhf.storage.hub import packaged_file; print(packaged_file(\'{source.package}\'))")"'
        )
    first = f"`{source.install}`, then the code in the card, or " if source.install else ""
    return [
        f"the adapter's base is {source}, dequantised to float32: close to the hub model that the file was made from, "
        f"but not equal to it; on this machine it is {base}, which adapter_config.json names",
        f"on another machine: {first}`rlhf export {file} --to base` for the base as a directory; --merge writes a "
        "model that needs no base",
    ]


def _base(model: Named, adapter: Path) -> str:
    """Return the weights that an adapter was trained on, in a form that others can load."""
    path = _named_base(model, adapter)
    if not path:
        problem = "its adapter was trained on random weights, which are stored nowhere else"
        raise UserError(problem, "type --merge", "RUN", model.ref)
    place = Path(path).expanduser()
    if (place / "model" / "config.json").is_file() and not (place / "config.json").is_file():
        place = place / "model"
    if place.is_dir() and not (place / "config.json").is_file():
        raise UserError(f"its adapter was trained on another adapter ({place})", "type --merge", "RUN", model.ref)
    if not place.exists() and (place.is_absolute() or path.endswith(".gguf") or path.count("/") > 1):
        raise UserError(f"the base of its adapter, {path}, does not exist", "type --merge", "RUN", model.ref)
    return str(place.resolve()) if place.exists() else str(path)


def _named_base(model: Named, adapter: Path) -> str | None:
    """Return the base that the adapter's own files name, or else the run's config."""
    if (adapter / "base.json").is_file():
        stored = stored_base(adapter)
        beside = adapter / (stored["relative"] or "")
        return str(stored["path"] if Path(stored["path"]).exists() or not stored["relative"] else beside.resolve())
    if model.run is None:
        path = stored_config(adapter)["base_model_name_or_path"]
        return None if path is None else str(path)
    path = (model.run.plain_config.get("model") or {}).get("path")
    return None if path is None else str(named.moved(Path(path), model.run)) if "/" in path else str(path)


def _reward_model(source: Path, folder: Path) -> Exported:
    """Write a reward model with the scale of its scores merged into the head; transformers' heads have no bias."""
    from transformers import AutoModelForSequenceClassification
    from transformers.utils import logging

    from rlhf.models.load_errors import check_loaded, convert_read_errors

    if not sys.stderr.isatty():
        logging.disable_progress_bar()
    check_file_limits(read_config(source) or {}, source)
    numbers = score_scale(source) or {"scale": 1.0, "bias": 0.0}
    _copy(source, folder, ("*",), (*WEIGHTS, "README.md"))
    kind: Any = AutoModelForSequenceClassification
    with convert_read_errors(source):
        try:
            model, report = kind.from_pretrained(
                source, dtype="auto", trust_remote_code=False, output_loading_info=True
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):  # transformers has no class of its own for this error
                raise
            problem = f"{source}: the model needs Python code that came with it, and export runs none"
            raise UserError(problem, fix="copy the directory as it is") from error
        check_loaded(model, report, source)
    model.score.weight.data.mul_(numbers["scale"])
    model.save_pretrained(folder)
    numbers |= {"scale": 1.0}
    (folder / "rlhf.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    found = Exported("reward_model", folder, bias=float(numbers["bias"]))
    found.notes.append(
        f"scores are normalised: the head includes the scale, and the bias {found.bias:.6g} has to be added (it "
        "changes no comparison of two responses)"
    )
    if (source / SAFETY_HEAD).is_file():
        _copy(source, folder, (SAFETY_HEAD,))
        found.notes.append(f"{SAFETY_HEAD} holds the auxiliary safety head, which transformers does not read")
    return found


def _copy(source: Path, folder: Path, patterns: tuple[str, ...], but: tuple[str, ...] = ()) -> None:
    """Copy the content of files, but not their permissions, so that private files become readable in the export."""
    if not source.is_dir():
        return
    left_out = {file for pattern in but for file in source.glob(pattern)}
    for pattern in patterns:
        for file in sorted(source.glob(pattern)):
            if file.is_file() and file not in left_out:
                shutil.copyfile(file, folder / file.name)
