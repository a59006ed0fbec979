"""Rewards and their combinations: their scores, their errors, and PPO training with them."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf.data.collate import TokenBatch, collate
from rlhf.data.encoded_rows import Encoded
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.records import Message, Prompt
from rlhf.data.testbed import gold
from rlhf.errors import UserError
from rlhf.models.auxiliary_models import load_critic
from rlhf.models.scalar import ScalarModel
from rlhf.reward.base import make_ready
from rlhf.reward.combined import GatedReward, WeightedReward
from rlhf.reward.exact_match import ExactMatch
from rlhf.reward.function import FunctionReward
from rlhf.reward.gold import GoldReward
from rlhf.reward.missing_eos import resolve_missing_eos
from rlhf.reward.model import ModelReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout
from rlhf.storage.metrics_file import read_rows
from rlhf.testing import check_reward, rollout, tiny_model
from rlhf_grpo.objective import GRPO
from rlhf_grpo.stage import GRPOStage
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage
from rlhf_rloo.objective import RLOO
from rlhf_rloo.stage import RLOOStage

from .conftest import Scored, adamw, constant, data, fit

Given = Callable[[Rollout], torch.Tensor]


def fixed(*scores: float) -> Scored:
    return Scored(lambda _: torch.tensor(scores))


def words(prompt: Prompt, response: str, most: int = 100) -> float:
    return min(len(response.split()), most)


def broken(prompt: Prompt, response: str) -> str:
    return "good"


def raising(prompt: Prompt, response: str) -> float:
    raise KeyError("colour")


def asked(*unsafe: bool) -> Rollout:
    """Return a rollout with one row per tag."""
    made = rollout(["What?"] * len(unsafe), ["That."] * len(unsafe))
    made.prompts[:] = [Prompt((Message("user", "What?"),), ("unsafe",) if tag else ()) for tag in unsafe]
    return made


@pytest.fixture
def scorer(load, tmp_path) -> Path:
    """Save a reward model with the policy's own tokenizer."""
    torch.manual_seed(3)
    ScalarModel.load(load()).save(tmp_path / "reward")
    return tmp_path / "reward"


@pytest.fixture(scope="module")
def foreign(tmp_path_factory) -> Path:
    """Save a reward model with another tokenizer."""
    path = tmp_path_factory.mktemp("foreign") / "reward"
    ScalarModel.load(tiny_model()).save(path)
    return path


# -- the gate -------------------------------------------------------------------------------------------------------


def test_the_gate_reads_the_sigmoid_of_safety():
    """The table of Llama 2: safety where the prompt is tagged, or where it is below 0.15; sigmoid(-1.7) = 0.154."""
    reward = GatedReward(fixed(2.0, 2.0, 2.0, 2.0), fixed(1.0, 1.0, -1.7, -1.8))
    scores = reward(asked(True, False, False, False))
    torch.testing.assert_close(scores, torch.tensor([1.0, 2.0, 2.0, -1.8]), atol=1e-5, rtol=1e-5)
    assert reward.parts["gated"] == 0.5 and reward.parts["helpfulness"] == 2.0


def test_the_gate_reads_the_probability_of_the_loss():
    """-1.1 deviations of 2.5 log-odds each are -2.75 in the loss: a probability of 0.06, below 0.15."""
    safety = fixed(-1.1, -0.6)
    assert GatedReward(fixed(2.0, 2.0), safety)(asked(False, False)).tolist() == pytest.approx([2.0, 2.0], abs=1e-5)
    safety.log_odds = 2.5
    scores = GatedReward(fixed(2.0, 2.0), safety)(asked(False, False))
    assert scores.tolist() == pytest.approx([-2.75, 2.0], abs=1e-5)


def test_the_logit_is_clamped():
    scores = GatedReward(fixed(200.0, -200.0), fixed(5.0, 5.0), eps=1e-6)(asked(False, False))
    torch.testing.assert_close(scores, torch.tensor([13.8155, -13.8155]), atol=0.1, rtol=0)
    narrow = GatedReward(fixed(200.0, -200.0), fixed(5.0, 5.0), eps=0.1)(asked(False, False))
    torch.testing.assert_close(narrow, torch.tensor([2.1972, -2.1972]), atol=1e-3, rtol=0)


def test_the_gate_reads_probabilities():
    reward = GatedReward(fixed(0.9, 0.9), fixed(0.5, 0.1), scale="probability")
    torch.testing.assert_close(reward(asked(False, False)), torch.logit(torch.tensor([0.9, 0.1])))
    with pytest.raises(UserError, match=r"safety: its scores, from -1 to 0\.5, are not .*type reward\.scale=logit"):
        GatedReward(fixed(0.9, 0.9), fixed(0.5, -1.0), scale="probability")(asked(False, False))


