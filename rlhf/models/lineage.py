"""Which weights an adapter sits on: the chain from a model down to the one whose weights were trained whole.

A run trained with an adapter leaves two folders: ``model/``, all weights with the adapter merged in, and ``adapter/``,
the adapter alone with ``base.json``, which names the weights it sits on by path and by digest. So a policy trained with
LoRA on an SFT model that was itself trained with LoRA is a chain of three: policy, SFT model, pretrained model. Two
models whose chains meet can be held as adapters on the weights where they meet. No torch here.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlhf import run_files
from rlhf.errors import UserError

BASE_FILE = "base.json"
_WHOLE = 2**30  # bytes; of a larger file evenly spread blocks are read, among them its beginning
ANEW = "copy the adapter's folder anew"
_BLOCK, _BLOCKS = 2**16, 2**10


@dataclass(frozen=True)
class Node:
    """A model of a chain.

    Args:
        path: Model folder, hub id, GGUF file, or folder of an adapter alone.
        adapter: The adapter's folder, where the model is the next one of the chain with an adapter on it.
    """

    path: str
    adapter: Path | None = None

    @property
    def whole(self) -> bool:
        """Whether all its weights lie at ``path``, and not an adapter alone."""
        return self.adapter is None or Path(self.path).absolute() != self.adapter.absolute()


@dataclass(frozen=True)
class Planned:
    """A model that is yet to be made.

    Args:
        adapter: Where its adapter will lie; None where all its weights are trained.
        base: The model under that adapter.
        decompose: Whether the adapter is DoRA.
    """

    adapter: Path | None = None
    base: str | None = None
    decompose: bool = False


def adapter_beside(folder: Path) -> Path:
    """Where the adapter of a model folder is kept: ``adapter`` beside a run's ``model``, and within any other."""
    run = folder.name.lstrip(".") == "model"  # a run saves under a hidden name first
    return (folder.parent if run else folder) / "adapter"


