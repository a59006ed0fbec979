"""Published models in every stage, planned from their YAMLs without network, and the page that lists them."""

import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rlhf.errors import UserError
from rlhf.inspection.composing import Look, composed, planned
from rlhf.inspection.roles import roles_of
from rlhf.models.causal_lm import CausalLM
from rlhf.models.model_source import ModelSource
from rlhf.planning.checks import memory
from rlhf.planning.plan import plan
from rlhf.planning.validation.config import validate_config
from rlhf.storage import hub
from rlhf.testing import ROLES, discovered_groups, tiny_model
from tests.models.published import CONF, COUNTS, FAMILIES, MODULES, option, random_weights

PAGE = Path(__file__).parents[2] / "docs" / "models.md"
STAGES = discovered_groups()["stage"]


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write outputs to the test's own directory; the hub does not respond, and its cache is empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "_chosen", {})
    monkeypatch.setattr(hub, "_in_cache", lambda hub_id: False)
    monkeypatch.setattr(hub, "reachable", lambda: False)


@pytest.fixture
def unread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail if weights, a configuration or a tokenizer are read, from files or from the hub."""
    monkeypatch.setattr(ModelSource, "read", lambda _, reader, place, **__: pytest.fail(f"{place} is read"))
    monkeypatch.setattr(CausalLM, "load_weights", lambda *_: pytest.fail("weights are read"))


@pytest.mark.parametrize("stage", STAGES)
def test_every_model_passes_validation_in_every_stage(stage: str) -> None:
    config = composed([f"stage={stage}", *(f"inputs.{role}=given" for role in ROLES)])
    for name in COUNTS:
        config.model = OmegaConf.merge(OmegaConf.load(CONF / f"{name}.yaml"), {"path": config.model.path})
        validate_config(config)


@pytest.mark.parametrize("name", FAMILIES.values())
def test_sft_is_planned_from_the_architecture_alone(name: str) -> None:
    """With random weights, because the tokenizer of the published ones is on the hub."""
    small = ["data.size=24", "data.validation=8", "stage.batch_size=8"]
    look = Look(
        planned(["stage=sft", f"model={name}", "model.path=null", *small, "adapter=lora", "adapter.rank=1"]).steps
    )
    (role,) = roles_of(look, look.stage(look.steps[-1]))
    assert role.parameters - role.trained == COUNTS[name] and role.trained > 0


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_pipeline_with_ppo_is_planned_from_the_configuration_alone(family: str, tmp_path: Path) -> None:
    """Policy, critic, reward model and reference of two layers: the weights of each, and a scalar head for two."""
    name = FAMILIES[family]
    source = random_weights(name)
    config = source.config()
    config.num_hidden_layers = 2
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:2]
    model = source.build_on_meta(config)
    weights = model.num_parameters()
    config.architectures = [type(model).__name__]
    config.save_pretrained(tmp_path / "published")
    tiny_model().tokenizer.save_pretrained(tmp_path / "published")
    small = ["sft.data.size=40", "align.stage.batch_size=8", "align.data.size=16"]
    words = ["pipeline=instructgpt", f"model={name}", f"model.path={tmp_path / 'published'}", "adapter=lora", *small]
    look = Look(planned(words).steps)
    roles = {role.name: role for role in roles_of(look, look.stage(look.steps[-1], strict=False))}
    assert set(roles) == {"policy", "critic", "reference", "reward"}
    head = 0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size  # scalar models have none
    scalar = weights - head + config.hidden_size
    assert roles["policy"].parameters - roles["policy"].trained == weights
    assert roles["reward"].parameters == scalar
    assert roles["critic"].parameters - roles["critic"].trained == scalar - config.hidden_size
    assert roles["reference"].parameters == 0  # the policy's base without the adapter


@pytest.mark.parametrize("words", [["stage=sft"], ["stage=dpo", "inputs.policy=NAME"], ["pipeline=instructgpt"]])
@pytest.mark.usefixtures("unread")
def test_without_the_hub_a_model_is_refused_in_one_line(words: list[str]) -> None:
    """The config is composed once: it differs between models in the group of the model and in the policy alone."""
    names = [name for name in COUNTS if name != "smollm2_135m"]
    config = composed([*words, f"model={names[0]}"])
    for name in names:
        config.model = OmegaConf.load(CONF / f"{name}.yaml")
        if config.inputs.get("policy"):
            config.inputs.policy = name
        with pytest.raises(UserError) as error:
            plan(config, [*(word.replace("NAME", name) for word in words), f"model={name}"])
        (line,) = str(error.value).splitlines()
        assert line.startswith(f"model.path={option(name)['hub_id']}: the hub is not reachable")
    assert config == composed([*(word.replace("NAME", names[-1]) for word in words), f"model={names[-1]}"])
    assert not list(Path().glob("outputs/*"))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["stage=sft", "model=pythia_160m", "adapter=lora", "adapter.modules=[q_proj]"], "query_key_value"),
        (["stage=sft", "model=opt_125m", "adapter=lora", "adapter.modules=[lm_head]"], "shares its weights"),
        (["stage=sft", "model=gemma3_270m", "adapter=lora", "adapter.rank=641"], "a rank above 640"),
        (
            ["stage=rloo", "reward=gold", "model=opt_125m", "inputs.policy=opt_125m", "sampler.max_new_tokens=2048"],
            "2048",
        ),
    ],
)
@pytest.mark.usefixtures("unread")
def test_sizes_and_layers_are_checked_before_the_weights_are_downloaded(
    monkeypatch: pytest.MonkeyPatch, words: list[str], said: str
) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)
    with pytest.raises(UserError) as error:
        planned(words)
    (line,) = str(error.value).splitlines()
    assert said in line, line


@pytest.mark.usefixtures("unread")
def test_weights_larger_than_the_memory_are_refused_before_they_are_downloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "reachable", lambda: True)
    monkeypatch.setattr(memory, "read_machine_memory", lambda: 12 * 2**30)
    made = planned(["stage=sft", "model=llama3_2_1b"])
    with pytest.raises(UserError, match="need 18 GiB, this machine has 12 GiB"):  # 16 bytes a weight
        memory.check_memory(made.steps)
    memory.check_memory(planned(["stage=sft", "model=llama3_2_1b", "adapter=lora"]).steps)


def test_the_architecture_is_not_that_of_other_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers of an unknown model are checked when it is loaded."""
    monkeypatch.setattr(hub, "reachable", lambda: True)
    words = ["stage=sft", "model=pythia_160m", "adapter=lora", "adapter.modules=[q_proj]"]
    assert planned([*words, "inputs.policy=org/not-on-this-machine"]).steps
    assert planned([*words, "model.path=org/not-on-this-machine"]).steps


