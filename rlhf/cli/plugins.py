"""List, show, create and check plugins: rlhf plugins list | show NAME | new NAME --kind KIND | check DIRECTORY."""

import os
import sys
from pathlib import Path

from rich.table import Table

from rlhf import discovery
from rlhf.cli import options, scaffold
from rlhf.console import Screen, shell
from rlhf.errors import UserError, suggest


def main(argv: list[str]) -> int:
    """Run `rlhf plugins ...`; return the exit status, which is 1 if `check` finds a problem."""
    parser = options.Parser("rlhf plugins", description="List, show, create and check plugins.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION")
    actions.add_parser("list", help="list all plugins with their origins and options (the default)")
    show = actions.add_parser("show", help="print the options of a plugin with their hyperparameters")
    show.add_argument("name", metavar="NAME", help="name of the plugin")
    new = actions.add_parser("new", help="write a working plugin, to be changed into yours")
    new.add_argument("name", metavar="NAME", help="name of the package, such as my_loss")
    new.add_argument("--kind", required=True, metavar="KIND", help=", ".join(scaffold.kinds()))
    new.add_argument(
        "--into", type=Path, default=Path("plugins"), metavar="DIRECTORY", help="parent (default: ./plugins)"
    )
    check = actions.add_parser("check", help="check that a plugin is commented, composable, and returns valid values")
    check.add_argument("folder", type=Path, metavar="DIRECTORY", help="directory of the plugin")
    typed = parser.parse_args(argv)
    if typed.action == "show":
        return _show(typed.name)
    if typed.action == "new":
        return _new(typed.name, typed.kind, typed.into)
    if typed.action == "check":
        return _check(typed.folder)
    return _list()


def _list() -> int:
    plugins, broken = discovery.discover()
    table = Table("plugin", "from", "offers", box=None, pad_edge=False)
    for plugin in plugins:
        offers: dict[str, list[str]] = {}
        for option in plugin.options():
            group, _, name = option.rpartition("/")
            offers.setdefault(group, []).append(name)
        table.add_row(plugin.name, plugin.origin, "; ".join(f"{g}: {', '.join(n)}" for g, n in offers.items()))
    Screen(width=None if sys.stdout.isatty() else 160).print(table)
    for line in broken:
        print(f"not usable: {line}")
    return 0


def _show(name: str) -> int:
    plugins = {plugin.name: plugin for plugin in discovery.discover()[0]}
    plugin = plugins.get(name.removeprefix("rlhf_"))
    if plugin is None:
        raise UserError(f"{name}: no such plugin{suggest(name, plugins)}")
    print(f"{plugin.name}: package {plugin.package}, from {plugin.origin}, in {plugin.folder}")
    for option in plugin.options():
        print(f"\n{'='.join(option.rsplit('/', 1))}")
        for line in (plugin.conf / f"{option}.yaml").read_text(encoding="utf-8").splitlines():
            if line.strip() and "@package" not in line:
                print(f"  {line}")
    readme = plugin.folder / "README.md"
    if readme.exists():
        print(f"\nmore: {readme}")
    return 0


def _new(name: str, kind: str, into: Path) -> int:
    folder, commands = scaffold.write(name, kind, into)
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"wrote {path}")
    searched = {Path(d).resolve() for d in os.environ.get(discovery.PLUGINS, "plugins").split(os.pathsep)}
    if into.resolve() not in searched:
        print(f"\nto make rlhf find it, type: export {shell(f'{discovery.PLUGINS}={into.resolve()}')}")
    print(f"\nnext:\n  {shell('rlhf', 'plugins', 'check', folder)}")
    print("\n".join(f"  {line}" for line in commands.splitlines()))
    return 0


def _check(folder: Path) -> int:
    from rlhf.testing import check_plugin

    report = check_plugin(folder)
    for line in report.passed:
        print(f"ok    {line}")
    for line in report.problems:
        print(f"WRONG {line}")
    print(f"{len(report.passed)} checks passed, {len(report.problems)} failed")
    return 1 if report.problems else 0
