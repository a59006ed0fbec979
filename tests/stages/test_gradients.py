"""Gradient of the first update, against autograd of the plain formula over the model's ordinary forward pass.

Rows are read one at a time, without padding, packing or micro-batches, by the Hugging Face model itself; an optimizer
without state keeps the gradients, unclipped, so that their scale is compared too.
"""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from rlhf.sampler.ancestral import AncestralSampler
from rlhf.stage.base import Stage
from rlhf_dpo.objective import DPO
from rlhf_grpo.objective import GRPO
from rlhf_ppo.objective import PPO

from .conftest import fit
from .test_exactness import dpo, pretrain, reward_model, sft
from .test_groups import grpo
from .test_ppo import varied, watched

MARGINS = {"negligible": 0.0, "slightly": 1 / 3, "better": 2 / 3, "significantly": 1.0}  # Llama 2, table 27


def gradients(stage: Stage, folder: Path) -> dict[str, Tensor]:
    """Return name -> gradient of the only update, unclipped; no step is taken."""
    found: dict[str, Tensor] = {}

    def keep(*_: object) -> None:
        assert not found
        found.update({name: p.grad.clone() for name, p in stage.named_parameters() if p.grad is not None})

    def recording(groups) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(groups, lr=0.0)
        optimizer.register_step_pre_hook(keep)
        return optimizer

    stage.gradient_clip, stage._optimizer = None, recording
    fit(stage, folder, limit_train_batches=1, limit_val_batches=0)
    return found


def backward(loss: Tensor, model: torch.nn.Module) -> dict[str, Tensor]:
    """Return name -> gradient of a loss over ``model``."""
    loss.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    """Assert equal parameters and gradients, none of which is negligible at this tolerance."""
    atol = 1e-6
    assert found.keys() == expected.keys() and found
    for name, value in expected.items():
        assert value.abs().max() > 30 * atol, name
        torch.testing.assert_close(found[name], value, atol=atol, rtol=1e-4, msg=lambda m, k=name: f"{k}: {m}")


def first_batch(stage: Stage) -> list:
    """Return the examples of the first batch of a stage that was trained on it."""
    return [stage.examples[i] for i in next(iter(stage.batches))]


def logps(policy, ids: list[int], start: int) -> Tensor:
    """Return the log-probability of each token from ``start`` on, of one row without padding."""
    tokens = torch.tensor(ids)
    logits = policy.base(input_ids=tokens[None]).logits[0]
    return -F.cross_entropy(logits[start - 1 : -1], tokens[start:], reduction="none")


def text_loss(policy, rows: Iterable) -> Tensor:
    """Return the mean cross-entropy of packed rows, split into documents: every token but the first of a document."""
    losses = []
    for row in rows:
        starts = [t for t, position in enumerate(row.positions) if position == 0]
        for start, end in zip(starts, [*starts[1:], len(row)], strict=True):
            if end - start > 1:
                losses.append(-logps(policy, row.ids[start:end], 1))
    return torch.cat(losses).mean()


# -- the stages -------------------------------------------------------------------------------------------------------


def test_gradient_of_sft(load, tmp_path):
    """Mean over the assistant tokens of all eight dialogues of -log p."""
    stage, policy = sft(load, micro_batch_size=3), load()
    found = gradients(stage, tmp_path)
    losses = []
    for row in first_batch(stage):
        ids = torch.tensor(row.ids)
        targets = torch.where(torch.tensor(row.mask), ids, -100)
        logits = policy.base(input_ids=ids[None]).logits[0]
        losses.append(F.cross_entropy(logits[:-1], targets[1:], ignore_index=-100, reduction="none")[targets[1:] >= 0])
    assert len({len(row) for row in losses}) > 1  # a mean of means would be another number
    assert_same(found, backward(torch.cat(losses).mean(), torch.nn.ModuleDict({"policy": policy})))


def test_gradient_of_pretrain(load, tmp_path):
    stage, policy = pretrain(load, micro_batch_size=3), load()
    found = gradients(stage, tmp_path)
    rows = first_batch(stage)
    assert any(row.positions.count(0) > 1 for row in rows)
    assert_same(found, backward(text_loss(policy, rows), torch.nn.ModuleDict({"policy": policy})))


def test_gradient_of_the_reward_model(load, tmp_path):
    """Mean over prompts of the mean over their pairs of log(1 + exp(-(r_c - r_r - margin)))."""
    stage, fresh = reward_model(load, micro_batch_size=3), reward_model(load)
    found = gradients(stage, tmp_path)
    prompts = []
    for example in first_batch(stage):
        scores = []
        for response in example.responses:
            ids = torch.tensor([example.prompt + response])
            scores.append(fresh.scorer.language_model.base.get_decoder()(input_ids=ids).last_hidden_state[0, -1])
        scores = torch.stack(scores) @ fresh.scorer.head.weight[0]
        gaps = [scores[better] - scores[worse] - MARGINS[grade] for better, worse, grade in example.pairs]
        prompts.append((1 + (-torch.stack(gaps)).exp()).log().mean())
    assert_same(found, backward(torch.stack(prompts).mean(), fresh))


