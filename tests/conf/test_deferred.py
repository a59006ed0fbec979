"""Fixed overrides beside a swept option: composition without the swept option must not fail on them."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from rlhf import discovery
from rlhf.cli.deferred import deferred
from rlhf.cli.main import register

CASES = {
    "a hyperparameter of some options": (
        ["stage=sft", "adapter=lora,qlora", "adapter.rank=4"],
        [2],
        "++adapter.rank=4",
    ),
    "a group of some stages": (["stage=grpo,rloo", "reward=gold", "seed=1"], [1], "reward=choice(gold)"),
    "a hyperparameter in a step": (
        ["pipeline=instructgpt", "stage@align=grpo,rloo", "align.stage.max_resamples=2", "collect.sampler.samples=2"],
        [2],
        "++align.stage.max_resamples=2",
    ),
    "a group in a step": (
        ["pipeline=instructgpt", "stage@align=rejection_sampling,grpo", "sampler@align.sampler=best_of_k"],
        [2],
        "sampler@align.sampler=choice(best_of_k)",
    ),
    "nothing of a group": (["stage=ppo", "objective.beta=0.1,0.2", "sampler.temperature=0.7"], [], None),
    "marked by hand": (["stage=sft", "adapter=lora,qlora", "++adapter.rank=4", "+adapter.x=1"], [], None),
}


@pytest.mark.parametrize("case", CASES)
def test_overrides_that_depend_on_a_swept_option_are_deferred_to_the_jobs(case):
    words, changed, becomes = CASES[case]
    found = deferred(words)
    assert [i for i, (a, b) in enumerate(zip(words, found, strict=True)) if a != b] == changed
    assert [found[i] for i in changed] == [becomes] * len(changed)


@pytest.mark.parametrize("case", [case for case, (_, changed, _) in CASES.items() if changed])
def test_hydra_composes_the_remaining_overrides_and_each_job(case):
    words, _, _ = CASES[case]
    register()
    parser = OverridesParser.create()

    def rest(words):
        return [word for word in words if not parser.parse_override(word).is_sweep_override()]

    with initialize_config_dir(str(discovery.conf_dir()), version_base="1.3"):
        if case != "a group in a step":  # where the default stage happens to contain the group
            with pytest.raises(HydraException):
                compose("config", rest(words))
        compose("config", rest(deferred(words)))
        for first in (True, False):
            job = []
            for word in deferred(words):
                override = parser.parse_override(word)
                if override.is_sweep_override():
                    values = list(override.sweep_string_iterator())
                    word = f"{word.partition('=')[0]}={values[0] if first else values[-1]}"
                job.append(word)
            compose("config", job)


def test_a_mistake_is_left_for_hydra_to_report():
    assert deferred(["stage=a,b", "x=[1", "y=2"]) == ["stage=a,b", "x=[1", "y=2"]
    assert deferred(["--config-dir", "stage=sft,dpo", "reward=gold"])[1:] == ["stage=sft,dpo", "reward=choice(gold)"]
