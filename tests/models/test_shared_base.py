"""One base, many roles: each role equals the model with separate weights, and the weights are stored once."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError
from rlhf.models.adapters import DoRA, LoRA, NoAdapter, QLoRA
from rlhf.models.auxiliary_models import load_critic, load_reference
from rlhf.models.footprint import measure_footprint
from rlhf.models.language_model import LanguageModel
from rlhf.models.lineage import chain, common_base, digest
from rlhf.models.module_state import check_gradients
from rlhf.models.reference import start_reference
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_base import SharedBase, copy_tree
from tests.models.conftest import FP32, move_adapter, random_model, spec

Batch = tuple[Tensor, Tensor, Tensor]
ONE = LoRA(rank=4, shared_base=True)


def save_policy(folder: Path, base: Path, adapter: NoAdapter) -> Path:
    """Save a run that trained an adapter on ``base``, or all weights."""
    model = spec(base).load(adapter, FP32)
    move_adapter(model)
    model.save(folder / "model")
    return folder / "model"


def save_scorer(folder: Path, base: Path, adapter: NoAdapter, seed: int = 3) -> Path:
    """Save a reward model as its stage does: a head on a language model, with normalised scores."""
    torch.manual_seed(seed)
    model = ScalarModel.load(spec(base).load(adapter, FP32))
    move_adapter(model)
    model.scale.fill_(1.7)
    model.bias.fill_(-0.4)
    model.save(folder / "model")
    return folder / "model"


class Runs(NamedTuple):
    """Paths of runs: pre <- sft (LoRA) <- judge (reward model, LoRA), and pre <- scorer (reward model, LoRA)."""

    root: Path
    pre: Path
    sft: Path
    judge: Path
    scorer: Path


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    root = tmp_path_factory.mktemp("outputs")
    random_model().save(root / "pre" / "model")
    pre = root / "pre" / "model"
    sft = save_policy(root / "sft", pre, LoRA(rank=2, alpha=8.0))
    judge = save_scorer(root / "judge", sft, LoRA(rank=3))
    return Runs(root, pre, sft, judge, save_scorer(root / "scorer", pre, LoRA(rank=2, modules=["q_proj", "up_proj"])))


def roles_on(policy: Path, scorer: Path, adapter: LoRA = ONE, **changes: object) -> tuple:
    """Return policy, reference, critic and reward model on one base."""
    key = {"reward.path": str(scorer), "stage.value": str(scorer)}
    base = SharedBase.find(spec(policy, **changes), adapter, FP32, key, ["stage.value"]).load()
    reward, model = base.scalar(str(scorer)), base.policy()
    return base, model, start_reference(model), load_critic(model, str(scorer)), reward


def train(model: nn.Module) -> None:
    """Move the trainable adapters, as training would."""
    torch.manual_seed(1)
    for name, value in model.named_parameters():
        if ".lora_B.default." in name:
            assert value.requires_grad
            value.data += 0.05 * torch.randn_like(value)


# -- which base -------------------------------------------------------------------------------------------------------


def test_the_common_base_is_the_nearest_to_the_policy(runs: Runs) -> None:
    assert [node.path for node in chain(str(runs.judge))] == [str(runs.judge), str(runs.sft), str(runs.pre)]
    base, stacks = common_base(str(runs.sft), {"reward.path": str(runs.judge)})
    assert base.path == str(runs.sft)  # the SFT model's merged weights: its reference is the base itself
    assert stacks == {str(runs.sft): [], str(runs.judge): [runs.judge.parent / "adapter"]}
    base, stacks = common_base(str(runs.sft), {"a": str(runs.judge), "b": str(runs.scorer)})
    assert base.path == str(runs.pre)
    assert stacks[str(runs.judge)] == [runs.sft.parent / "adapter", runs.judge.parent / "adapter"]
    assert stacks[str(runs.sft)] == [runs.sft.parent / "adapter"]


def test_equal_weights_at_another_path_are_the_same_base(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.pre.parent, tmp_path / "copy")
    base, _ = common_base(str(tmp_path / "copy" / "model"), {"reward.path": str(runs.scorer)})
    assert base.path == str(tmp_path / "copy" / "model")


def test_a_different_base_is_refused_in_one_line(runs: Runs, tmp_path: Path) -> None:
    whole = save_scorer(tmp_path / "whole", runs.pre, NoAdapter())
    with pytest.raises(
        UserError, match=r"reward.path=.*all of its weights were trained.*adapter.shared_base=false"
    ) as e:
        SharedBase.find(spec(runs.sft), ONE, FP32, {"reward.path": str(whole)})
    assert "\n" not in str(e.value)
    with pytest.raises(UserError, match="random weights.*adapter.shared_base=false"):
        SharedBase.find(spec(), ONE, FP32, {"reward.path": str(whole)})


def test_a_base_whose_weights_changed_is_refused(runs: Runs, tmp_path: Path) -> None:
    shutil.copytree(runs.root, tmp_path / "outputs")
    scorer = tmp_path / "outputs" / "scorer" / "model"
    file = scorer.parent / "adapter" / "base.json"
    stored = json.loads(file.read_text())
    assert stored["digest"] == digest(str(runs.pre)) and stored["path"] == str(runs.pre)
    file.write_text(json.dumps({**stored, "path": "/nowhere"}))  # moved outputs: found at its place beside the run
    assert chain(str(scorer))[-1].path == str(tmp_path / "outputs" / "pre" / "model")
    save_policy(tmp_path / "outputs" / "pre", runs.sft, LoRA(rank=1))
    with pytest.raises(UserError, match="was trained on other weights than"):
        chain(str(scorer))
    shutil.rmtree(tmp_path / "outputs" / "pre")
    with pytest.raises(UserError, match="which no longer exists; restore that model"):
        chain(str(scorer))


def test_stacked_dora_adapters_are_refused(runs: Runs, tmp_path: Path) -> None:
    dora = DoRA(rank=2, shared_base=True)
    with pytest.raises(UserError, match=r"use LoRA for both adapters \(here adapter=lora\)"):
        roles_on(runs.pre, runs.scorer, dora)
    scorer = save_scorer(tmp_path / "scorer", runs.pre, DoRA(rank=2))
    with pytest.raises(UserError, match=r"use LoRA for both adapters \(here adapter=lora\)"):
        roles_on(runs.pre, scorer)
    base = SharedBase.find(
        spec(runs.pre), dora, FP32, {"reward.path": str(scorer)}
    )  # a single DoRA adapter works like any other
    ids = torch.arange(20).view(2, 10) + 10
    mask = torch.ones_like(ids)
    torch.testing.assert_close(
        base.scalar(str(scorer)).scores(TokenBatch.of(ids, mask)),
        ScalarModel.load(scorer).scores(TokenBatch.of(ids, mask)),
        atol=1e-5,
        rtol=1e-5,
    )
    assert base.policy().shared is base


def test_a_reward_model_trained_on_a_reward_model_resolves_to_the_language_model(runs: Runs, tmp_path: Path) -> None:
    torch.manual_seed(4)
    second = ScalarModel.load(runs.scorer, LoRA(rank=2))  # a model without a vocabulary projection
    move_adapter(second)
    second.save(tmp_path / "second" / "model")
    ids = torch.arange(20).view(2, 10) + 10
    mask = torch.ones_like(ids)
    base, _, _, critic, reward = roles_on(runs.sft, tmp_path / "second" / "model")
    assert base.path == str(runs.pre) and len(base.stacks[str(tmp_path / "second" / "model")]) == 2
    for model in (critic, reward):
        torch.testing.assert_close(
            model.scores(TokenBatch.of(ids, mask)), second.scores(TokenBatch.of(ids, mask)), atol=1e-5, rtol=1e-5
        )


# -- each role equals the model with separate weights -----------------------------------------------------------------


@pytest.mark.parametrize("scorer", ["judge", "scorer"], ids=["merged", "adapter"])
def test_roles_on_a_shared_base_equal_separate_models(scorer: str, runs: Runs, batch: Batch) -> None:
    """merged: the base is the SFT model; adapter: it is below, and the reference is a frozen copy of SFT's LoRA."""
    ids, mask, counts = batch
    path = getattr(runs, scorer)
    base, policy, reference, critic, reward = roles_on(runs.sft, path)
    assert base.path == str(runs.sft if scorer == "judge" else runs.pre)
    start = spec(runs.sft).load(NoAdapter(), FP32).logprobs(TokenBatch.of(ids, mask, counts))[0]
    scores = ScalarModel.load(path).scores(TokenBatch.of(ids, mask))
    torch.testing.assert_close(reference.logprobs(TokenBatch.of(ids, mask, counts)), start, atol=1e-5, rtol=0)
    torch.testing.assert_close(policy.logprobs(TokenBatch.of(ids, mask, counts))[0], start, atol=1e-5, rtol=0)
    for model in (reward, critic):
        torch.testing.assert_close(model.scores(TokenBatch.of(ids, mask)), scores, atol=1e-5, rtol=1e-5)
    train(policy)  # what is trained moves the policy and nobody else
    train(critic)
    assert (policy.logprobs(TokenBatch.of(ids, mask, counts))[0] - start).abs().max() > 1e-2
    torch.testing.assert_close(reference.logprobs(TokenBatch.of(ids, mask, counts)), start, atol=1e-5, rtol=0)
    torch.testing.assert_close(reward.scores(TokenBatch.of(ids, mask)), scores, atol=1e-5, rtol=1e-5)
    assert (critic.scores(TokenBatch.of(ids, mask)) - scores).abs().max() > 1e-2