def test_gradient_of_dpo(load, tmp_path):
    """Equation 7's gradient where policy and reference agree: -beta / 2 (grad log pi(chosen) - grad log pi(rejected)).

    Of 2305.18290: the weight is beta times sigmoid(0).
    """
    beta = 0.3
    stage, policy = dpo(load, micro_batch_size=3), load()
    stage.batch_adapter.objective = DPO(beta=beta)
    found = gradients(stage, tmp_path)
    prompts = []
    for example in first_batch(stage):
        sums = [logps(policy, example.prompt + response, len(example.prompt)).sum() for response in example.responses]
        prompts.append(torch.stack([sums[better] - sums[worse] for better, worse, _ in example.pairs]).mean())
    loss = -beta / 2 * torch.stack(prompts).mean()
    assert_same(found, backward(loss, torch.nn.ModuleDict({"policy": policy})))


def test_gradient_of_ppo(load, tmp_path):
    """Where the ratio is 1 nothing is clipped: mean over tokens of -A grad log pi + c_v (V - R) grad V."""
    hyperparameters = {
        "batch_size": 16,
        "epochs": 1,
        "minibatches": 1,
        "score_clip": None,
        "sampler": AncestralSampler(24),
    }
    objective = PPO(beta=0.2, value_coefficient=0.4)
    stage, fresh = (watched(load, objective=objective, micro_batch_size=size, **hyperparameters) for size in (3, None))
    for each in (stage, fresh):  # a zero head would give the critic's decoder no gradient
        torch.nn.init.constant_(each.critic.head.weight, 0.1)
    found = gradients(stage, tmp_path)
    ((rollout, _, x),) = stage.seen
    terms = []
    for row in range(len(rollout.texts)):
        prompt, mask = rollout.prompt_ids[row][rollout.prompt_mask[row]], rollout.mask[row]
        ids = torch.cat([prompt, rollout.response_ids[row][mask]])
        states = fresh.critic.language_model.base.get_decoder()(input_ids=ids[None]).last_hidden_state[0]
        values = (states @ fresh.critic.head.weight[0])[len(prompt) - 1 : -1]
        policy = -x.advantages[row][mask] * logps(fresh.policy, ids.tolist(), len(prompt))
        terms.append(policy + 0.4 * 0.5 * (values - x.returns[row][mask]).square())
    assert len({len(row) for row in terms}) > 1
    assert_same(found, backward(torch.cat(terms).mean(), fresh))


# -- the pretraining term ---------------------------------------------------------------------------------------------


class Read:
    """Data of documents that records which of them were read."""

    def __init__(self, documents) -> None:
        self.documents, self.rows = documents, []

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: int):
        self.rows.append(self.documents[index])
        return self.rows[-1]


def of_ppo(load, gamma: float) -> Stage:
    sampler = AncestralSampler(10, temperature=0.7)
    return varied(
        load, PPO(gamma=gamma), sampler, batch_size=4, epochs=1, minibatches=1, micro_batch_size=2, text_ratio=0.65
    )


def of_grpo(load, gamma: float) -> Stage:
    sampler = AncestralSampler(10, samples=4, temperature=0.7)
    hyperparameters = {"batch_size": 2, "epochs": 1, "minibatches": 1, "micro_batch_size": 2, "text_ratio": 0.65}
    return grpo(load, GRPO(gamma=gamma), sampler=sampler, **hyperparameters)


@pytest.mark.parametrize("make, rows", [(of_ppo, 3), (of_grpo, 5)], ids=["ppo", "grpo"])
def test_the_pretraining_term_is_the_cross_entropy_of_the_texts(make, rows, load, tmp_path):
    """J = RL + gamma * L_text (InstructGPT, equation 2): gamma = 1 adds the gradient of descent on L_text.

    0.65 texts per response are 2.6 for 4 responses and 5.2 for 8, of the text as it is: the sampler's temperature is
    not applied.
    """
    without = gradients(make(load, 0.0), tmp_path / "0")
    stage, policy = make(load, 1.0), load()
    prepare, read = stage.prepare, []

    def watching() -> None:
        prepare()
        stage.documents = Read(stage.documents)
        read.append(stage.documents)

    stage.prepare = watching  # type: ignore[method-assign]
    both = gradients(stage, tmp_path / "1")
    assert len(read[0].rows) == rows
    added = {name: both[name] - without[name] for name in both if name.startswith("policy.")}
    expected = backward(text_loss(policy, read[0].rows), torch.nn.ModuleDict({"policy": policy}))
    assert_same(added, expected)
