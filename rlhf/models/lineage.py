"""Lineage of weights: the chain from a model through its adapters to the model whose weights were all trained.

A run trained with an adapter saves two directories: ``model/``, all weights with the adapter merged in, and
``adapter/``, the adapter alone with ``base.json``, which names the adapter's base weights by path and digest. So a
policy trained with LoRA on an SFT model that was itself trained with LoRA is a chain of three: policy, SFT model,
pretrained model. Two models whose chains meet can be held as adapters on the weights where they meet. No torch here.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlhf.errors import UserError, key
from rlhf.runs import run_files

BASE_FILE = "base.json"
_WHOLE = 2**30  # bytes; of a larger file only evenly spread blocks are hashed, including its first and last
COPY_ADAPTER_AGAIN = "copy the adapter's directory again"
SEPARATE = f"type {key('adapter.shared_base', 'false')}"  # each role then holds its own weights
_BLOCK, _BLOCKS = 2**16, 2**10


@dataclass(frozen=True)
class Node:
    """Model in a chain.

    Args:
        path: Model directory, hub id, GGUF file, or directory of an adapter alone.
        adapter: Directory of the adapter if this model is the next model of the chain plus that adapter; else None.
    """

    path: str
    adapter: Path | None = None

    @property
    def whole(self) -> bool:
        """Return whether ``path`` holds all the weights, and not an adapter alone."""
        return self.adapter is None or Path(self.path).absolute() != self.adapter.absolute()


@dataclass(frozen=True)
class Planned:
    """Model that an earlier step of the plan has yet to make.

    Args:
        adapter: Directory that its adapter will have; None if all its weights are trained.
        base: Path of the model under that adapter.
        decompose: Whether the adapter is DoRA.
    """

    adapter: Path | None = None
    base: str | None = None
    decompose: bool = False


def adapter_path(folder: Path) -> Path:
    """Return the directory of a model's adapter: ``adapter`` beside a run's ``model``, or inside any other."""
    run = folder.name.lstrip(".") == "model"  # a run first saves under a hidden name
    return (folder.parent if run else folder) / "adapter"


def write_base(adapter: Path, base: str) -> None:
    """Record an adapter's base beside it: its path, its path relative to the adapter, and the digest of its weights."""
    content = {"path": base, "digest": digest(base)}
    if Path(base).exists():
        content["path"] = str(Path(base).absolute())
        content["relative"] = os.path.relpath(Path(base).absolute(), adapter.absolute())
    (adapter / BASE_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def find_base(adapter: Path) -> str:
    """Return the path of the model that an adapter was trained on, after checking that its weights are unchanged.

    Raises:
        UserError: If that model no longer exists or its weights have changed.
    """
    file = adapter / BASE_FILE
    if not file.is_file():  # an adapter from elsewhere
        base = stored_config(adapter)["base_model_name_or_path"]
        if not base:
            raise UserError(
                f"{adapter}: its adapter_config.json does not name the base model",
                fix="write the path or hub id of that model into base_model_name_or_path",
            )
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
            f"{adapter}: was trained on other weights than {changed} has now",
            fix=f"train it again on those, or restore the weights with digest {stored['digest'][:19]}",
        )
    raise UserError(
        f"{adapter}: was trained on {stored['path']}, which no longer exists",
        fix="restore that model, or train the adapter again",
    )


def stored_base(adapter: Path) -> dict[str, Any]:
    """Return the record that `write_base` saved beside an adapter; `relative` is None for a base that is not a path.

    Raises:
        UserError: If the file is damaged.
    """
    name = run_files.optional(run_files.text)
    fields = {"path": run_files.text, "digest": name, "relative": name}
    return run_files.required(adapter / BASE_FILE, fields, f"{COPY_ADAPTER_AGAIN}, or train it again")


def stored_config(adapter: Path) -> dict[str, Any]:
    """Return the content of an adapter's adapter_config.json.

    Raises:
        UserError: If the file is damaged.
    """
    fields = {"base_model_name_or_path": run_files.optional(run_files.text)}
    return run_files.required(adapter / "adapter_config.json", fields, COPY_ADAPTER_AGAIN)


def resolve_adapters(path: str) -> tuple[list[Path], str]:
    """Return the adapters to apply, lowest first, and the path of the model to apply them to.

    Only directories that hold an adapter alone are followed.

    Raises:
        UserError: If the adapters form a cycle.
    """
    found: list[Path] = []
    while True:
        adapter = _adapter_of(path)
        if adapter is None or Node(path, adapter).whole:
            return found[::-1], path
        if adapter in found:
            raise _cycle_error(adapter)
        found.append(adapter)
        path = find_base(adapter)