def test_an_adapter_as_policy_equals_its_merged_model(runs: Runs, batch: Batch, tmp_path: Path) -> None:
    """Its reference is a frozen copy of that adapter; the same holds for one more adapter on top, quantised or not."""
    ids, mask, counts = batch
    alone = runs.sft.parent / "adapter"
    start = spec(runs.sft).load(NoAdapter(), FP32).logprobs(TokenBatch.of(ids, mask, counts))[0]
    policy = SharedBase.find(spec(alone), ONE, FP32, {"reward.path": str(runs.scorer)}).policy()
    torch.testing.assert_close(
        start_reference(policy).logprobs(TokenBatch.of(ids, mask, counts)), start, atol=1e-5, rtol=0
    )
    train(policy)
    policy.save(tmp_path / "model")
    for path in (tmp_path / "model", tmp_path / "adapter"):
        again = spec(path).load(NoAdapter(), FP32).logprobs(TokenBatch.of(ids, mask, counts))[0]
        torch.testing.assert_close(again, policy.logprobs(TokenBatch.of(ids, mask, counts))[0], atol=1e-4, rtol=0)
    quantised = SharedBase.find(spec(alone), QLoRA(rank=4, shared_base=True), FP32, {}).policy()
    torch.testing.assert_close(
        start_reference(quantised).logprobs(TokenBatch.of(ids, mask, counts)),
        quantised.logprobs(TokenBatch.of(ids, mask, counts))[0],
    )
    with pytest.raises(UserError, match="adapter.shared_base=true"):
        spec(alone).load(QLoRA(rank=4), FP32)


