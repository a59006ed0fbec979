"""Bad combinations of hyperparameters and groups are refused before the first step of a pipeline runs."""

from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from rlhf.cli import main
from rlhf.errors import UserError
from rlhf.planning.validation.config import validate_config

Composed = Callable[..., DictConfig]

BAD = [
    (
        "stage=ppo inputs.policy=ORG/P reward=gold sampler.samples=4",
        "type sampler.top_k=0 sampler.top_p=1 sampler.samples=1",
    ),
    ("stage=ppo inputs.policy=ORG/P reward=gold sampler.top_p=0.9", "PPO samples one response"),
    ("stage=ppo inputs.policy=ORG/P reward=gold sampler=tools", "PPO samples one response"),
    ("stage=ppo inputs.policy=ORG/P reward=gold stage.minibatches=3", "type stage.batch_size=129"),
    ("stage=ppo inputs.policy=ORG/P reward=gold stage.steps=4 stage.value_warmup=4", "type stage.steps=5 or more, or"),
    (
        "stage=ppo inputs.policy=ORG/P reward=gold stage.value_warmup=4 objective.value_coefficient=0",
        "objective.value_coefficient=0 does not train it",
    ),
    (
        "stage=ppo inputs.policy=ORG/P reward=gold objective.beta=0 objective.kl_target=6",
        "objective.kl_target=6: multiplies beta by factors, and objective.beta=0 stays 0; type objective.beta=0.05 ",
    ),
    (
        "stage=ppo inputs.policy=ORG/P reward=gold objective.gamma=2 text=null",
        "objective.gamma=2: needs pretraining text; type data@text=text, or objective.gamma=0",
    ),
    ("stage=ppo inputs.policy=ORG/P reward=gold trainer=ddp trainer.devices=3", "type stage.batch_size=129"),
    (
        "stage=ppo inputs.policy=ORG/P reward=gold trainer=ddp trainer.devices=2 trainer.num_nodes=32",
        "a multiple of 256",
    ),
    ("stage=grpo inputs.policy=ORG/P reward=gold sampler.samples=1", "type sampler.samples=8"),
    ("stage=rloo inputs.policy=ORG/P reward=gold sampler.top_k=3", "the policy's own distribution"),
    ("stage=collect inputs.policy=ORG/P sampler.samples=1", "samples"),
    ("stage=collect inputs.policy=ORG/P sampler=sample", "a comparison needs 2 or more"),
    ("stage=collect inputs.policy=ORG/P sampler=tools", "type sampler=best_of_k"),
    (
        "stage=rejection_sampling inputs.policy=ORG/P reward=gold sampler=sample sampler.samples=1",
        "sampler.samples=1: best-of-K needs at least 2 samples; type sampler.samples=4",
    ),
    ("stage=rejection_sampling inputs.policy=ORG/P reward=gold sampler=tools", "a selected response is a single turn"),
    ("stage=reward_model inputs.policy=ORG/P stage.normalize=demonstrations demonstrations=null", "type +data@demonst"),
    ("stage=dpo inputs.policy=ORG/P objective=simpo inputs.reference=ORG/R", "this objective has no reference"),
    ("stage=dpo inputs.policy=ORG/P objective=relative stage.batch_size=1", "type stage.batch_size=2"),
    ("stage=sft inputs.policy=ORG/P trainer=ddp trainer.devices=3", "must be a multiple of the 3 devices"),
    (
        "stage=ppo inputs.policy=ORG/P reward=weighted reward.rewards.model.path=ORG/R +reward.weights.rule=1",
        "reward.weights.rule: no such reward",
    ),
    (
        "stage=dpo inputs.policy=ORG/P data=mixture data.parts.second.source=ORG/D +data.weights.third=1",
        "data.weights.third: no such part",
    ),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[words for words, _ in BAD])
def test_a_bad_combination_is_refused_by_validation(composed: Composed, words: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        validate_config(composed("recipe=testbed", *words.split()))
    assert said in str(caught.value) and len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "align.sampler.samples=4",
            "error: align.sampler: PPO samples one response per prompt from the policy's own distribution; "
            "type align.sampler.top_k=0 align.sampler.top_p=1 align.sampler.samples=1 "
            "and align.sampler.temperature above 0",
        ),
        (
            "stage@align=grpo align.stage.minibatches=5",
            "error: align.stage.batch_size=32: must be a multiple of align.stage.minibatches=5; "
            "type align.stage.batch_size=35",
        ),
        (
            "stage@align=dpo objective@align.objective=relative align.stage.batch_size=1",
            "error: align.stage.batch_size=1: this objective compares the prompts of a batch with each other; "
            "type align.stage.batch_size=2 or more",
        ),
    ],
)
def test_a_pipeline_refuses_a_bad_combination_before_its_first_step(
    words: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    code = main.run(["pipeline=instructgpt", *words.split()])
    captured = capsys.readouterr()
    assert (code, (captured.out + captured.err).strip()) == (2, said)
    assert not list(tmp_path.iterdir())


def test_combinations_that_depend_on_the_machine_are_not_checked(composed: Composed) -> None:
    """devices=auto may be any number, and a stage without the hook is not checked."""
    words = ("stage=ppo", "recipe=testbed", "inputs.policy=ORG/P", "reward=gold", "trainer=ddp")
    validate_config(composed(*words, "trainer.devices=auto"))
    with pytest.raises(UserError, match="must be a multiple of the 3 devices; type stage.batch_size=129"):
        validate_config(composed(*words, "trainer.devices=3"))
