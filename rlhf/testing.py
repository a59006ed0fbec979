"""For tests, those of plugin authors too: a tiny model, a rollout without a model, and the contract as checks."""

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import get_object, instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from rlhf import config as configs
from rlhf import discovery, objective, validation
from rlhf.data.records import Comparison, Message, Prompt
from rlhf.errors import RLHFError, UserError
from rlhf.importing import contained
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.rollout import Rollout

# Not the reference, which is optional everywhere and refused by objectives without one.
ROLES = (
    "policy",
    "reward_model",
    "safety_model",
    "value",
    "judge",
    "comparisons",
    "more_comparisons",
    "demonstrations",
    "prompts",
)


# Things to test with


def tiny_model(
    texts: tuple[str, ...] = ("What is two plus two?", "Two plus two is four."), seed: int = 0
) -> LanguageModel:
    """A random Llama of some 60k parameters, its byte-level tokenizer trained on ``texts``; fp32 on the CPU."""
    torch.manual_seed(seed)
    architecture = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 128,
        "tie_word_embeddings": True,
    }
    spec = CausalLM(path=None, architecture=architecture, vocab_size=300)
    return spec.load(NoAdapter(), Precision("32-true"), lambda: list(texts) * 4)


def rollout(prompts: list[str], replies: list[str]) -> Rollout:
    """A rollout of given texts, one byte per token: for rewards and annotators, which read texts.

    Args:
        prompts: B questions.
        replies: B replies; all of them came to their end.
    """
    encoded = [list(reply.encode()) + [0] for reply in replies]
    length = max(len(ids) for ids in encoded)
    response = torch.tensor([ids + [0] * (length - len(ids)) for ids in encoded])
    mask = torch.arange(length) < torch.tensor([len(ids) for ids in encoded])[:, None]
    asked = [Prompt(messages=(Message(role="user", content=text),)) for text in prompts]
    return Rollout(
        prompts=asked,
        prompt_ids=torch.ones(len(prompts), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(prompts), 1, dtype=torch.bool),
        response_ids=response,
        mask=mask,
        logp=torch.where(mask, -1.0, 0.0),
        ended=torch.ones(len(prompts), dtype=torch.bool),
        texts=list(replies),
    )


# What can be said of any YAML file


def unexplained_keys(path: Path) -> list[str]:
    """The lines of a YAML whose key has no comment, on its line, above it, or above the block it stands in.

    Keys that only hold others explain themselves, and so do `_target_`, defaults lists and `${inputs.ROLE}`.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    found = []
    for i, line in enumerate(lines):
        match = re.match(r"\s*([\w./@-]+):( .*|$)", line)
        if not match or match[1] in ("_target_", "_partial_", "defaults") or "#" in line or not match[2].strip():
            continue
        reference = re.fullmatch(r"\s*\$\{(inputs\.|artifact:|optional_input:)\w+\}", match[2])
        if not reference and not (i and lines[i - 1].strip().startswith("#")) and not _block_explained(lines, i):
            found.append(f"{path.name}:{i + 1}: {line.strip()}")
    return found


def _block_explained(lines: list[str], index: int) -> bool:
    indent = len(lines[index]) - len(lines[index].lstrip())
    for i in range(index - 1, -1, -1):
        if lines[i].strip() and len(lines[i]) - len(lines[i].lstrip()) < indent:
            return "#" in lines[i] or (i > 0 and lines[i - 1].strip().startswith("#"))
    return False


def nodes(path: Path) -> Iterator[tuple[str, dict[str, Any], Callable[..., Any]]]:
    """The nodes of a YAML that build something: (dotted key, node, constructor)."""
    for where, node in configs.targets(OmegaConf.to_container(OmegaConf.load(path))):
        yield where, node, get_object(node["_target_"])


def foreign_keys(path: Path) -> list[str]:
    """Keys of a YAML that its constructors do not have."""
    found = []
    for where, node, target in nodes(path):
        known = validation.parameters(target) or {}
        if any(p.kind is p.VAR_KEYWORD for p in known.values()):
            continue
        groups = set(validation.groups(target)) if where == "stage" else set()
        allowed = (set(known) - groups) | {*validation.RESERVED, "defaults"} | ({"name"} if where == "stage" else set())
        found += [
            f"{path.name}: {where or 'the file'} has {key}, {target.__name__} has not" for key in set(node) - allowed
        ]
    return found


def defaults_compared(path: Path) -> Iterator[tuple[str, str, bool, Any, Any]]:
    """For every value of a YAML that its constructor has a default for: (target, name, same, value, default)."""
    for _, node, target in nodes(path):
        for name, parameter in (validation.parameters(target) or {}).items():
            value = node.get(name, parameter.empty)
            if value is parameter.empty or parameter.default is parameter.empty:
                continue
            computed = any(isinstance(v, str) and ("${" in v or v == "???") for _, v in configs.leaves(value, "v"))
            if not computed and not validation.holds_object(value):
                default = list(parameter.default) if isinstance(parameter.default, tuple) else parameter.default
                yield node["_target_"], name, default == value, value, parameter.default


# The contract


@dataclass
class Report:
    """What ``check_plugin`` found."""

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def see(self, what: str, problems: list[str]) -> None:
        """Record a check: passed when there are no problems."""
        if problems:
            self.problems += problems
        else:
            self.passed.append(what)


def check_plugin(folder: Path) -> Report:
    """Whether a plugin keeps its side of the contract: found, explained, composable, and well-behaved when called.

    Its code is imported and its objectives, rewards and annotators are called on made-up inputs.

    Raises:
        UserError: there is no such folder.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; type the folder of a plugin, e.g. plugins/my_plugin")
    report = Report()
    files = sorted((folder / "conf").rglob("*.yaml"))
    report.see("is a package", [] if (folder / "__init__.py").is_file() else [f"{folder / '__init__.py'} is missing"])
    report.see("has options in conf/GROUP/NAME.yaml", [] if files else [f"{folder / 'conf'} holds no GROUP/NAME.yaml"])
    try:
        found = _found(folder)
    except UserError as e:
        found = [str(e)]
    report.see("is found, and offers nothing twice", found)
    if report.problems:
        return report
    for path in files:
        option = path.relative_to(folder / "conf").with_suffix("").as_posix()
        try:
            with contained():
                _check_file(path, option, folder.name, report)
        except Exception as e:
            # Whatever its code raises is the finding.
            report.problems.append(f"{option}: {type(e).__name__}: {e}".strip())
    return report