def test_a_separate_reference_shares_the_base(runs: Runs, batch: Batch) -> None:
    ids, mask, counts = batch
    policy = SharedBase.find(spec(runs.sft), ONE, FP32, {"stage.reference": str(runs.pre)}).policy()
    reference = load_reference(policy, str(runs.pre))
    expected = spec(runs.pre).load(NoAdapter(), FP32).logprobs(TokenBatch.of(ids, mask, counts))[0]
    torch.testing.assert_close(reference.logprobs(TokenBatch.of(ids, mask, counts)), expected, atol=1e-6, rtol=0)
    assert measure_footprint({"policy": policy, "reference": reference}).roles["reference"][1] == 0


def weights_of(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, value) for name, value in module.named_parameters() if "lora_" not in name and "head" not in name)


@pytest.mark.parametrize("adapter", [ONE, QLoRA(rank=4, shared_base=True)], ids=["lora", "qlora"])
def test_the_base_weights_are_stored_once(adapter: LoRA, runs: Runs) -> None:
    base, policy, reference, critic, reward = roles_on(runs.sft, runs.scorer, adapter)
    assert base.model is not None
    places = {value.data_ptr() for value in base.model.parameters()}
    for role in (policy, critic, reward, reference.modules[0]):
        assert {value.data_ptr() for _, value in weights_of(role)} <= places
    trained = [name for role in (policy, critic) for name, value in role.named_parameters() if value.requires_grad]
    assert all(".default." in name or name == "head.weight" for name in trained) and len(trained) > 20
    assert not any(value.requires_grad for role in (reward, reference.modules[0]) for value in role.parameters())
    held = measure_footprint({"policy": policy, "reference": reference, "value": critic, "reward": reward})
    once = sum(role.numel() * role.element_size() for role in base.model.parameters())
    assert once <= held.held < 0.45 * held.copies


