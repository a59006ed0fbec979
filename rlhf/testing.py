"""Test helpers, also for plugin authors: a tiny model, a rollout without a model, and checks of the plugin contract."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from torch import Tensor

from rlhf import discovery, objective
from rlhf.annotator.base import Annotator
from rlhf.data.records import Comparison, Message, Prompt
from rlhf.errors import RLHFError, UserError, first_line
from rlhf.importing import catch_exits
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.planning import step_config as configs
from rlhf.planning.base_classes import missing_base_error
from rlhf.planning.option_files import defaults_compared, foreign_keys, nodes, unexplained_keys
from rlhf.planning.validation.config import validate_config
from rlhf.reward.base import Reward
from rlhf.running import launcher
from rlhf.sampler.base import Sampler
from rlhf.sampler.rollout import Rollout

__all__ = [
    "Report",
    "check_annotator",
    "check_objective",
    "check_plugin",
    "check_reward",
    "check_sampler",
    "rollout",
    "tiny_model",
]

# Without the reference, which is optional everywhere and refused by objectives that do not read it.
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


# Base classes of the options of a group; those of objectives and stages are checked where they are used.
BASES: dict[str, type] = {"reward": Reward, "annotator": Annotator, "sampler": Sampler}

# Test objects


def tiny_model(
    texts: tuple[str, ...] = ("What is two plus two?", "Two plus two is four."), seed: int = 0
) -> LanguageModel:
    """Return a random Llama of some 60k parameters with a byte-level tokenizer trained on ``texts``; fp32, CPU."""
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


def rollout(prompts: list[str], responses: list[str]) -> Rollout:
    """Return a rollout of given texts, one token per byte: for rewards and annotators, which read texts.

    Args:
        prompts: B questions.
        responses: B responses; all of them have ended.
    """
    encoded = [list(response.encode()) + [0] for response in responses]
    length = max(len(ids) for ids in encoded)
    response_ids = torch.tensor([ids + [0] * (length - len(ids)) for ids in encoded])
    mask = torch.arange(length) < torch.tensor([len(ids) for ids in encoded])[:, None]
    asked = [Prompt(messages=(Message(role="user", content=text),)) for text in prompts]
    return Rollout(
        prompts=asked,
        prompt_ids=torch.ones(len(prompts), 1, dtype=torch.long),
        prompt_mask=torch.ones(len(prompts), 1, dtype=torch.bool),
        response_ids=response_ids,
        mask=mask,
        logp=torch.where(mask, -1.0, 0.0),
        ended=torch.ones(len(prompts), dtype=torch.bool),
        texts=list(responses),
    )


# Checks of the plugin contract


@dataclass
class Report:
    """Result of ``check_plugin``."""

    passed: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def see(self, what: str, problems: list[str]) -> None:
        """Record a check: passed if there are no problems."""
        if problems:
            self.problems += problems
        else:
            self.passed.append(what)


def check_plugin(folder: Path) -> Report:
    """Check a plugin against the contract: it is found, commented, composable, and returns valid values.

    Its code is imported, and its objectives, rewards and annotators are called on made-up inputs.

    Raises:
        UserError: There is no such directory.
    """
    folder = folder.resolve()
    if not folder.is_dir():
        raise UserError(
            f"{folder}: no such directory", fix="type the directory of a plugin, for example plugins/my_plugin"
        )
    report = Report()
    files = sorted((folder / "conf").rglob("*.yaml"))
    report.see("is a package", [] if (folder / "__init__.py").is_file() else [f"{folder / '__init__.py'} is missing"])
    report.see("has options in conf/GROUP/NAME.yaml", [] if files else [f"{folder / 'conf'} has no GROUP/NAME.yaml"])
    try:
        found = _found(folder)
    except UserError as e:
        found = list(e.lines)
    report.see("is found, and offers no option twice", found)
    if report.problems:
        return report
    for path in files:
        option = path.relative_to(folder / "conf").with_suffix("").as_posix()
        try:
            with catch_exits():
                _check_file(path, option, folder.name, report)
        except Exception as e:
            # Any exception of the plugin's code is a finding.
            report.problems.append(f"{option}: {type(e).__name__}: {e}".strip())
    return report


def _found(folder: Path) -> list[str]:
    if folder not in {plugin.folder for plugin in discovery.discover()[0]}:
        named = os.environ.get(discovery.PLUGINS, "plugins")
        os.environ[discovery.PLUGINS] = os.pathsep.join([str(folder.parent), *([named] if named else [])])
    folders = {plugin.folder for plugin in discovery.discover()[0]}
    return [] if folder in folders else [f"{folder} is not found; its name must be a Python identifier"]


def _check_file(path: Path, option: str, package: str, report: Report) -> None:
    group, _, name = option.rpartition("/")
    report.see(f"{option}: every key has a comment", [f"no comment: {line}" for line in unexplained_keys(path)])
    report.see(f"{option}: its keys are parameters of its constructor", foreign_keys(path))
    different = [
        f"{path.name}: {parameter} is {value}, the default of its constructor is {default}"
        for target, parameter, same, value, default in defaults_compared(path)
        # Options of constructors outside the plugin exist to set other values.
        if not same and target.startswith(f"{package}.")
    ]
    report.see(f"{option}: its values are the defaults of its constructor", different)
    for where, _, target in nodes(path):
        base = BASES.get(group) if where == "" else None
        if base is not None:
            missing = missing_base_error(target, (base,))
            report.see(f"{option}: derives from {base.__name__}", [f"{option}: {missing}"] if missing else [])
            if missing:
                return
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
        return  # needs an input that only a run has
    elif group == "reward":
        report.see(f"{option}: one finite score per response", check_reward(instantiate(node)))
    elif group == "annotator":
        report.see(f"{option}: comparisons, the same for the same seed", check_annotator(instantiate(node)))
    elif group == "sampler":
        report.see(f"{option}: K responses per prompt, the same for the same seed", check_sampler(instantiate(node)))
    elif group == "data" and Path(str(OmegaConf.select(node, "source"))).is_file():
        split = instantiate(node).load()
        report.see(f"{option}: {len(split.train)} records", [] if split.train else [f"{option}: no usable record"])


def check_objective(made: Any) -> list[str]:
    """Call an objective on made-up inputs of its protocol and return the problems."""
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
        return [f"{type(made).__name__} does not derive from a class of rlhf.objective, so no stage accepts it"]
    found = []
    if losses.shape != leaf.shape:
        found.append(f"losses have the shape {tuple(losses.shape)}, expected {tuple(leaf.shape)}, one each and no mean")
    if not torch.isfinite(losses).all():
        found.append("losses are not finite on ordinary inputs")
    elif not losses.requires_grad:
        found.append("losses have no gradient, so nothing would be trained")
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
    """Call a reward on made-up responses and return the problems."""
    responses = ["Four.", "Two plus two is four, as far as I know, and I know it well.", "", "I cannot say."]
    scores = reward(rollout(["What is two plus two?"] * len(responses), responses))
    if not isinstance(scores, Tensor) or scores.shape != (len(responses),):
        return [f"scores are {tuple(getattr(scores, 'shape', ()))} of {type(scores).__name__}, expected a tensor [B]"]
    if not scores.is_floating_point() or not torch.isfinite(scores).all():
        return ["scores must be finite floating-point numbers, for an empty response too"]
    return []


def check_annotator(annotator: Any) -> list[str]:
    """Call an annotator on made-up responses, two per prompt, and return the problems."""
    responses = ["Four.", "Two plus two is four, as far as I know.", "Same.", "Same.", "", "Some words."]
    given = rollout(["What is two plus two?"] * len(responses), responses)
    made = annotator(given, samples=2, seed=0)
    if not isinstance(made, list) or not all(isinstance(c, Comparison) for c in made):
        return ["expected a list of rlhf.data.records.Comparison"]
    found = [] if annotator(given, samples=2, seed=0) == made else ["the same seed gives other comparisons"]
    foreign = [c for c in made if not set(c.responses) <= set(responses)]
    return found + [f"a comparison has a response that was not in the rollout: {c.responses}" for c in foreign[:1]]


def check_sampler(sampler: Sampler) -> list[str]:
    """Sample at most 8 tokens per response to two prompts from a tiny model, and return the problems."""
    policy = tiny_model()
    sampler.max_new_tokens = min(sampler.max_new_tokens, 8)
    prompts = [Prompt((Message("user", text),)) for text in ("What is two plus two?", "What is ice?")]
    try:
        first, again = (sampler.sample(policy, list(prompts), seed=0) for _ in range(2))
    except UserError as e:
        return list(e.lines)
    rows = len(prompts) * sampler.samples
    if first.prompts != [prompt for prompt in prompts for _ in range(sampler.samples)]:
        return [f"expected {rows} rows, {sampler.samples} consecutive ones for each prompt"]
    shapes = {tuple(x.shape) for x in (first.response_ids, first.mask, first.logp)}
    found = [] if len(shapes) == 1 and len(first.texts) == rows else ["response_ids, mask and logp differ in shape"]
    if not torch.isfinite(first.logp).all() or (first.logp > 0).any():
        found.append("logp must be finite log-probabilities, 0 or less")
    return found + ([] if first.texts == again.texts else ["the same seed gives other responses"])


def _composes(group: str, name: str) -> list[str]:
    """Compose the option with a stage that reads its group, run the checks before a run, and return the problems."""
    given = [f"inputs.{role}=given" for role in ROLES]
    problems = []
    for choice in _choices(group, name):
        try:
            composed = compose_config(*choice, *(given if group not in ("pipeline", "experiment") else ()))
            if "stage" in composed:
                validate_config(composed)
            return []
        except (RLHFError, HydraException, OmegaConfBaseException) as e:
            problem = e.lines[0] if isinstance(e, RLHFError) else first_line(e)
            problems.append(f"{' '.join(choice)}: {problem}")
    return problems[:1] or [f"{group}={name}: no stage reads the group {group}"]


def _choices(group: str, name: str) -> Iterator[list[str]]:
    if group in ("stage", "pipeline", "experiment") or group not in discovered_groups():
        yield [f"{group}={name}"]
        return
    for stage in discovered_groups()["stage"]:
        try:
            base = compose_config(f"stage={stage}")
        except (HydraException, OmegaConfBaseException):
            continue
        if group in base or group in ("debug", "sweep"):
            yield [f"stage={stage}", f"{group}={name}"]


def discovered_groups() -> dict[str, list[str]]:
    """Return group -> options, of rlhf and all plugins."""
    found: dict[str, list[str]] = {}
    for conf in (discovery.conf_dir(), *(p.conf for p in discovery.discover()[0])):
        for option in discovery.options(conf):
            group, _, name = option.rpartition("/")
            found.setdefault(group, []).append(name)
    return found


def compose_config(*overrides: str) -> DictConfig:
    """Return the config of a command line, composed as `rlhf` does."""
    launcher.register()
    configs.register_resolvers()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
        return compose("config", overrides=list(overrides))