def _found(folder: Path) -> list[str]:
    if folder not in {plugin.folder for plugin in discovery.discover()[0]}:
        named = os.environ.get("RLHF_PLUGINS", "plugins")
        os.environ["RLHF_PLUGINS"] = os.pathsep.join([str(folder.parent), *([named] if named else [])])
    folders = {plugin.folder for plugin in discovery.discover()[0]}
    return [] if folder in folders else [f"{folder} is not found; is its name a Python identifier?"]


def _check_file(path: Path, option: str, package: str, report: Report) -> None:
    group, _, name = option.rpartition("/")
    report.see(f"{option}: every key is explained", [f"no comment: {line}" for line in unexplained_keys(path)])
    report.see(f"{option}: its keys are its constructor's", foreign_keys(path))
    different = [
        f"{path.name}: {key} is {value}, its constructor says {default}"
        for target, key, same, value, default in defaults_compared(path)
        # Options of a constructor from elsewhere exist to set other values.
        if not same and target.startswith(f"{package}.")
    ]
    report.see(f"{option}: its values are its constructor's", different)
    for where, _, target in nodes(path):
        if "__doc__" not in vars(target) or not target.__doc__:
            report.problems.append(f"{target.__name__} has no docstring")
        if where == "":
            _check_object(path, group, option, report)
    report.see(f"{option}: composes and passes the checks before a run", _composes(group, name))


def _check_object(path: Path, group: str, option: str, report: Report) -> None:
    node = OmegaConf.load(path)
    text = path.read_text(encoding="utf-8")
    if group == "objective":
        report.see(f"{option}: losses are unreduced, finite and have a gradient", check_objective(instantiate(node)))
    elif "${inputs." in text or "???" in text or (isinstance(node, DictConfig) and "defaults" in node):
        return  # needs something that only a run has
    elif group == "reward":
        report.see(f"{option}: one finite score per reply", check_reward(instantiate(node)))
    elif group == "annotator":
        report.see(f"{option}: comparisons, the same for the same seed", check_annotator(instantiate(node)))
    elif group == "data" and Path(str(OmegaConf.select(node, "source"))).is_file():
        split = instantiate(node).load()
        report.see(f"{option}: {len(split.train)} records", [] if split.train else [f"{option}: no usable record"])


