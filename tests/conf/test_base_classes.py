"""The base classes of rewards, annotators and samplers: one method to define, defaults for the rest, refusals."""

import importlib
import re
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

from rlhf.annotator.base import Annotator
from rlhf.annotator.reward import RewardAnnotator
from rlhf.data.records import Comparison
from rlhf.errors import UserError
from rlhf.planning.base_classes import check_base_classes
from rlhf.planning.validation.config import validate_config
from rlhf.reward.base import Reward, make_ready
from rlhf.reward.gold import GoldReward
from rlhf.reward.model import find_model_rewards
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.base import Sampler, single
from rlhf.sampler.best_of_k import BestOfK
from rlhf.sampler.rollout import Rollout
from rlhf.testing import check_plugin, check_sampler, rollout, tiny_model

ROOT = Path(__file__).resolve().parents[2]


class Words(Reward):
    """The number of words."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return torch.tensor([float(len(text.split())) for text in rollout.texts])


class Silent(Annotator):
    """No preference at all."""

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        return []


class Greedy(Sampler):
    """The likeliest tokens, whatever the seed is."""

    def sample(self, policy, prompts, seed):
        return AncestralSampler(self.max_new_tokens, 0.0, samples=self.samples).sample(policy, prompts, 0)


class Fewer(Greedy):
    """One response, however many are wanted."""

    def sample(self, policy, prompts, seed):
        return single(self).sample(policy, prompts, seed) if self.samples > 1 else super().sample(policy, prompts, seed)


class Plain:
    """A reward of nobody."""

    def __call__(self, rollout: Rollout) -> torch.Tensor:
        return torch.zeros(len(rollout.texts))


class Unfinished(Reward):
    """A reward without its method."""


def function() -> Words:
    return Words()


# -- defaults -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", [Reward, Annotator, Sampler])
def test_one_method_is_to_be_defined(base: type) -> None:
    assert base.__abstractmethods__ == {"sample" if base is Sampler else "__call__"}
    with pytest.raises(TypeError, match="abstract"):
        base()


def test_a_reward_needs_only_its_scores() -> None:
    reward = Words()
    given = rollout(["What?"], ["Two words."])
    make_ready(reward, torch.device("cpu"), given.prompts, 100)
    assert reward(given).tolist() == [2.0]
    assert (dict(reward.parts), dict(reward.rewards), reward.log_odds) == ({}, {}, 1.0)
    assert find_model_rewards(reward) == {}


def test_an_annotator_needs_only_its_comparisons(tmp_path: Path) -> None:
    annotator = Silent()
    annotator.to(torch.device("cpu"))
    annotator.open(tmp_path)
    assert (dict(annotator.counts), annotator.rates(Counter()), annotator.aspect) == ({}, {}, "total")
    assert dict(annotator.rewards) == {} and list(tmp_path.iterdir()) == []


def test_defaults_are_nobodys_to_change() -> None:
    """A default that one object could write to would be every object's."""
    for value in (Words().parts, Words().rewards, Silent().counts, Silent().rewards):
        with pytest.raises(TypeError):
            value["new"] = 1  # type: ignore[index]


def test_the_reward_of_an_annotator_is_moved_with_it() -> None:
    class Moved(Words):
        device = None

        def to(self, device: torch.device) -> None:
            self.device = device

    reward = Moved()
    annotator = RewardAnnotator(reward)
    annotator.to(torch.device("cpu"))
    assert reward.device == torch.device("cpu") and annotator.rewards == {"reward": reward}


def test_a_sampler_needs_only_its_responses() -> None:
    sampler, policy = Greedy(4, samples=3), tiny_model()
    assert sampler.exact and not Greedy(temperature=0.0).exact
    assert sampler.longest == sampler.room(policy) == 4 and sampler.spread == [1.0] * 3
    sampler.require_single_turn("reason")
    sampler.check_context(5)
    with pytest.raises(UserError, match="leaves no room for a prompt"):
        sampler.check_context(4)
    assert (single(sampler).samples, sampler.samples) == (1, 3)
    assert check_sampler(sampler) == [] == check_sampler(BestOfK(4, samples=2))
    assert "expected 4 rows" in check_sampler(Fewer(4, samples=2))[0]


# -- refusals -------------------------------------------------------------------------------------------------------


