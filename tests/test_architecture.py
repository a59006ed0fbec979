"""The architecture: which part of rlhf may import which, and what lies at the top.

Every import counts: at the top of a module, inside functions, and for type checking alone.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the bottom to the top. A part imports parts of lower layers, and none of its own layer or above.
LAYERS = (
    ("errors",),
    ("functional", "importing", "signatures", "console", "storage"),
    ("objective", "discovery", "runs"),
    ("data",),
    ("models",),
    ("sampler",),
    ("reward",),
    ("annotator", "logger"),
    ("callbacks",),
    ("stage",),
    ("evaluation",),
    ("planning",),
    ("running",),
    ("report", "inspection", "using", "testing"),
    ("cli",),
)
HEIGHT = {part: height for height, parts in enumerate(LAYERS) for part in parts} | {"rlhf": -1}  # it has the version
TOP = {
    "errors",
    "console",
    "discovery",
    "importing",
    "signatures",
    "objective",
    "testing",
}  # modules beside the packages


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of rlhf and of the built-in plugins."""
    found = {}
    for base in (ROOT, ROOT / "plugins"):
        pattern = "rlhf/**/*.py" if base == ROOT else "rlhf_*/*.py"
        for path in base.glob(pattern):
            parts = path.relative_to(base).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(module: str) -> Iterator[str]:
    """Modules of the project that a module imports, wherever in its code."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_bytes())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            inside = [f"{base}.{alias.name}" for alias in node.names]
            names = [one for one in inside if one in MODULES] or [base]
        yield from (name for name in names if name in MODULES and name != module)


GRAPH = {module: sorted(set(imports(module))) for module in MODULES}


def part(module: str) -> str:
    """The package or module directly in rlhf that a module belongs to; the package of a plugin."""
    parts = module.split(".")
    return parts[1] if parts[0] == "rlhf" and len(parts) > 1 else parts[0]


def test_every_part_has_a_layer() -> None:
    assert {part(module) for module in MODULES if module.startswith("rlhf.")} == set(HEIGHT) - {"rlhf"}


def test_only_these_modules_are_at_the_top() -> None:
    assert {path.stem for path in (ROOT / "rlhf").glob("*.py")} == TOP | {"__init__"}


def test_imports_go_down() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if module.startswith("rlhf.") and part(other) != part(module)
        if HEIGHT.get(part(other), len(LAYERS)) >= HEIGHT[part(module)]
    ]
    assert not wrong


def test_a_plugin_imports_no_plugin_and_nothing_above_stages() -> None:
    wrong = [
        f"{module} imports {other}"
        for module, others in GRAPH.items()
        for other in others
        if module.startswith("rlhf_") and part(other) != part(module)
        if HEIGHT.get(part(other), len(LAYERS)) > HEIGHT["stage"]
    ]
    assert not wrong


def test_no_module_imports_itself_through_others() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import rlhf.errors", {"rlhf.errors"}),
        ("def f():\n    from rlhf.data import records", {"rlhf.data.records"}),
        ("if TYPE_CHECKING:\n    from rlhf.data.records import Prompt", {"rlhf.data.records"}),
        ("from ..data import records", {"rlhf.data.records"}),
    ],
)
def test_imports_are_seen_wherever_they_are(
    source: str, found: set[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new.py").write_text(source)
    monkeypatch.setitem(MODULES, "rlhf.stage.new", tmp_path / "new.py")
    assert set(imports("rlhf.stage.new")) == found