def test_layer_names_are_resolved_as_on_a_separate_base(runs: Runs) -> None:
    """An earlier adapter below the policy's hides the layers' types."""
    others = {"scorer": str(runs.scorer)}
    shared = SharedBase.find(spec(runs.sft), LoRA(rank=2, modules=["q_proj"], shared_base=True), FP32, others)
    policy = shared.policy()
    trained = [name for name, value in policy.named_parameters() if value.requires_grad]
    assert len(trained) == 4 and all(".q_proj." in name for name in trained)  # A and B in each of two layers
    wrong = SharedBase.find(spec(runs.sft), LoRA(modules=["q_prj"], shared_base=True), FP32, others)
    every = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    with pytest.raises(UserError, match=rf"adapter.modules=q_prj.* with names of its linear layers: {every}$"):
        wrong.policy()


@pytest.mark.parametrize("adapter", [QLoRA(rank=4, shared_base=True), QLoRA(rank=4, quantize="int8", shared_base=True)])
def test_a_quantised_base_survives_evaluation(adapter: QLoRA, runs: Runs, batch: Batch) -> None:
    """The repacking of NF4 weights at the first forward pass without gradient would break every role at once."""
    ids, mask, counts = batch
    base, policy, reference, critic, reward = roles_on(runs.sft, runs.scorer, adapter)
    assert base.model is not None
    before = {name: value.detach().clone() for name, value in base.model.named_parameters()}
    with torch.no_grad():
        first = policy.eval().logprobs(TokenBatch.of(ids, mask, counts))[0]
        reward.scores(TokenBatch.of(ids, mask))
        critic.eval().scores(TokenBatch.of(ids, mask))
    again = reference.logprobs(TokenBatch.of(ids, mask, counts))
    torch.testing.assert_close(first, again, atol=1e-6, rtol=0)
    assert all(torch.equal(before[name], value) for name, value in base.model.named_parameters())
    policy.train(), critic.train()
    (
        policy.logprobs(TokenBatch.of(ids, mask, counts))[0].sum() + critic.scores(TokenBatch.of(ids, mask)).sum()
    ).backward()
    check_gradients(policy)
    check_gradients(critic)


def test_a_quantised_role_is_saved_on_the_plain_base(runs: Runs, batch: Batch, tmp_path: Path) -> None:
    """Merging into NF4 would round the adapters away: all of them are merged into the original base."""
    ids, mask, _ = batch
    saved = {}
    for adapter in (QLoRA(rank=4, shared_base=True), ONE):
        torch.manual_seed(5)
        _, policy, _, critic, _ = roles_on(runs.sft, runs.scorer, adapter)
        train(policy)
        train(critic)
        to = tmp_path / type(adapter).__name__
        policy.save(to / "model")
        critic.save(to / "critic")
        saved[type(adapter)] = (
            spec(to / "model").load(NoAdapter(), FP32).hidden(TokenBatch.of(ids, mask)),
            ScalarModel.load(to / "critic").scores(TokenBatch.of(ids, mask)),
        )
        assert [node.path for node in chain(str(to / "model"))][1:] == [str(runs.sft), str(runs.pre)]
        assert [node.path for node in chain(str(to / "critic"))][1:] == [str(runs.scorer), str(runs.pre)]
    for quantised, plain in zip(saved[QLoRA], saved[LoRA], strict=True):
        torch.testing.assert_close(quantised, plain, atol=1e-4, rtol=1e-4)


