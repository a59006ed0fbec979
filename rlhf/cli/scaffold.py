"""Generator of a new plugin's files; the plugin runs unchanged."""

import keyword
from importlib.util import find_spec
from pathlib import Path
from string import Template

from rlhf.cli.help import options
from rlhf.errors import UserError, suggest

TEMPLATES = Path(__file__).parent / "templates"


def kinds() -> list[str]:
    """Return the kinds of plugin that can be generated: the directories of templates."""
    return sorted(path.name for path in TEMPLATES.iterdir() if path.is_dir())


def write(name: str, kind: str, parent: Path) -> tuple[Path, str]:
    """Write the plugin ``parent/name``.

    Returns:
        Its directory, and commands that use it.

    Raises:
        UserError: the name is not a valid package name, or is taken.
    """
    if kind not in kinds():
        raise UserError(f"no such kind{suggest(kind, kinds())}", option="--kind", value=kind)
    if not name.isidentifier() or keyword.iskeyword(name) or name != name.lower():
        problem = f"{name}: is not a valid package name (lower-case letters, digits and _)"
        raise UserError(problem, fix=f"type, for example, my_{kind}")
    folder = parent / name
    if folder.exists():
        raise UserError(f"{folder} exists already", fix="type another name, or remove it")
    if find_spec(name) is not None:
        problem = f"{name} is the name of an installed package, which the plugin would hide"
        raise UserError(problem, fix="type another name")
    owner = options().get(kind, {}).get(name)
    if owner is not None:
        raise UserError(f"exists already, in {owner}", fix="type another name", option=kind, value=name)
    sources = sorted((TEMPLATES / kind).glob("*.tmpl"))
    module = next(path.stem for path in sources if path.stem.endswith(".py"))
    words = {
        "name": name,
        "package": name,
        "dashed": name.replace("_", "-"),
        "title": name.replace("_", " ").capitalize(),
        "Class": "".join(part.capitalize() for part in name.split("_")),
        "folder": folder.as_posix(),
        "module": module,
    }
    words["next"] = Template((TEMPLATES / kind / "next.txt.tmpl").read_text(encoding="utf-8")).substitute(words).strip()
    files = {"__init__.py": f'"""{words["title"]}."""\n'}
    for source in [*sources, TEMPLATES / "README.md.tmpl", TEMPLATES / "pyproject.toml.tmpl"]:
        place = f"conf/{kind}/{name}.yaml" if source.stem == "option.yaml" else source.stem
        if place != "next.txt":
            files[place] = Template(source.read_text(encoding="utf-8")).substitute(words)
    for place, text in files.items():
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).write_text(text, encoding="utf-8")
    return folder, words["next"]
