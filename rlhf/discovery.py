"""Find plugins and add their conf/ directories to Hydra's search path.

A plugin is a Python package with a conf/ directory. It is found in one of three ways: an installed distribution names
it in the entry-point group ``rlhf.plugins``; it is a directory in ``./plugins`` or in a directory listed in
``RLHF_PLUGINS``; or it is in ``plugins/`` of the checkout that this package runs from. No plugin code runs here, so a
broken plugin breaks only the runs that select it. Hydra and the standard library only.
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

from rlhf.errors import UserError
from rlhf.storage.cache import Once

ENTRY_POINTS = "rlhf.plugins"
PLUGINS = "RLHF_PLUGINS"  # environment variable: directories that hold plugins, separated as in PATH
DIRECTORY = "RLHF_DIRECTORY"  # environment variable: working directory of the command, for the processes that it starts


@dataclass(frozen=True)
class Plugin:
    """Provider of config options.

    Attributes:
        name: Name that users type: the package without its ``rlhf_`` prefix.
        package: Import name, the same as the directory's name.
        folder: The package directory.
        origin: Where it was found: "checkout", "./plugins", or "NAME VERSION" of a distribution.
    """

    name: str
    package: str
    folder: Path
    origin: str

    @property
    def conf(self) -> Path:
        """Config directory of the plugin."""
        return self.folder / "conf"

    def options(self) -> Iterator[str]:
        """Return the config options of the plugin, as "group/option"."""
        return options(self.conf)


@dataclass(frozen=True)
class UnusablePlugin:
    """Entry point of an installed distribution that is not a plugin; its string is one line to print.

    Attributes:
        name: Name of the entry point.
        origin: "NAME VERSION" of the distribution.
        problem: What is wrong with it.
    """

    name: str
    origin: str
    problem: str

    def __str__(self) -> str:
        return f"plugin {self.name} of {self.origin} {self.problem}"


def options(conf: Path) -> Iterator[str]:
    """Yield every YAML below a conf directory as "group/option" (nested groups keep their slashes), sorted."""
    for path in sorted(conf.rglob("*.yaml")):
        yield path.relative_to(conf).with_suffix("").as_posix()


def conf_dir() -> Path:
    """Return the shared config tree: beside the package in a checkout, inside it in a wheel."""
    here = Path(__file__).resolve().parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def user_conf() -> Path | None:
    """Return the user's own ./conf, whose options override all others; None if absent or if it is this project's.

    Raises:
        UserError: ./conf cannot be resolved.
    """
    try:
        own = Path("conf").resolve()
    except (OSError, RuntimeError) as error:  # a loop of links is a RuntimeError
        raise UserError(f"conf: cannot be read ({error})", fix="remove the link") from error
    return own if own.is_dir() and own != conf_dir() else None


def conf_folders() -> list[Path]:
    """Return the conf directories of the user, of rlhf and of plugins, in Hydra's search order."""
    own = user_conf()
    return [*([own] if own else []), conf_dir(), *(plugin.conf for plugin in discover()[0])]


def group_names() -> set[str]:
    """Return the names of the top-level config groups."""
    return {folder.name for conf in conf_folders() for folder in conf.iterdir() if folder.is_dir()}


def named(group: str) -> Iterator[Path]:
    """Yield the option files of a group; of several with one name Hydra takes the first."""
    for conf in conf_folders():
        yield from sorted((conf / group).glob("*.yaml"))


def _plugin(folder: Path, origin: str) -> Plugin:
    return Plugin(folder.name.removeprefix("rlhf_"), folder.name, folder.resolve(), origin)


def _folders(root: Path, origin: str) -> Iterator[Plugin]:
    """Yield the plugins that are subdirectories of ``root``; `discover` makes them importable by directory name."""
    found = [conf.parent for conf in sorted(root.glob("*/conf")) if conf.parent.name.isidentifier()]
    if found and str(root) not in sys.path:
        # At the end: plugins can import modules beside them, and these hide no installed package.
        sys.path.append(str(root))
    for folder in found:
        yield _plugin(folder, origin)


class _Finder:
    """Import hook that finds local plugins, and nothing else, before any installed package."""

    def __init__(self) -> None:
        self.roots: dict[str, str] = {}  # package -> parent directory

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        root = self.roots.get(name)
        return None if root is None else PathFinder.find_spec(name, [root])


_finder = _Finder()