def write_base(adapter: Path, base: str) -> None:
    """Leaves beside an adapter what it sits on: the path as given, seen from the adapter, and the weights' digest."""
    content = {"path": base, "digest": digest(base)}
    if Path(base).exists():
        content["path"] = str(Path(base).absolute())
        content["relative"] = os.path.relpath(Path(base).absolute(), adapter.absolute())
    (adapter / BASE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def base_of(adapter: Path) -> str:
    """The model that an adapter sits on; its weights are those it was trained on.

    Raises:
        UserError: If that model is not there any more, or has other weights by now.
    """
    file = adapter / BASE_FILE
    if not file.is_file():  # an adapter from elsewhere
        base = stored_config(adapter)["base_model_name_or_path"]
        if not base:
            raise UserError(f"{adapter}: the adapter does not say which model it belongs to")
        return str(base)
    stored = stored_base(adapter)
    places = [stored["path"], *([str((adapter / stored["relative"]).resolve())] if stored["relative"] else [])]
    changed = None
    for place in dict.fromkeys(places):
        if Path(place).exists() or not stored["relative"]:
            now = digest(place)
            if now == stored["digest"] or None in (now, stored["digest"]):
                return place
            changed = place
    if changed:
        raise UserError(
            f"{adapter} was trained on other weights than {changed} holds now: train it again on those, or put back "
            f"weights of digest {stored['digest'][:19]}"
        )
    raise UserError(f"{adapter} was trained on {stored['path']}, which is not there any more: put it back")


def stored_base(adapter: Path) -> dict[str, Any]:
    """Return what `write_base` left beside an adapter; `relative` is None for a base that was no path.

    Raises:
        UserError: The file is damaged.
    """
    name = run_files.optional(run_files.text)
    fields = {"path": run_files.text, "digest": name, "relative": name}
    return run_files.required(adapter / BASE_FILE, fields, f"{ANEW}, or train it again")


def stored_config(adapter: Path) -> dict[str, Any]:
    """Return an adapter's adapter_config.json. Raises UserError where it is damaged."""
    fields = {"base_model_name_or_path": run_files.optional(run_files.text)}
    return run_files.required(adapter / "adapter_config.json", fields, ANEW)


def adapters_alone(path: str) -> tuple[list[Path], str]:
    """The adapters to be put on a model, lowest first, and that model: those of folders that hold an adapter alone."""
    found: list[Path] = []
    while True:
        adapter = _adapter_of(path)
        if adapter is None or Node(path, adapter).whole:
            return found[::-1], path
        if adapter in found:
            raise UserError(f"{adapter}: the adapters sit on each other in a circle")
        found.append(adapter)
        path = base_of(adapter)


def chain(path: str, planned: Mapping[str, Planned] | None = None) -> list[Node]:
    """The model at ``path`` (a folder as ``CausalLM.folder`` gives it, a hub id, a GGUF file) and all it sits on.

    ``planned`` says it of folders that are not there yet.
    """
    nodes: list[Node] = []
    while True:
        known = (planned or {}).get(path)
        adapter = _adapter_of(path) if known is None else known.adapter
        nodes.append(Node(path, adapter))
        if adapter is None:
            return nodes
        if any(path == node.path for node in nodes[:-1]):
            raise UserError(f"{adapter}: the adapters sit on each other in a circle")
        path = base_of(adapter) if known is None else str(known.base)


def common_base(
    policy: str, others: Mapping[str, str], planned: Mapping[str, Planned] | None = None
) -> tuple[Node, dict[str, list[Path]]]:
    """The weights on which the policy and all others sit, as near to the policy as possible.

    Args:
        policy: Path of the policy.
        others: Key (what is typed to name it) -> path of each model that is to share them.
        planned: Of folders that are yet to be made, what they will sit on.

    Returns:
        That model, and for each path the adapters that make it of that model, lowest first.

    Raises:
        UserError: If one of them does not sit on any weights of the policy's chain.
    """
    own = chain(policy, planned)
    lowest = next(index for index, node in enumerate(own) if node.whole)
    met: dict[str, tuple[list[Node], dict[int, int]]] = {}
    for key, path in others.items():
        nodes = chain(path, planned)
        places = {i: j for i, node in enumerate(own) for j, other in enumerate(nodes) if _same(node, other)}
        if not places:
            below = "all of its weights were trained" if len(nodes) == 1 else f"its adapter is for {nodes[-1].path}"
            raise UserError(
                f"{key}={path} does not sit on the policy's base {own[lowest].path} ({below}), so they cannot share "
                "it: train it with adapter=lora on that model, or type adapter.shared_base=false"
            )
        lowest = max(lowest, min(places))
        met[path] = (nodes, places)
    stacks = {policy: _adapters(own[:lowest])}
    for key, path in others.items():
        nodes, places = met[path]
        if lowest not in places:
            raise UserError(
                f"{key}={path} does not sit on {own[lowest].path}, where the others meet the policy: "
                "type adapter.shared_base=false"
            )
        stacks[path] = _adapters(nodes[: places[lowest]])
    return own[lowest], stacks


def _adapters(nodes: list[Node]) -> list[Path]:
    return [node.adapter for node in reversed(nodes) if node.adapter is not None]


def _adapter_of(path: str) -> Path | None:
    folder = Path(path)
    if not folder.is_dir():
        return None
    if not (folder / "config.json").exists():
        return folder if (folder / "adapter_config.json").exists() else None
    beside = adapter_beside(folder)
    return beside if (beside / BASE_FILE).is_file() else None


def _same(one: Node, other: Node) -> bool:
    """Whether two nodes hold the same weights: at the same place, or with the same digest."""
    if not (one.whole and other.whole):
        return False
    if one.path == other.path or (Path(one.path).exists() and Path(one.path).absolute() == Path(other.path).absolute()):
        return True
    digests = digest(one.path), digest(other.path)
    return digests[0] is not None and digests[0] == digests[1]


def digest(path: str) -> str | None:
    """Names the weights at a path by their content, wherever they lie; None for a hub id that is not on this machine.

    Tokenizer and configuration do not count: they do not change what an adapter sits on.
    """
    place = Path(path)
    if not place.exists():
        found = of_hub(path)
        if found is None:
            return None
        place = found
    pattern = ("*.safetensors", "*.bin", "*.gguf")
    files = [place] if place.is_file() else sorted(file for ending in pattern for file in place.glob(ending))
    if not files:
        raise UserError(f"{path}: there are no weights (*.safetensors)")
    total = hashlib.sha256()
    for file in files:
        stat = file.stat()
        total.update(_digest_of(file.absolute(), stat.st_size, stat.st_mtime_ns))
    return f"sha256:{total.hexdigest()}"


@cache
def _digest_of(file: Path, size: int, changed_ns: int) -> bytes:
    with file.open("rb") as content:
        if size <= _WHOLE:
            return hashlib.file_digest(content, "sha256").digest()
        total = hashlib.sha256(str(size).encode())
        for block in range(_BLOCKS):
            content.seek(block * (size - _BLOCK) // (_BLOCKS - 1))
            total.update(content.read(_BLOCK))
        return total.digest()


def of_hub(name: str) -> Path | None:
    """The folder of a hub model in the cache of this machine."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # no name of the hub at all
        return None
    return Path(found).parent if isinstance(found, str) else None
