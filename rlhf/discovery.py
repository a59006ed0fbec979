"""Find plugins and put their conf/ folders on Hydra's search path.

A plugin is a Python package with a conf/ folder. It is found in one of three ways: an installed distribution
names it in the entry-point group ``rlhf.plugins``; it is a folder in ``./plugins`` or in a directory listed in
``RLHF_PLUGINS``; or it stands in ``plugins/`` of the checkout that this package runs from. No plugin code runs
here, so a broken plugin breaks only the runs that select it. Hydra and the standard library only.
"""

import os
import sys
import sysconfig
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin

from rlhf.cache import Once
from rlhf.errors import UserError

ENTRY_POINTS = "rlhf.plugins"
DIRECTORY = "RLHF_DIRECTORY"  # names the directory in which the command was typed, to the processes that it starts


@dataclass(frozen=True)
class Plugin:
    """One provider of config options.

    Attributes:
        name: what the user calls it: the package without its ``rlhf_`` prefix.
        package: import name, the same as the folder's.
        folder: the package folder.
        origin: where it was found, in words: "checkout", "./plugins", or "NAME VERSION" of a distribution.
    """

    name: str
    package: str
    folder: Path
    origin: str

    @property
    def conf(self) -> Path:
        return self.folder / "conf"

    def options(self) -> Iterator[str]:
        """The config options it offers, as "group/option"."""
        return options(self.conf)


def options(conf: Path) -> Iterator[str]:
    """Every YAML below a conf folder as "group/option" (nested groups keep their slashes), sorted."""
    for path in sorted(conf.rglob("*.yaml")):
        yield path.relative_to(conf).with_suffix("").as_posix()


def conf_dir() -> Path:
    """The shared config tree: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def user_conf() -> Path | None:
    """The user's own ./conf, whose options override everyone's; None when absent or when it is this project's."""
    try:
        own = Path("conf").resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise UserError(f"conf: cannot be read ({error}); remove the link") from error
    return own if own.is_dir() and own != conf_dir() else None


def conf_folders() -> list[Path]:
    """Of the user, of rlhf and of plugins, in the order in which Hydra looks into them."""
    own = user_conf()
    return [*([own] if own else []), conf_dir(), *(plugin.conf for plugin in discover()[0])]


def group_names() -> set[str]:
    """The groups of options, those within others left out."""
    return {folder.name for conf in conf_folders() for folder in conf.iterdir() if folder.is_dir()}


def named(group: str) -> Iterator[Path]:
    """The options of a group; of those of one name Hydra takes the first."""
    for conf in conf_folders():
        yield from sorted((conf / group).glob("*.yaml"))


def _plugin(folder: Path, origin: str) -> Plugin:
    return Plugin(folder.name.removeprefix("rlhf_"), folder.name, folder.resolve(), origin)


def _folders(root: Path, origin: str) -> Iterator[Plugin]:
    """Plugins that are folders of ``root``; `discover` makes them importable by their folder name."""
    found = [conf.parent for conf in sorted(root.glob("*/conf")) if conf.parent.name.isidentifier()]
    if found and str(root) not in sys.path:
        # At the end: what lies beside plugins can be imported by them, and hides nothing that is installed.
        sys.path.append(str(root))
    for folder in found:
        yield _plugin(folder, origin)


class _Finder:
    """Import hook that finds local plugins, and nothing else, before any installed package."""

    def __init__(self) -> None:
        self.roots: dict[str, str] = {}  # package -> the directory it is in

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root = self.roots.get(name)
        return None if root is None else PathFinder.find_spec(name, [root])


_finder = _Finder()


