"""Digests of source code, which are part of a fingerprint. No torch here."""

import ast
import hashlib
import json
from collections.abc import Iterable
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from rlhf.runs.user_code import imported_names
from rlhf.storage.cache import Once, recall, remember

# Parts of rlhf that a stage reaches and that can change its result. Changes of all other code (planning, reports, the
# command, file writing, progress output) leave fingerprints unchanged; tests/runs/test_source_code.py compares this
# list with the imports of the stages.
COMPUTES = (
    "callbacks.reward_hacking",
    "data",
    "functional",
    "models",
    "objective",
    "reward",
    "annotator",
    "running.build",
    "sampler",
    "stage",
)
STARTS = ("rlhf.running.build",)  # not named in any config, but part of every run


@cache
def computes(module: str) -> bool:
    """Return whether a module of rlhf can change what a stage computes."""
    return any(f"{module}.".startswith(f"rlhf.{part}.") for part in COMPUTES)


def source_digest(targets: Iterable[str]) -> str:
    """Return the digest of rlhf's code that these classes and functions reach by imports.

    Comments, docstrings and code layout are excluded. Imports are found in the syntax trees, including those inside
    functions, and followed as long as they lead to the packages in `COMPUTES`.

    Args:
        targets: Dotted names, such as the `_target_` of each node of a config; names outside rlhf are ignored.
    """
    return reached_digest([*STARTS, *targets])


def reached_digest(names: Iterable[str]) -> str:
    """Return the digest of the modules of rlhf that dotted names lead to and that can change a result."""
    return _digest("rlhf", reached(names))


def reached(names: Iterable[str]) -> set[str]:
    """Return the modules of rlhf that dotted names lead to and that can change a result, chat templates included."""
    known = _read("rlhf")
    found: set[str] = set()
    waiting = list(names)
    while waiting:
        # Importing a.b.c runs a, a.b and a.b.c; a name after the last module is an object in it.
        parts = waiting.pop().split(".")
        for end in range(1, len(parts) + 1):
            module = ".".join(parts[:end])
            if module in known and module not in found and computes(module):
                found.add(module)
                waiting += known[module][1]
    folders = {module.rpartition(".")[0] for module in found}
    return found | {name for name in known if name.endswith(".jinja") and name.split(":")[0] in folders}


def package_digest(package: str) -> str | None:
    """Return the digest of all the code of rlhf or of a plugin; None for a library: summary.json has its version."""
    return None if package_folder(package) is None else _digest(package, _read(package))


def plugin_imports(package: str) -> list[str]:
    """Return the dotted names that the modules of a plugin import."""
    return [name for _, imports in _read(package).values() for name in imports]


def package_folder(package: str) -> Path | None:
    """Return the directory of rlhf or of a plugin; None for a library, which has no conf/."""
    spec = find_spec(package)
    places = list(spec.submodule_search_locations or ()) if spec else []
    folder = Path(places[0]) if places else None
    return folder if folder is not None and (package == "rlhf" or (folder / "conf").is_dir()) else None


def _digest(package: str, modules: Iterable[str]) -> str:
    """Return the digest of these modules of a package."""
    known, total = _read(package), hashlib.sha256()
    for module in sorted(modules):
        total.update(f"{module}\0{known[module][0]}\0".encode())
    return total.hexdigest()


_once = Once("sources")
sources_read_once = _once.open  # for all steps of a plan


def _read(package: str) -> dict[str, tuple[str, list[str]]]:
    """Return module -> its digest and the names that it imports; a chat template is `package:file.jinja`."""
    folder = package_folder(package)
    return {} if folder is None else _once.get(package, lambda: read_folder(package, folder))


def read_folder(package: str, folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Read the code of a package and return module -> (digest, imported names); its tests and conf/ are excluded."""
    files = [
        (path.relative_to(folder), path, path.stat())
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.jinja")])
        if not {"tests", "conf"} & set(path.relative_to(folder).parts)
    ]
    # Parsing takes seconds; results are cached by the files' sizes and modification times.
    state = json.dumps([str(folder), [(str(name), stat.st_size, stat.st_mtime_ns) for name, _, stat in files]])
    key = hashlib.sha256(state.encode()).hexdigest()
    with suppress(ValueError):  # a damaged cache file is rewritten
        known = json.loads(recall("code", key) or "{}")
        if known:
            return {module: (digest, imports) for module, (digest, imports) in known.items()}
    found: dict[str, tuple[str, list[str]]] = {}
    for name, path, stat in files:
        parts = [package, *name.with_suffix("").parts]
        if path.suffix == ".jinja":  # in a directory beside the module that reads it
            found[f"{'.'.join([package, *name.parts[:-2]])}:{name.name}"] = (code_digest(path, stat.st_mtime_ns), [])
            continue
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[module] = (code_digest(path, stat.st_mtime_ns), imported_names(path, module, stat.st_mtime_ns))
    remember("code", key, json.dumps(found))
    return found


@cache
def code_digest(path: Path, changed_ns: int) -> str:
    """Return the digest of a file's code without comments, docstrings and layout; of its bytes if it is not Python."""
    if path.suffix != ".py":
        return hashlib.sha256(path.read_bytes()).hexdigest()
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return hashlib.sha256(path.read_bytes()).hexdigest()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and (
            ast.get_docstring(node, clean=False) is not None
        ):
            node.body = node.body[1:]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()