def chain(path: str, planned: Mapping[str, Planned] | None = None) -> list[Node]:
    """Return the chain of a model: the model at ``path`` first, then each model below its adapter.

    Args:
        path: Directory as returned by ``CausalLM.folder``, hub id, or GGUF file.
        planned: Path -> model, for directories that do not exist yet.

    Raises:
        UserError: If the adapters form a cycle.
    """
    nodes: list[Node] = []
    while True:
        known = (planned or {}).get(path)
        adapter = _adapter_of(path) if known is None else known.adapter
        nodes.append(Node(path, adapter))
        if adapter is None:
            return nodes
        if any(path == node.path for node in nodes[:-1]):
            raise _cycle_error(adapter)
        path = find_base(adapter) if known is None else str(known.base)


def common_base(
    policy: str, others: Mapping[str, str], planned: Mapping[str, Planned] | None = None
) -> tuple[Node, dict[str, list[Path]]]:
    """Find the common base of the policy and all other models that is nearest to the policy.

    Args:
        policy: Path of the policy.
        others: Config key -> path of each model that shares the base.
        planned: Path -> model, for directories that do not exist yet.

    Returns:
        The common base, and for each path the adapters that turn the base into that model, lowest first.

    Raises:
        UserError: If a model has no weights in common with the policy's chain.
    """
    own = chain(policy, planned)
    lowest = next(index for index, node in enumerate(own) if node.whole)
    met: dict[str, tuple[list[Node], dict[int, int]]] = {}
    for option, path in others.items():
        nodes = chain(path, planned)
        places = {i: j for i, node in enumerate(own) for j, other in enumerate(nodes) if _same(node, other)}
        if not places:
            reason = "all of its weights were trained"
            if len(nodes) > 1:
                reason = f"its adapter was trained on {nodes[-1].path}"
            raise UserError(
                f"is not an adapter on the policy's base {own[lowest].path} ({reason}), so they cannot share it",
                fix=f"train it with LoRA on that model, or {SEPARATE}",
                option=option,
                value=path,
            )
        lowest = max(lowest, min(places))
        met[path] = (nodes, places)
    stacks = {policy: _adapters(own[:lowest])}
    for option, path in others.items():
        nodes, places = met[path]
        if lowest not in places:
            raise UserError(
                f"is not an adapter on {own[lowest].path}, the base that the other models share with the policy",
                fix=SEPARATE,
                option=option,
                value=path,
            )
        stacks[path] = _adapters(nodes[: places[lowest]])
    return own[lowest], stacks


def _cycle_error(adapter: Path) -> UserError:
    return UserError(f"{adapter}: the base models of its adapters form a cycle", fix=COPY_ADAPTER_AGAIN)


def _adapters(nodes: list[Node]) -> list[Path]:
    return [node.adapter for node in reversed(nodes) if node.adapter is not None]


def _adapter_of(path: str) -> Path | None:
    folder = Path(path)
    if not folder.is_dir():
        return None
    if not (folder / "config.json").exists():
        return folder if (folder / "adapter_config.json").exists() else None
    beside = adapter_path(folder)
    return beside if (beside / BASE_FILE).is_file() else None


def _same(one: Node, other: Node) -> bool:
    """Return whether two nodes hold the same weights: at the same path, or with the same digest."""
    if not (one.whole and other.whole):
        return False
    if one.path == other.path or (Path(one.path).exists() and Path(one.path).absolute() == Path(other.path).absolute()):
        return True
    digests = digest(one.path), digest(other.path)
    return digests[0] is not None and digests[0] == digests[1]


def digest(path: str) -> str | None:
    """Return a digest of the content of the weights at a path; None for a hub id that is not in this machine's cache.

    Tokenizer and configuration are excluded: they do not change the base of an adapter.
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
        raise UserError(f"{path}: has no weights ({', '.join(pattern)})", fix="get the model again")
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
    """Return the directory of a hub model in this machine's cache, or None."""
    from huggingface_hub import try_to_load_from_cache

    try:
        found = try_to_load_from_cache(name, "config.json")
    except ValueError:  # not a valid hub id
        return None
    return Path(found).parent if isinstance(found, str) else None