# -- gradients --------------------------------------------------------------------------------------------------------


def gradients(runs: Runs, batch: Batch, adapter: LoRA, interleaved: bool, **changes: object) -> dict[str, Tensor]:
    """Return gradients of policy and critic; interleaved: every forward before any backward, other roles in between."""
    ids, mask, counts = batch
    torch.manual_seed(7)
    _, policy, reference, critic, reward = roles_on(runs.sft, runs.scorer, adapter, **changes)
    train(policy)
    train(critic)
    calls: list[Callable[[], Tensor]] = [
        lambda: policy.logprobs(TokenBatch.of(ids, mask, counts))[0].sum(),
        lambda: critic.values(TokenBatch.of(ids, mask)).square().sum(),
    ]
    if interleaved:
        losses = []
        for seed, call in enumerate(calls):
            torch.manual_seed(seed)
            losses.append(call())
            reference.logprobs(TokenBatch.of(ids, mask, counts))
            reward.scores(TokenBatch.of(ids, mask))
        torch.stack(losses).sum().backward()
    else:
        for seed, call in enumerate(calls):
            torch.manual_seed(seed)
            call().backward()
    models = {"policy": policy, "critic": critic}
    return {
        f"{role}.{name}": value.grad
        for role, model in models.items()
        for name, value in model.named_parameters()
        if value.grad is not None
    }


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputation_uses_the_adapter_of_the_forward_pass(dropout: float, runs: Runs, batch: Batch) -> None:
    """The classic bug: a layer recomputed in the backward pass while another adapter is active."""
    adapter = LoRA(rank=4, dropout=dropout, shared_base=True)
    plain = gradients(runs, batch, adapter, interleaved=False)
    checkpointed = gradients(runs, batch, adapter, interleaved=True, gradient_checkpointing=True)
    assert plain.keys() == checkpointed.keys() and any("critic" in name for name in plain)
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, atol=1e-6, rtol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_gradient_checkpointing_is_on_in_trained_roles(runs: Runs) -> None:
    _, policy, _, critic, _ = roles_on(runs.sft, runs.scorer, gradient_checkpointing=True)
    for base in (policy.base, critic.language_model.base):
        assert any(getattr(part, "gradient_checkpointing", False) for part in base.modules())


# -- parts ------------------------------------------------------------------------------------------------------------


def test_sharing_copies_trained_parameters_only(model: LanguageModel) -> None:
    layer = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1, bias=False))
    layer[0].requires_grad_(False)
    other = copy_tree(layer)
    assert other[0] is not layer[0] and other[0].weight is layer[0].weight and other[0].bias is layer[0].bias
    assert other[1].weight is not layer[1].weight and torch.equal(other[1].weight, layer[1].weight)
    held = measure_footprint({"one": layer, "two": other})
    assert held.roles == {"one": (4 * 15, 4 * 3), "two": (4 * 15, 4 * 3)}  # 9 + 3 shared, 3 of its own, 4 bytes each
    assert (held.held, held.copies) == (4 * 18, 4 * 30)
    assert "two copies" in str(held)


def test_an_adapter_on_random_weights_has_no_base(tmp_path: Path) -> None:
    """An adapter on random weights has no base to record, and the chain of its model ends there."""
    model = random_model()
    model.model = LoRA(rank=2).apply(model.model)
    model.save(tmp_path / "model")
    assert not (tmp_path / "adapter" / "base.json").exists() and len(chain(str(tmp_path / "model"))) == 1
