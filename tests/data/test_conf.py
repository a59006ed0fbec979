"""Options of the group `data`: they compose, build, and load real files where those exist."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from omegaconf import OmegaConf

import rlhf.planning.step_config  # noqa: F401  registers the resolvers
from rlhf.data import Data, Mixture

CONF = Path(__file__).parents[2] / "conf"
OPTIONS = sorted(path.stem for path in (CONF / "data").glob("*.yaml"))
ROLES = ("comparisons", "more_comparisons", "demonstrations", "prompts", "text")
FILES = {
    "alpaca": "alpaca_en_demo.json",
    "c4": "c4_demo.jsonl",
    "dpo_demo": "dpo_en_demo.json",
    "graded_preferences": "graded_preferences.jsonl",
    "gsm8k": "gsm8k_train_1000.jsonl",
    "hh_harmless": "hh_harmless.jsonl.gz",
    "kto_demo": "kto_en_demo.json",
    "messages": "tool_use_demo_50.jsonl",
    "shakespeare": "tinyshakespeare.txt",
    "wiki": "wiki_demo.txt",
}


def option(name, **inputs):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(f"data/{name}")
    given = {"inputs": {role: inputs.get(role) for role in ROLES}}
    return OmegaConf.merge(given, config)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_builds(name):
    config = option(name)
    for part in [config.data, *config.data.get("parts", {}).values()]:
        if OmegaConf.is_missing(part, "source") or "source" in part and part.source is None:
            part.source = "given.jsonl"
    assert isinstance(instantiate(config.data), Mixture if name.endswith("mixture") else Data)


@pytest.mark.parametrize("name", ["text", "demonstrations", "comparisons", "labels", "prompts"])
def test_the_testbed_is_the_default(name):
    data = instantiate(option(name).data)
    assert data.source == "testbed"
    given = "comparisons" if name == "labels" else name
    assert instantiate(option(name, **{given: "elsewhere.jsonl"}).data).source == "elsewhere.jsonl"


@pytest.mark.parametrize("name", FILES)
def test_real_files_load_through_their_option(name, shared_data):
    config = option(name)
    config.data.source = str(shared_data / FILES[name])
    split = instantiate(config.data).load()
    assert split.train and split.validation and not split.report.bad
