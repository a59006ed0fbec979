"""Names of adapted layers are validated against the model before anything runs, in a pipeline before its first step."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from rlhf.errors import UserError
from rlhf.models import gguf
from rlhf.models.causal_lm import CausalLM
from rlhf.planning.plan import plan
from rlhf.testing import tiny_model

TIED = "adapter.modules=lm_head: shares its weights with the input embedding in this model"
LORA = ["adapter=lora", "adapter.modules=[q_proj,lm_head]"]
GPT2 = "model.architecture={model_type: gpt2, n_embd: 32, n_layer: 1, n_head: 2, n_positions: 64}"


@pytest.fixture(autouse=True)
def isolated_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write outputs to the test's own directory, and fail if weights are read."""
    tiny_model().save(tmp_path / "tied" / "model")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(CausalLM, "load_weights", lambda *_: pytest.fail("weights are read"))


def plan_error(composed: Callable[..., DictConfig], *words: str) -> list[str]:
    """Return the lines of the error that planning raises."""
    with pytest.raises(UserError) as caught:
        plan(composed(*words))
    return str(caught.value).splitlines()


@pytest.mark.parametrize(
    "words",
    [
        [*LORA, "model=llama_tiny"],
        [*LORA, "model.path=tied"],
        ["adapter=qlora", "adapter.modules=lm_head", "model.path=tied/model"],
        ["adapter=lora", "adapter.modules=lm_head", "~model.architecture", f"+{GPT2}"],
    ],
    ids=["random", "run", "folder with qlora", "gpt2"],
)
def test_a_tied_projection_is_refused(composed: Callable[..., DictConfig], words: list[str]) -> None:
    (line,) = plan_error(composed, "stage=sft", *words)
    assert line.startswith(TIED), line
    assert "lm_head" not in line.partition("of its linear layers:")[2]


def test_a_pipeline_is_refused_before_its_first_step(composed: Callable[..., DictConfig]) -> None:
    """SFT starts from a model that is not pretrained yet: its layers are known from its configured architecture."""
    (line,) = plan_error(composed, "pipeline=instructgpt", *LORA)  # reported once, not for each later step
    assert line.startswith(f"sft: {TIED}")
    (line,) = plan_error(
        composed, "pipeline=instructgpt", "+adapter@align.adapter=lora", "align.adapter.modules=[lm_head]"
    )
    assert line.startswith(f"align.{TIED}")
    assert not Path("outputs").exists()


def test_layers_that_can_be_adapted_pass_planning(composed: Callable[..., DictConfig]) -> None:
    untied = "model.architecture.tie_word_embeddings=false"
    assert len(plan(composed("pipeline=instructgpt", untied, *LORA)).steps) == 5
    assert len(plan(composed("pipeline=instructgpt", "adapter=dora", "adapter.modules=[q_proj]")).steps) == 5
    assert plan(composed("stage=sft", "adapter=lora", "model.path=tied")).steps
    assert plan(composed("stage=sft", *LORA, "model.path=org/not-on-this-machine")).steps  # checked when it is loaded


def test_an_unknown_layer_name_is_refused_by_planning(composed: Callable[..., DictConfig]) -> None:
    (line,) = plan_error(composed, "stage=sft", "model.path=tied", "adapter=lora", "adapter.modules=[q_prj]")
    assert line.startswith("adapter.modules=q_prj: the model has no such linear layer (did you mean q_proj?)")


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("adapter.rank", ["stage=sft", "adapter=lora", "model.path=tied"]),
        ("align.adapter.rank", ["pipeline=instructgpt", "+adapter@align.adapter=lora"]),
    ],
)
def test_a_rank_above_the_hidden_size_is_refused(
    composed: Callable[..., DictConfig], key: str, words: list[str]
) -> None:
    (line,) = plan_error(composed, *words, f"{key}=1000000")
    said = rf"{key}=1000000: no update of .* has a rank above \d+, its hidden size; type {key}=16"
    assert re.fullmatch(said, line), line


def test_layers_of_a_gguf_file_are_checked_once_it_is_converted(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("model.gguf").write_bytes(b"GGUF")
    monkeypatch.setenv("RLHF_CACHE", str(Path("cache").absolute()))
    words = ["stage=sft", "model.path=model.gguf", *LORA]
    assert plan(composed(*words)).steps  # planning does not convert it
    place = gguf.place("model.gguf")
    place.parent.mkdir(parents=True, exist_ok=True)
    Path("tied/model").rename(place)
    (line,) = plan_error(composed, *words)
    assert "shares its weights with the input embedding" in line