def _serve(plugins: dict[str, Plugin]) -> None:
    """Make these plugins the ones that are imported by their names, and no earlier ones."""
    _finder.roots = {package: str(plugin.folder.parent) for package, plugin in plugins.items()}
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def refuse_shadows(plugins: dict[str, Plugin], known: set[str]) -> None:
    """Refuse local plugins that would be imported in place of an installed package which is no plugin.

    Args:
        plugins: package -> plugin, of local directories.
        known: Packages of plugins that are installed or built in, of which a local copy is meant to win.

    Raises:
        UserError: a plugin has the name of such a package.
    """
    installed = [sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")]
    for package, plugin in plugins.items():
        if package in known:
            continue
        taken = package in sys.stdlib_module_names or package in ("rlhf", "hydra_plugins")
        if taken or PathFinder.find_spec(package, installed) is not None:
            raise UserError(
                f"plugin directory {plugin.folder}: {package} is the name of an installed package, which it would hide;"
                f" rename the directory, for example to my_{package}"
            )


def local() -> dict[str, Plugin]:
    """Plugins in the directories of RLHF_PLUGINS (default ./plugins): package -> plugin. Earlier ones win."""
    found: dict[str, Plugin] = {}
    named = os.environ.get("RLHF_PLUGINS")
    directories = [d for d in (named or "plugins").split(os.pathsep) if d]
    for directory in directories:
        origin = directory if named else "./plugins"
        found = {p.package: p for p in _folders(Path(directory).expanduser().resolve(), origin)} | found
    return found


def checkout() -> dict[str, Plugin]:
    """The built-in plugins of a source checkout, which need no installation."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return {}
    return {p.package: p for p in _folders(root / "plugins", "checkout")}


def installed() -> tuple[dict[str, Plugin], list[str]]:
    """Plugins that installed distributions name, and one line for each entry point that leads nowhere."""
    found: dict[str, Plugin] = {}
    broken: list[str] = []
    for name, value, origin in _entry_points(entry_points, tuple(sys.path)):
        top, *below = value.split(".")
        # Only the top is looked up: find_spec of a dotted name would import its parents.
        spec = find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
        roots = list(spec.submodule_search_locations or []) if spec else []
        folder = Path(roots[0], *below) if roots else None
        if folder is None or not folder.is_dir():
            broken.append(f"plugin {name} of {origin} names {value}, which is not an importable package")
        elif not (folder / "conf").is_dir():
            broken.append(f"plugin {name} of {origin} has no conf folder ({folder / 'conf'})")
        else:
            found[value] = Plugin(name.removeprefix("rlhf_"), value, folder.resolve(), origin)
    return found, broken


@lru_cache(maxsize=1)
def _entry_points(find: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Name, package and origin of the entry points, sorted by name; read once per ``sys.path``.

    Every check of a config asks for the plugins, and reading the metadata of all installed distributions takes 0.1 s.
    """
    return [
        (p.name, p.value, f"{p.dist.name} {p.dist.version}" if p.dist else "unknown distribution")
        for p in sorted(find(group=ENTRY_POINTS), key=lambda p: p.name)
    ]


looked_up_once = Once("plugins")
"""For a command, which asks for its plugins some ten times: while it is open, they are looked for once."""


def discover() -> tuple[list[Plugin], list[str]]:
    """Return all plugins by name, and what could not be used (one line each).

    A local folder wins over the checkout's plugin and over an installed one of the same package name.

    Raises:
        UserError: two plugins, or a plugin and rlhf's own conf, offer the same option; or a local plugin has the name
            of an installed package.
    """
    plugins, broken = looked_up_once.get((os.getcwd(), os.environ.get("RLHF_PLUGINS")), _discovered)
    return list(plugins), list(broken)


def _discovered() -> tuple[list[Plugin], list[str]]:
    built_in = checkout()
    here = local()
    _serve(built_in | here)
    distributed, broken = installed()
    refuse_shadows(here, {*distributed, *built_in})
    plugins = distributed | built_in | here
    ordered = sorted(plugins.values(), key=lambda p: p.name)
    refuse_duplicates(ordered)
    return ordered, [line for line in broken if line.split()[1] not in {p.name for p in ordered}]


def refuse_duplicates(plugins: list[Plugin]) -> None:
    """Two providers of one option would shadow each other in silence; say so instead."""
    owner = dict.fromkeys(options(conf_dir()), "rlhf itself")
    for plugin in plugins:
        label = f"plugin {plugin.name} ({plugin.origin}: {plugin.folder})"
        for option in plugin.options():
            if option in owner:
                raise UserError(
                    f"option {option} is offered twice: by {owner[option]} and by {label}; "
                    "rename or remove one of the two files"
                )
            owner[option] = label


class PluginSearchPath(SearchPathPlugin):
    """Plugins behind rlhf's own conf, the user's ./conf in front of it."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        # file:// and not pkg://, which would import the plugin to find its folder.
        for plugin in discover()[0]:
            search_path.append(provider=f"plugin {plugin.name}", path=f"file://{plugin.conf}")
        own = user_conf()
        if own is not None:
            search_path.prepend(provider="./conf", path=f"file://{own}")


def add_working_directory() -> None:
    """Make modules beside the command importable: functions and classes that a config names.

    Behind all that is installed, which they therefore cannot hide. `RLHF_DIRECTORY` names the directory to the
    processes that a command starts, which may work in another one.
    """
    folder = os.environ.get(DIRECTORY) or os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)


def register() -> None:
    """Make every later hydra.main and hydra.initialize of this process see the plugins and the launcher.

    Also called inside the task function: a job that a launcher moved to another process starts without it.
    May be called any number of times.

    Raises:
        UserError: two providers offer the same option, or a YAML file of theirs is too large.
    """
    from rlhf import launcher, yaml_size

    add_working_directory()
    foreign = [user_conf(), *(plugin.conf for plugin in discover()[0] if plugin.origin != "checkout")]
    for conf in foreign:
        for path in conf.rglob("*.yaml") if conf is not None else ():
            yaml_size.check(path)
    plugins = Plugins.instance()
    if PluginSearchPath not in plugins.discover(SearchPathPlugin):
        plugins.register(PluginSearchPath)
    launcher.register()