def _serve(plugins: dict[str, Plugin]) -> None:
    """Make exactly these plugins importable by their package names."""
    _finder.roots = {package: str(plugin.folder.parent) for package, plugin in plugins.items()}
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def refuse_shadows(plugins: dict[str, Plugin], known: set[str]) -> None:
    """Raise UserError if a local plugin would hide an installed package that is not a plugin.

    Args:
        plugins: Package -> plugin, of local directories.
        known: Packages of installed or built-in plugins, which a local copy may replace.

    Raises:
        UserError: A plugin has the name of such a package.
    """
    installed = [sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib", "platstdlib")]
    for package, plugin in plugins.items():
        if package in known:
            continue
        taken = package in sys.stdlib_module_names or package in ("rlhf", "hydra_plugins")
        if taken or PathFinder.find_spec(package, installed) is not None:
            raise UserError(
                f"plugin directory {plugin.folder}: {package} is the name of an installed package, which it would hide",
                fix=f"rename the directory, for example to my_{package}",
            )


def local() -> dict[str, Plugin]:
    """Return the plugins in the directories of RLHF_PLUGINS (default ./plugins) by package. Earlier ones win."""
    found: dict[str, Plugin] = {}
    named = os.environ.get(PLUGINS)
    directories = [d for d in (named or "plugins").split(os.pathsep) if d]
    for directory in directories:
        origin = directory if named else "./plugins"
        found = {p.package: p for p in _folders(Path(directory).expanduser().resolve(), origin)} | found
    return found


def checkout() -> dict[str, Plugin]:
    """Return the built-in plugins of a source checkout by package; they need no installation."""
    root = Path(__file__).resolve().parents[1]
    if not (root / "pyproject.toml").is_file():
        return {}
    return {p.package: p for p in _folders(root / "plugins", "checkout")}


def installed() -> tuple[dict[str, Plugin], list[UnusablePlugin]]:
    """Return the plugins of installed distributions, and the unusable entry points."""
    found: dict[str, Plugin] = {}
    broken: list[UnusablePlugin] = []
    for name, value, origin in _entry_points(entry_points, tuple(sys.path)):
        top, *below = value.split(".")
        # Look up the top package only: find_spec of a dotted name would import its parents.
        spec = find_spec(top) if top not in sys.modules else sys.modules[top].__spec__
        roots = list(spec.submodule_search_locations or []) if spec else []
        folder = Path(roots[0], *below) if roots else None
        if folder is None or not folder.is_dir():
            broken.append(UnusablePlugin(name, origin, f"names {value}, which is not an importable package"))
        elif not (folder / "conf").is_dir():
            broken.append(UnusablePlugin(name, origin, f"has no directory conf ({folder / 'conf'})"))
        else:
            found[value] = Plugin(name.removeprefix("rlhf_"), value, folder.resolve(), origin)
    return found, broken


@lru_cache(maxsize=1)
def _entry_points(find: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...]) -> list[tuple[str, str, str]]:
    """Return name, package and origin of the entry points, sorted by name; read once per ``sys.path``.

    Every check of a config needs the plugins, and reading the metadata of all installed distributions takes 0.1 s.
    """
    return [
        (p.name, p.value, f"{p.dist.name} {p.dist.version}" if p.dist else "unknown distribution")
        for p in sorted(find(group=ENTRY_POINTS), key=lambda p: p.name)
    ]


# A command looks its plugins up about ten times; while the cache is open, they are searched for once.
lookup_cache = Once("plugins")


def discover() -> tuple[list[Plugin], list[UnusablePlugin]]:
    """Return all plugins, sorted by name, and those that cannot be used.

    A local directory wins over the checkout's plugin and over an installed one of the same package name.

    Raises:
        UserError: Two plugins, or a plugin and rlhf's own conf, offer the same option; or a local plugin has the name
            of an installed package.
    """
    plugins, broken = lookup_cache.get((os.getcwd(), os.environ.get(PLUGINS)), _discovered)
    return list(plugins), list(broken)


def _discovered() -> tuple[list[Plugin], list[UnusablePlugin]]:
    built_in = checkout()
    here = local()
    _serve(built_in | here)
    distributed, broken = installed()
    refuse_shadows(here, {*distributed, *built_in})
    plugins = distributed | built_in | here
    ordered = sorted(plugins.values(), key=lambda p: p.name)
    refuse_duplicates(ordered)
    return ordered, [one for one in broken if one.name not in {p.name for p in ordered}]


def refuse_duplicates(plugins: list[Plugin]) -> None:
    """Raise UserError if two providers offer one option; one would silently shadow the other."""
    owner = dict.fromkeys(options(conf_dir()), "rlhf itself")
    for plugin in plugins:
        label = f"plugin {plugin.name} ({plugin.origin}: {plugin.folder})"
        for option in plugin.options():
            if option in owner:
                raise UserError(
                    f"option {option} is offered twice: by {owner[option]} and by {label}",
                    fix="rename or remove one of the two files",
                )
            owner[option] = label


class PluginSearchPath(SearchPathPlugin):
    """Hydra plugin that appends the conf of plugins to rlhf's own and prepends the user's ./conf."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the conf directories to Hydra's search path."""
        # file:// and not pkg://, which would import the plugin to find its directory.
        for plugin in discover()[0]:
            search_path.append(provider=f"plugin {plugin.name}", path=f"file://{plugin.conf}")
        own = user_conf()
        if own is not None:
            search_path.prepend(provider="./conf", path=f"file://{own}")


def add_working_directory() -> None:
    """Make modules in the working directory importable: functions and classes that a config names.

    They come after all installed packages and therefore cannot hide them. `RLHF_DIRECTORY` names the directory to the
    processes that a command starts, whose working directory may differ.
    """
    folder = os.environ.get(DIRECTORY) or os.getcwd()
    if folder not in sys.path:
        sys.path.append(folder)


def register() -> None:
    """Make every later hydra.main and hydra.initialize of this process find the plugins.

    Also called inside the task function: a job that a launcher moved to another process starts without it. May be
    called any number of times.

    Raises:
        UserError: Two providers offer the same option, or one of their YAML files is too large.
    """
    from rlhf.storage import yaml_size

    add_working_directory()
    foreign = [user_conf(), *(plugin.conf for plugin in discover()[0] if plugin.origin != "checkout")]
    for conf in foreign:
        for path in conf.rglob("*.yaml") if conf is not None else ():
            yaml_size.check(path)
    plugins = Plugins.instance()
    if PluginSearchPath not in plugins.discover(SearchPathPlugin):
        plugins.register(PluginSearchPath)