def found(value: object, annotation: object) -> list[str]:
    return [str(error) for error in check_base_classes(value, annotation, "reward")]


def node(target: object) -> dict[str, str]:
    return {"_target_": f"tests.conf.test_base_classes.{target.__name__}"}


def test_a_class_without_the_base_is_refused() -> None:
    line = "Plain does not derive from Reward; write from rlhf.reward.base import Reward and class Plain(Reward)"
    (problem,) = found(node(Plain), Reward)
    assert problem.startswith("reward: ") and problem.endswith(line)
    assert found(node(Plain), Reward | None) == [problem]
    assert found({"one": node(Words), "two": node(Plain)}, dict[str, Reward]) == [problem.replace(":", ".two:", 1)]
    assert found([node(Plain)], list[Reward]) == [problem.replace(":", "[0]:", 1)]
    assert "does not define __call__" in found(node(Unfinished), Reward)[0]
    assert "function is not a class derived from Reward" in found(node(function), Reward)[0]


def test_classes_of_the_base_and_other_parameters_are_accepted() -> None:
    for annotation in (Reward, Reward | None, Reward | int, object, str):
        assert found(node(Words), annotation) == []
    assert found(node(Plain), GoldReward) == [] == found(None, Reward) == found({"_target_": "no.module"}, Reward)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["reward=gold"], "reward"),
        (["reward=gated", "reward@reward.safety=gold"], "reward.safety"),
        (["reward=weighted", "+reward@reward.rewards.rule=gold"], "reward.rewards.rule"),
    ],
)
def test_a_plain_class_is_refused_in_one_line(composed: Callable[..., DictConfig], words: list[str], key: str) -> None:
    roles = [f"inputs.{role}=given" for role in ("policy", "reward_model", "safety_model")]
    config = composed("stage=ppo", *roles, *words, f"~{key}.aspect", f"{key}._target_=argparse.Namespace")
    with pytest.raises(UserError) as error:
        validate_config(config)
    assert str(error.value) == (
        f"{key}: argparse.Namespace does not derive from Reward; "
        "write from rlhf.reward.base import Reward and class Namespace(Reward)"
    )


@pytest.mark.parametrize(
    ("group", "base", "rest"),
    [
        ("reward", "from rlhf.reward.base import Reward", "return torch.zeros(len(rollout.texts))"),
        ("annotator", "from rlhf.annotator.base import Annotator", "return []"),
        ("sampler", "from rlhf.sampler.base import Sampler", "return None"),
    ],
)
def test_the_check_of_a_plugin_names_what_is_missing(
    group: str, base: str, rest: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, kind = f"nobodys_{group}", base.split()[-1]
    folder = tmp_path / name
    (folder / "conf" / group).mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    (folder / "conf" / group / f"{name}.yaml").write_text(f"# nobody's\n_target_: {name}.mine.Mine\n")
    method = f"def __call__(self, rollout, *_, **__):\n        {rest}"
    (folder / "mine.py").write_text(f'import torch\n\n\nclass Mine:\n    """Mine."""\n\n    {method}\n')
    monkeypatch.setenv("RLHF_PLUGINS", str(tmp_path))
    problems = check_plugin(folder).problems
    line = f"{group}/{name}: {name}.mine.Mine does not derive from {kind}; write {base} and class Mine({kind})"
    assert problems == [line]


# -- public names ---------------------------------------------------------------------------------------------------


def test_the_page_lists_the_public_names() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    section = re.split(r"\n## ", page.split("## What a plugin may rely on")[1])[0]
    rows = re.findall(r"^\| `(rlhf\.[\w.]+)` \| [^|]+ \| (.+) \|$", section, re.MULTILINE)
    listed = {module: re.findall(r"`(\w+)`", names) for module, names in rows}
    assert len(listed) == 15
    for module, names in listed.items():
        loaded = importlib.import_module(module)
        assert sorted(names) == sorted(loaded.__all__), module
        assert all(hasattr(loaded, name) for name in names)


def test_every_public_class_and_function_is_documented() -> None:
    for module in ("rlhf.reward.base", "rlhf.annotator.base", "rlhf.sampler.base"):
        loaded = importlib.import_module(module)
        assert all(getattr(loaded, name).__doc__ for name in loaded.__all__)
    assert (ROOT / "rlhf" / "py.typed").is_file()