def check_objective(made: Any) -> list[str]:
    """Call an objective on made-up inputs of its protocol."""
    torch.manual_seed(0)

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, requires_grad=True)

    count = 6
    lengths = torch.full((count,), 5)
    if isinstance(made, objective.PairObjective):
        leaf = numbers(count)
        policy = objective.PairLogps(leaf - 9.0, numbers(count) - 10.0, lengths, lengths)
        reference = objective.PairLogps(torch.randn(count) - 9.0, torch.randn(count) - 10.0, lengths, lengths)
        context = objective.PairContext(torch.rand(count) + 1.0, torch.rand(count), torch.randn(count, 4))
        losses, metrics = made(policy, reference if made.needs_reference else None, context)
    elif isinstance(made, objective.ScoreObjective):
        leaf = numbers(count)
        losses, metrics = made(leaf, numbers(count), torch.tensor([0, 1, 2, 3, -1, 0]))
    elif isinstance(made, objective.LabelObjective):
        leaf = numbers(count)
        losses, metrics = made(leaf - 9.0, torch.randn(count) - 9.0, torch.arange(count) % 2 == 0, torch.tensor(0.1))
    elif isinstance(made, objective.ContrastObjective):
        leaf = numbers(count)
        losses, metrics = made(
            leaf - 9.0, torch.randn(count) - 9.0, torch.arange(count) % 2 == 0, torch.randn(count, 4)
        )
    elif isinstance(made, objective.PolicyObjective):
        leaf = numbers(count, 5)
        old_logp, advantages, values, old_values, returns = torch.randn(5, count, 5)
        losses, metrics = made(leaf, old_logp, advantages, values, old_values, returns, torch.rand(count, 5))
    elif isinstance(made, objective.GroupObjective):
        leaf = numbers(count, 5)
        old_logp, ref_logp = leaf.detach() + 0.1 * torch.randn(2, count, 5)
        mask = torch.arange(5) < torch.tensor([[5], [3], [1], [4], [2], [5]])
        advantages, _ = made.advantages(torch.randn(count), old_logp, ref_logp, mask, 3, lambda part: part)
        losses, metrics = made(leaf, old_logp, ref_logp, advantages, mask, torch.rand(count, 5))
    elif isinstance(made, objective.TokenObjective):
        leaf = numbers(count, 5)
        losses, metrics = made(leaf)
    else:
        return [f"{type(made).__name__} derives from none of the objectives of rlhf.objective, so no stage takes it"]
    found = []
    if losses.shape != leaf.shape:
        found.append(f"losses have the shape {tuple(losses.shape)}, expected {tuple(leaf.shape)}: one each, no mean")
    if not torch.isfinite(losses).all():
        found.append("losses are not finite on ordinary inputs")
    elif not losses.requires_grad:
        found.append("losses have no gradient: nothing would be learnt")
    else:
        losses.sum().backward()
        if leaf.grad is None or not torch.isfinite(leaf.grad).all() or not leaf.grad.any():
            found.append("the gradient is zero or not finite on ordinary inputs")
    found += [f"metric {name} has a gradient: detach it" for name, value in metrics.items() if value.requires_grad]
    found += [
        f"metric {name} has the shape {tuple(value.shape)}, expected {tuple(losses.shape)}"
        for name, value in metrics.items()
        if value.shape != losses.shape
    ]
    return found


def check_reward(reward: Any) -> list[str]:
    """Call a reward on made-up replies."""
    replies = ["Four.", "Two plus two is four, as far as I know, and I know it well.", "", "I cannot say."]
    scores = reward(rollout(["What is two plus two?"] * len(replies), replies))
    if not isinstance(scores, Tensor) or scores.shape != (len(replies),):
        return [f"scores are {tuple(getattr(scores, 'shape', ()))} of {type(scores).__name__}, expected a tensor [B]"]
    if not scores.is_floating_point() or not torch.isfinite(scores).all():
        return ["scores must be finite floating-point numbers, for an empty reply too"]
    return []


def check_annotator(annotator: Any) -> list[str]:
    """Call an annotator on made-up replies, two to a prompt."""
    replies = ["Four.", "Two plus two is four, as far as I know.", "Same.", "Same.", "", "Some words."]
    given = rollout(["What is two plus two?"] * len(replies), replies)
    made = annotator(given, samples=2, seed=0)
    if not isinstance(made, list) or not all(isinstance(c, Comparison) for c in made):
        return ["expected a list of rlhf.data.records.Comparison"]
    found = [] if annotator(given, samples=2, seed=0) == made else ["the same seed gives other comparisons"]
    foreign = [c for c in made if not set(c.responses) <= set(replies)]
    return found + [f"a comparison holds a reply that nobody gave: {c.responses}" for c in foreign[:1]]


def _composes(group: str, name: str) -> list[str]:
    """Compose the option with a stage that reads its group, and run the checks that come before a run."""
    given = [f"inputs.{role}=given" for role in ROLES]
    problems = []
    for choice in _choices(group, name):
        try:
            composed = config_of(*choice, *(given if group not in ("pipeline", "experiment") else ()))
            if "stage" in composed:
                validation.check(composed)
            return []
        except (RLHFError, HydraException, OmegaConfBaseException) as e:
            problems.append(f"{' '.join(choice)}: {str(e).splitlines()[0]}")
    return problems[:1] or [f"{group}={name}: no stage reads the group {group}"]


def _choices(group: str, name: str) -> Iterator[list[str]]:
    if group in ("stage", "pipeline", "experiment") or group not in discovered_groups():
        yield [f"{group}={name}"]
        return
    for stage in discovered_groups()["stage"]:
        try:
            base = config_of(f"stage={stage}")
        except (HydraException, OmegaConfBaseException):
            continue
        if group in base or group in ("debug", "sweep"):
            yield [f"stage={stage}", f"{group}={name}"]


def discovered_groups() -> dict[str, list[str]]:
    """Group -> its options, from rlhf and all plugins."""
    found: dict[str, list[str]] = {}
    for conf in (discovery.conf_dir(), *(p.conf for p in discovery.discover()[0])):
        for option in discovery.options(conf):
            group, _, name = option.rpartition("/")
            found.setdefault(group, []).append(name)
    return found


def config_of(*overrides: str) -> DictConfig:
    """The config of a command line, composed as `rlhf` does."""
    discovery.register()
    configs.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))