@pytest.mark.parametrize("hyperparameter", [{"threshold": 0.5}, {"eps": 0.4}, {"scale": "probability"}])
def test_every_hyperparameter_of_the_gate_changes_the_score(hyperparameter):
    arguments = (fixed(0.95, 0.9), fixed(0.8, -0.1 if "scale" not in hyperparameter else 0.1))
    given = asked(False, False)
    assert not torch.equal(GatedReward(*arguments, **hyperparameter)(given), GatedReward(*arguments)(given))


# -- sums -----------------------------------------------------------------------------------------------------------


def test_rewards_are_summed_by_weight():
    reward = WeightedReward({"model": fixed(1.0, 2.0), "rule": fixed(10.0, -10.0)}, {"rule": 0.5})
    assert reward(asked(False, False)).tolist() == [6.0, -3.0]
    with pytest.raises(UserError, match=r"reward\.weights\.rul.*did you mean"):
        WeightedReward({"rule": fixed(1.0)}, {"rul": 1.0})
    with pytest.raises(UserError, match="empty"):
        WeightedReward({}, {})


def test_combined_rewards_are_built_from_yaml():
    node = {
        "_target_": "rlhf.reward.combined.WeightedReward",
        "rewards": {
            "gold": {"_target_": "rlhf.reward.gold.GoldReward", "aspect": "safety"},
            "rule": {"_target_": "rlhf.reward.function.FunctionReward", "function": f"{__name__}:words"},
        },
        "weights": {"rule": 0.1},
    }
    reward = instantiate(OmegaConf.create(node))
    sampled = rollout(["x"] * 2, ["a b c", "a"])
    prompts = data("prompt").train[:2]
    sampled.prompts[:] = prompts
    expected = [gold(p, t).safety + 0.1 * len(t.split()) for p, t in zip(prompts, sampled.texts, strict=True)]
    assert reward(sampled).tolist() == pytest.approx(expected)


# -- gold and rules -------------------------------------------------------------------------------------------------


def test_gold_scores_by_aspect():
    prompts = data("prompt", 64).train
    unsafe = next(prompt for prompt in prompts if prompt.unsafe)
    safe = next(prompt for prompt in prompts if not prompt.unsafe)
    sampled = rollout(["x"] * 2, ["Sorry, I cannot help with that."] * 2)
    sampled.prompts[:] = [unsafe, safe]
    scores = {aspect: GoldReward(aspect)(sampled).tolist() for aspect in ("total", "helpfulness", "safety")}
    assert scores["total"] == [scores["safety"][0], scores["helpfulness"][1]]
    assert scores["helpfulness"] != scores["safety"]


def test_gold_refuses_prompts_of_other_data_before_training():
    with pytest.raises(UserError, match="gold scores only the testbed's own prompts"):
        make_ready(GoldReward(), None, asked(False).prompts)


def test_a_rule_takes_arguments():
    sampled = rollout(["x"] * 2, ["a b c", "a"])
    assert FunctionReward(f"{__name__}:words")(sampled).tolist() == [3, 1]
    assert FunctionReward(f"{__name__}:words", {"most": 2})(sampled).tolist() == [2, 1]
    assert check_reward(FunctionReward(f"{__name__}:words")) == []


@pytest.mark.parametrize(
    ("function", "arguments", "message"),
    [
        (
            "nowhere:rule",
            None,
            "no module nowhere, neither in .* nor installed; type the command in the directory of nowhere.py",
        ),
        (f"{__name__}:nothing", None, "test_rewards.py has no function nothing"),
        ("nowhere", None, "is not of the form module:function; type for example my_module:my_function"),
        (f"{__name__}:words", {"least": 2}, r"called as function\(prompt, response, least=2\)"),
    ],
)
def test_a_rule_that_cannot_be_called_is_refused_at_construction(function, arguments, message):
    with pytest.raises(UserError, match=message):
        FunctionReward(function, arguments)


def test_a_rule_that_returns_no_number_is_named():
    with pytest.raises(UserError, match=r"test_rewards:broken: returned 'good' for the response 'y', must"):
        FunctionReward(f"{__name__}:broken")(rollout(["x"], ["y"]))
    with pytest.raises(UserError, match=r"raising: failed on the response 'y' with KeyError: 'colour'"):
        FunctionReward(f"{__name__}:raising")(rollout(["x"], ["y"]))