# The page


def rows() -> dict[str, list[str]]:
    """Return name -> the other cells of the page's table."""
    lines = re.findall(r"^\| `(\w+)` \|(.*)\|$", PAGE.read_text(), flags=re.MULTILINE)
    return {name: [cell.strip() for cell in cells.split("|")] for name, cells in lines}


@pytest.mark.parametrize("name", COUNTS)
def test_the_page_agrees_with_the_yaml(name: str) -> None:
    arguments: dict[str, Any] = option(name)
    shape = arguments["architecture"]
    weights, hub_id, licence, context, template, modules = rows()[name]
    header = (CONF / f"{name}.yaml").read_text().partition("_target_")[0]
    assert weights == f"{COUNTS[name]:,}" and f"{weights} weights" in header
    assert hub_id == f"[{arguments['hub_id']}](https://huggingface.co/{arguments['hub_id']})"
    assert f"# Licence: {licence.partition(' (')[0]}" in header
    assert context == f"{shape['max_position_embeddings']:,}"
    assert template.strip("`") == (arguments["chat_template"] or "own")
    assert [word.strip("` ") for word in modules.split(",")] == list(MODULES[shape["model_type"]])


def test_the_page_lists_every_model_and_is_linked() -> None:
    assert list(rows()) == list(COUNTS)
    published = {file.stem for file in CONF.glob("*.yaml") if OmegaConf.load(file).get("hub_id")}
    assert published == set(COUNTS)
    assert "docs/models.md" in (PAGE.parents[1] / "README.md").read_text()
