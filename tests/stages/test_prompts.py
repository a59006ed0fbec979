"""Stages that sample: prompts are tokenised once, and one without room is reported before the first response."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl

from rlhf.annotator.gold import GoldAnnotator
from rlhf.data import encoding
from rlhf.data.encoding import encode_prompt
from rlhf.errors import UserError
from rlhf.objective import CrossEntropy
from rlhf.reward.gold import GoldReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.best_of_k import BestOfK
from rlhf.stage.base import Stage
from rlhf_collect.stage import CollectStage
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_rejection_sampling.stage import RejectionSamplingStage

from .conftest import adamw, constant, data, dies, fit

TRAIN, HELD_OUT = 12, 4


def grpo(load: Callable, sampler: AncestralSampler) -> Stage:
    hyperparameters: dict[str, Any] = {"batch_size": 4, "steps": 1, "minibatches": 2, "text_length": 32}
    parts = (data("prompt", TRAIN, HELD_OUT), None, GoldReward(), sampler, adamw, constant)
    return GRPOStage(load(), GRPO(), *parts, **hyperparameters)


def rejection(load: Callable, sampler: AncestralSampler) -> Stage:
    parts = (data("prompt", TRAIN, HELD_OUT), GoldReward(), sampler, adamw, constant)
    return RejectionSamplingStage(load(), CrossEntropy(), *parts, batch_size=4)


def collect(load: Callable, sampler: AncestralSampler) -> Stage:
    return CollectStage(load(), data("prompt", TRAIN, HELD_OUT), sampler, GoldAnnotator(), batch_size=4)


def run(stage: Stage, folder: Path) -> None:
    """Run until the first response is requested, or the stage refuses."""
    if stage.produces == "model":
        fit(stage, folder)
        return
    stage.run_directory = folder
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    pl.Trainer(accelerator="cpu", **off).predict(stage, return_predictions=False)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [grpo, rejection, collect])
def test_every_prompt_is_tokenised_once_before_the_first_response(
    make: Callable[..., Stage], load: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counted: list[Any] = []

    def counting(tokenizer: Any, messages: Any) -> list[int]:
        counted.append(messages)
        return encode_prompt(tokenizer, messages)

    monkeypatch.setattr(encoding, "encode_prompt", counting)
    monkeypatch.setattr("rlhf.sampler.base.encode_prompt", counting)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        run(make(load, dies(BestOfK(8, samples=4), 0)), tmp_path)
    assert len(counted) == TRAIN + HELD_OUT


@pytest.mark.parametrize("make", [grpo, rejection, collect])
def test_a_prompt_without_room_for_a_response_is_refused_before_sampling(
    make: Callable[..., Stage], load: Callable, tmp_path: Path
) -> None:
    """The context has 128 tokens, and the response may take all but one."""
    said = r"the prompt '.*' has \d+ tokens, .* leaves 1 for a prompt; type data.max_prompt_length=1 or a smaller "
    with pytest.raises(UserError, match=said):
        run(make(load, dies(BestOfK(127, samples=4), 0)), tmp_path)


def test_unused_held_out_prompts_may_have_any_length(load: Callable, tmp_path: Path) -> None:
    stage = collect(load, BestOfK(8, samples=2))
    assert isinstance(stage, CollectStage)
    lengths = {prompt: len(encode_prompt(stage.policy.tokenizer, prompt.messages)) for prompt in stage.data.train}
    longest = max(lengths, key=lengths.__getitem__)
    stage.data = type(stage.data)(
        [min(lengths, key=lengths.__getitem__)], [longest], stage.data.report, stage.data.data
    )
    stage.sampler.max_new_tokens = 128 - min(lengths.values())
    assert lengths[longest] > min(lengths.values())
    stage.trainer = pl.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, barebones=False)
    stage.read_examples()
    assert len(stage.examples) == 1
    with pytest.raises(UserError, match="has .* tokens"):
        stage.fit_prompts(stage.data, stage.sampler)