# -- reward models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [True, False], ids=["own tokenizer", "another tokenizer"])
def test_a_reward_model_reads_the_text_in_its_own_tokens(own, load, scorer, foreign):
    """Each score equals that of the dialogue alone, and a truncated response is read as truncated."""
    reward = ModelReward(str(scorer if own else foreign), batch_size=3)
    sampled = AncestralSampler(12).sample(load(), data("prompt").train[:8], 0)
    tokenizer = reward.model.tokenizer
    for row, score in enumerate(reward(sampled).tolist()):
        question = encode_prompt(tokenizer, sampled.prompts[row].messages)
        response = encode_response(tokenizer, sampled.texts[row])
        ids = question + (response if sampled.ended[row] else response[:-1])
        batch = collate([Encoded(ids, [True] * len(ids))], reward.model.pad_id)
        alone = reward.model.scores(TokenBatch.of(batch.ids, batch.attention_mask, position_ids=batch.position_ids))
        assert score == pytest.approx(alone.item(), abs=1e-5)


def test_a_language_model_is_refused_as_reward_model(load, tmp_path):
    """Detected at loading where it could not be checked before: its head would be random."""
    load().save(tmp_path / "policy")
    with pytest.raises(
        UserError,
        match=r"^reward.path=.*: is a language model, which has no score head; type inputs.reward_model=RUN, ",
    ):
        ModelReward(str(tmp_path / "policy")).to(torch.device("cpu"))
    with pytest.raises(UserError, match="type stage.value=null"):
        load_critic(load(), str(tmp_path / "policy"))


def test_a_prompt_too_long_for_the_reward_model_is_refused_before_training(foreign):
    long = Prompt((Message("user", "word " * 300),))
    with pytest.raises(UserError, match=r"the reward model .* reads 128"):
        make_ready(GatedReward(ModelReward(str(foreign)), fixed(0.0)), None, [long], 8)


def test_missing_eos_is_replaced_under_a_reward_model_and_left_under_a_rule(load, scorer, tmp_path):
    """Huang et al. 2024: -1, whatever the reward model's score. Exact match and rules score the text as it is."""
    model = ModelReward(str(scorer))
    learned = [model, GatedReward(model, model), WeightedReward({"rule": fixed(1.0), "model": model}, {})]
    rules = [GoldReward(), FunctionReward(f"{__name__}:words"), ExactMatch(), WeightedReward({"rule": fixed(1.0)}, {})]
    assert {resolve_missing_eos("auto", 1.0, reward) for reward in learned} == {"replace"}
    assert {resolve_missing_eos("auto", 1.0, reward) for reward in rules} == {"none"}
    assert resolve_missing_eos("subtract", 3.0, rules[0]) == "subtract" and resolve_missing_eos("auto", 3.0, model)
    for how, message in (("auto", "leaves the scores of a rule"), ("none", "reads no penalty")):
        with pytest.raises(UserError, match=rf"missing_eos_penalty=3: is not read, .*{message}.*missing_eos=subtract"):
            resolve_missing_eos(how, 3.0, rules[0])
    raw, ended = torch.tensor([2.0, 2.0, -3.0]), torch.tensor([True, False, False])
    for kind, objective, samples in ((PPOStage, PPO, 1), (GRPOStage, GRPO, 2), (RLOOStage, RLOO, 2)):
        for reward, expected in ((model, [2.0, -1.0, -1.0]), (rules[0], [2.0, 2.0, -3.0])):
            parts = (data("prompt"), None, reward, AncestralSampler(8, samples=samples), adamw, constant)
            assert kind(load(), objective(gamma=0.0), *parts).shape_scores(raw, ended).tolist() == expected


def test_ppo_trains_with_a_gate_of_two_models_with_different_tokenizers(load, scorer, foreign, tmp_path):
    reward = GatedReward(ModelReward(str(scorer)), ModelReward(str(foreign)))
    hyperparameters = {"batch_size": 8, "steps": 2, "epochs": 1, "minibatches": 2, "text_length": 32}
    stage = PPOStage(
        load(),
        PPO(),
        data("prompt"),
        None,
        reward,
        AncestralSampler(10),
        adamw,
        constant,
        normalize_scores="batch",
        value=str(scorer),
        **hyperparameters,
    )
    fit(stage, tmp_path / "run")
    rows = [row for row in read_rows(tmp_path / "run" / "metrics.csv") if "score" in row]
    assert len(rows) == 2
    for row in rows:
        assert 0 <= row["reward/gated"] <= 1 and {"reward/helpfulness", "reward/safety"} <= row.keys()
    with pytest.raises(UserError, match=r"stage\.value=.* another vocabulary"):
        PPOStage(
            load(),
            PPO(),
            data("prompt"),
            None,
            reward,
            AncestralSampler(10),
            adamw,
            constant,
            value=str(foreign),
            **hyperparameters,
        )
