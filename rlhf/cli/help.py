"""Help pages: commands, options and their providers. Reads the conf directories and imports no plugin."""

import ast
import shutil
import textwrap
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from rlhf import __version__, discovery
from rlhf.errors import UserError

# Groups listed first, each with a description of its options.
LEADING = {
    "stage": "one algorithm",
    "pipeline": "several stages in order; each reads the results of earlier ones",
    "experiment": "a named set of overrides",
    "sweep": "a named set of sweeps (implies -m)",
    "debug": "make any run tiny",
}
HIDDEN = ("hydra",)


class UsageError(UserError):
    """Error for a command line that names neither a stage nor a pipeline; its text is the page of `usage`."""


def options() -> dict[str, dict[str, str]]:
    """Return group -> option -> provider, for all groups; the user's ./conf has priority over the others."""
    providers = [(discovery.conf_dir(), "rlhf")]
    providers += [(p.conf, p.name) for p in discovery.discover()[0]]
    own = discovery.user_conf()
    if own is not None:
        providers.insert(0, (own, "./conf"))
    found: dict[str, dict[str, str]] = {}
    for conf, provider in providers:
        for option in discovery.options(conf):
            group, _, name = option.rpartition("/")
            if group and group.split("/")[0] not in HIDDEN:
                found.setdefault(group, {}).setdefault(name, provider)
    return {group: dict(sorted(names.items())) for group, names in sorted(found.items())}


def subcommands() -> dict[str, str]:
    """Return sub-command -> first line of its module's docstring, read without importing the module."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main" and n.args.args]
        if any(n.args.args[0].arg == "argv" for n in mains):
            found[path.stem] = (ast.get_docstring(tree) or "").splitlines()[0].rstrip(".")
    return found


def front() -> str:
    """Return the page of `rlhf --help`."""
    everything = options()
    stages, pipelines = list(everything.get("stage", {})), list(everything.get("pipeline", {}))
    stage, pipeline = _pick(stages, "sft", "STAGE"), _pick(pipelines, "instructgpt", "PIPELINE")
    examples = {
        f"rlhf pipeline={pipeline}": "run a pipeline; finished steps are reused",
        f"rlhf stage={stage} optimizer.lr=1e-4": "run one stage with a changed value",
        f"rlhf stage={stage} seed=0,1,2 -m": "sweep: every combination of comma-separated values",
        f"rlhf stage={stage} --help": "print every hyperparameter of a stage, with its meaning",
        "rlhf ... --cfg job": "print the config and run nothing",
        "rlhf ... --dry-run": "validate, print what would run, and run nothing",
    }
    lines = [
        f"rlhf {__version__}: experiments in reinforcement learning from human feedback",
        "",
        *(f"  {command:<44} {meaning}" for command, meaning in examples.items()),
        "",
        "commands:",
        *(f"  rlhf {name:<9} {text}" for name, text in subcommands().items()),
    ]
    for group in [*LEADING, *(g for g in everything if g not in LEADING)]:
        if everything.get(group):
            title = f"{group}: {LEADING[group]}" if group in LEADING else group
            lines += ["", f"{title} ({group}=...)" if group in LEADING else f"{title}=", *_names(everything[group])]
    own = discovery.user_conf()
    lines += ["", f"./conf in use: {own}" if own else "Put your own options in ./conf, your own code in ./plugins."]
    lines += [f"not usable: {line}" for line in discovery.discover()[1]]
    lines.append('Tab completion: eval "$(rlhf -sc install=bash)"')
    return "\n".join(lines)


def _names(names: dict[str, str]) -> list[str]:
    """Return the options wrapped to the terminal's width, each with its provider unless that is rlhf itself."""
    words = [name if provider == "rlhf" else f"{name} [{provider}]" for name, provider in names.items()]
    width = max(60, shutil.get_terminal_size().columns - 2)
    # A no-break space keeps an option and its provider on the same line.
    text = ", ".join(word.replace(" ", "\u00a0") for word in words)
    wrapped = textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="  ", break_long_words=False)
    return [line.replace("\u00a0", " ") for line in wrapped]


def _pick(names: list[str], wanted: str, fallback: str) -> str:
    return wanted if wanted in names else names[0] if names else fallback


def usage(words: list[str] | None = None) -> str:
    """Return the short page for a command line that names neither a stage nor a pipeline."""
    everything = options()
    lines = ["usage: rlhf stage=STAGE | pipeline=PIPELINE | COMMAND   [KEY=VALUE ...] [-m]", ""]
    if words:
        lines += [f"neither a stage nor a pipeline in: {' '.join(words)}", ""]
    for group in ("stage", "pipeline", "experiment"):
        if everything.get(group):
            lines.append(f"{group:<11}{', '.join(everything[group])}")
    lines += [f"{'command':<11}{', '.join(subcommands())}", "", "rlhf --help lists everything"]
    return "\n".join(lines)


def chosen(overrides: list[str]) -> str:
    """Return the page of `rlhf OVERRIDES --help`: the commented YAML of every option that the overrides choose."""
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
        config = compose("config", overrides=[o for o in overrides if "," not in o], return_hydra_config=True)
    places: dict[str, tuple[Path, str]] = {}
    own = discovery.user_conf()
    for conf, provider in [
        *(((own, "./conf"),) if own else ()),
        (discovery.conf_dir(), "rlhf"),
        *((p.conf, p.name) for p in discovery.discover()[0]),
    ]:
        for option in discovery.options(conf):
            places.setdefault(option, (conf / f"{option}.yaml", provider))
    lines = [f"rlhf {' '.join(overrides)}: every option that it chooses. Change a value with KEY=VALUE."]
    for key, option in config.hydra.runtime.choices.items():
        group, _, package = str(key).partition("@")
        found = places.get(f"{group}/{option}")
        if option is None or found is None or group.startswith("hydra/"):
            continue
        path, provider = found
        lines += ["", f"{key}={option}" + (f" [{provider}]" if provider != "rlhf" else "")]
        lines += [
            f"  {line}"
            for line in path.read_text(encoding="utf-8").splitlines()
            if "@package" not in line and line.strip()
        ]
    return "\n".join(lines)
