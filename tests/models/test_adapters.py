"""Adapters: equal to the base at first, saved merged, trainable after evaluation."""

import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlhf.data.collate import TokenBatch
from rlhf.errors import UserError
from rlhf.models.adapters import DoRA, LoRA, NoAdapter, QLoRA
from rlhf.models.module_state import check_gradients
from rlhf.models.reference import start_reference
from rlhf.models.scalar import ScalarModel
from rlhf.models.shared_base import SharedBase
from tests.models.conftest import FP32, move_adapter, random_model, spec

Batch = tuple[Tensor, Tensor, Tensor]
QUANTISED = [QLoRA(rank=4), QLoRA(rank=4, double_quant=False), QLoRA(rank=4, quantize="int8")]
ALL = [LoRA(rank=4), DoRA(rank=4), *QUANTISED]
name = lambda a: f"{type(a).__name__}-{getattr(a, 'quantize', '')}"  # noqa: E731


@pytest.mark.parametrize("adapter", [LoRA(rank=4), DoRA(rank=4)], ids=name)
def test_a_fresh_adapter_equals_the_base(adapter: LoRA, folder: Path, batch: Batch) -> None:
    ids, mask, counts = batch
    base = spec(folder).load(NoAdapter(), FP32).logprobs(TokenBatch.of(ids, mask, counts))[0]
    adapted = spec(folder).load(adapter, FP32).logprobs(TokenBatch.of(ids, mask, counts))[0]
    torch.testing.assert_close(adapted, base, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("adapter", [LoRA(rank=4), DoRA(rank=4)], ids=name)
def test_merged_equals_unmerged(adapter: LoRA, folder: Path, batch: Batch, tmp_path: Path) -> None:
    ids, mask, _ = batch
    model = spec(folder).load(adapter, FP32)
    move_adapter(model)
    live = {key: value.clone() for key, value in model.state_dict().items()}
    model.save(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    logits = model.head(model.hidden(TokenBatch.of(ids[:1], mask[:1])))
    torch.testing.assert_close(plain(input_ids=ids[:1]).logits, logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(live[key], value) for key, value in model.state_dict().items()), "saving changed the weights"
    # the adapter alone, on its base, is the same model again
    again = spec(tmp_path / "adapter").load(NoAdapter(), FP32)
    torch.testing.assert_close(again.head(again.hidden(TokenBatch.of(ids[:1], mask[:1]))), logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", QUANTISED, ids=name)
def test_quantised_base_is_saved_unquantised(adapter: QLoRA, folder: Path, batch: Batch, tmp_path: Path) -> None:
    model = spec(folder).load(adapter, FP32)
    move_adapter(model)
    model.save(tmp_path / "model")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert not hasattr(plain.config, "quantization_config")
    lora = spec(folder).load(LoRA(rank=4), FP32)  # the same adapter on the unquantised base
    lora.load_state_dict({k: v for k, v in model.state_dict().items() if ".lora_" in k}, strict=False)
    ids, mask, _ = batch
    expected = lora.head(lora.hidden(TokenBatch.of(ids[:1], mask[:1])))
    torch.testing.assert_close(plain(input_ids=ids[:1]).logits, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapter", ALL, ids=name)
def test_an_adapter_trains_after_evaluation_and_the_reference_is_unchanged(
    adapter: LoRA, folder: Path, batch: Batch
) -> None:
    ids, mask, counts = batch
    model = spec(folder).load(adapter, FP32)
    reference = start_reference(model)
    assert reference.shared
    model.eval()
    with torch.no_grad():
        evaluated, _ = model.logprobs(TokenBatch.of(ids, mask, counts))
    model.train()
    before = reference.logprobs(TokenBatch.of(ids, mask, counts))
    logp, _ = model.logprobs(TokenBatch.of(ids, mask, counts))
    # at the start policy, samples' scores and reference are one
    torch.testing.assert_close(evaluated, logp, atol=1e-6, rtol=0)
    torch.testing.assert_close(before, logp, atol=1e-5, rtol=0)
    logp.sum().backward()
    check_gradients(model)
    torch.optim.AdamW(model.trainable_parameters(), lr=0.05).step()
    assert torch.equal(reference.logprobs(TokenBatch.of(ids, mask, counts)), before)
    assert (model.logprobs(TokenBatch.of(ids, mask, counts))[0] - before).abs().max() > 1e-3
    assert len(model.trainable_parameters()) < len(list(model.parameters()))


@pytest.mark.parametrize("adapter", ALL, ids=name)
def test_scalar_models_take_adapters(adapter: LoRA, folder: Path, batch: Batch, tmp_path: Path) -> None:
    ids, mask, _ = batch
    model = ScalarModel.load(folder, adapter)
    move_adapter(model)
    model.scores(TokenBatch.of(ids, mask)).sum().backward()
    check_gradients(model)
    model.save(tmp_path / "model")
    again = ScalarModel.load(tmp_path)
    assert torch.equal(again.head.weight, model.head.weight)
    if not isinstance(adapter, QLoRA):  # a quantised one is saved without the quantisation error, so it differs
        torch.testing.assert_close(
            again.scores(TokenBatch.of(ids, mask)), model.scores(TokenBatch.of(ids, mask)), atol=1e-4, rtol=1e-4
        )


def test_names_of_adapted_layers_are_validated() -> None:
    base = random_model().base
    adapted = LoRA(rank=2, modules=["q_proj", "v_proj"]).apply(base)
    assert {key.split(".lora_")[0].rsplit(".", 1)[-1] for key in adapted.state_dict() if ".lora_" in key} == {
        "q_proj",
        "v_proj",
    }
    every = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"  # no lm_head: it shares the embedding here
    with pytest.raises(UserError, match=rf"adapter.modules=q_prj.*did you mean q_proj.*linear layers: {every}$"):
        LoRA(modules=["q_prj"]).apply(random_model().base)
    with pytest.raises(UserError, match=rf"adapter.modules=c_attn.*linear layers: {every}$"):
        LoRA(modules="c_attn").apply(random_model().base)
    with pytest.raises(UserError, match=r"modules=q_prj.* k_proj, lm_head, o_proj"):
        LoRA(modules=["q_prj"]).apply(random_model(tie_word_embeddings=False).base)


@pytest.mark.parametrize("adapter", [LoRA, DoRA, QLoRA])
def test_an_output_projection_tied_to_the_embedding_is_refused(adapter: type[LoRA]) -> None:
    """When merged, its update would have to change the embedding too, and was lost."""
    with pytest.raises(
        UserError, match=r"adapter.modules=lm_head: .*input embedding.* with names of its linear layers: down_proj"
    ):
        adapter(rank=4, modules=["q_proj", "lm_head"]).check_modules(random_model().base)
    with pytest.raises(UserError, match=r"adapter.modules=lm_head: .*input embedding"):
        adapter(rank=4, modules="lm_head").check_modules(random_model().base)


@pytest.mark.parametrize("adapter", [LoRA(rank=4, modules=["lm_head"]), DoRA(rank=4, modules=["lm_head"])], ids=name)
def test_an_untied_output_projection_is_merged(adapter: LoRA, batch: Batch, tmp_path: Path) -> None:
    random_model(tie_word_embeddings=False).save(tmp_path / "base" / "model")
    model = spec(tmp_path / "base").load(adapter, FP32)
    ids, mask, _ = batch
    before = model.head(model.hidden(TokenBatch.of(ids[:1], mask[:1])))
    move_adapter(model)
    model.save(tmp_path / "model")
    logits = model.head(model.hidden(TokenBatch.of(ids[:1], mask[:1])))
    assert (logits - before).abs().max() > 1e-2
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(plain(input_ids=ids[:1]).logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "layers",
    [
        {"target_modules": ["lm_head"]},
        {"target_modules": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ],
    ids=str,
)
def test_a_stored_adapter_on_tied_embeddings_is_refused(layers: dict, folder: Path, tmp_path: Path) -> None:
    """An adapter that only PEFT trained: merging it would change both embeddings, or saving would lose it."""
    made = get_peft_model(AutoModelForCausalLM.from_pretrained(folder), LoraConfig(task_type="CAUSAL_LM", **layers))
    made.save_pretrained(tmp_path / "adapter")
    spec(folder).load_tokenizer().save_pretrained(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"adapter: its adapter changes the embedding or lm_head.* cannot be merged"):
        spec(tmp_path / "adapter").load(NoAdapter(), FP32)
    if layers == {"target_modules": ["lm_head"]}:
        shared = SharedBase.find(spec(tmp_path / "adapter"), LoRA(rank=4, shared_base=True), FP32, {})
        with pytest.raises(UserError, match="its adapter changes lm_head"):
            shared.policy()


@pytest.mark.parametrize(
    "hyperparameter",
    [{"rank": 3}, {"alpha": 9.0}, {"dropout": 0.2}, {"modules": ["k_proj"]}, {"modules": "all-linear"}],
    ids=str,
)
def test_every_hyperparameter_of_lora_changes_the_output(hyperparameter: dict, folder: Path, batch: Batch) -> None:
    """A forward pass in training mode with an adapter moved by the same noise."""
    ids, mask, counts = batch

    def outcome(**hyperparameters: object) -> Tensor:
        torch.manual_seed(0)
        model = spec(folder).load(LoRA(**{"rank": 4, "alpha": 8.0, "modules": ["q_proj"], **hyperparameters}), FP32)  # type: ignore[arg-type]
        move_adapter(model)
        torch.manual_seed(3)
        return model.logprobs(TokenBatch.of(ids, mask, counts))[0]

    assert torch.equal(outcome(), outcome())
    assert (outcome(**hyperparameter) - outcome()).abs().max() > 1e-5


@pytest.mark.parametrize("hyperparameter", [{"quantize": "int8"}, {"double_quant": False}], ids=str)
def test_every_hyperparameter_of_qlora_changes_the_output(hyperparameter: dict, folder: Path, batch: Batch) -> None:
    ids, mask, counts = batch
    one, other = (spec(folder).load(QLoRA(rank=4, **hyperparameters), FP32) for hyperparameters in ({}, hyperparameter))
    assert not torch.equal(
        one.logprobs(TokenBatch.of(ids, mask, counts))[0], other.logprobs(TokenBatch.of(ids, mask, counts))[0]
    )


def test_all_linear_does_not_adapt_the_vocabulary_projection(folder: Path) -> None:
    adapted = spec(folder).load(LoRA(rank=2), FP32)
    assert not any("lm_head" in key for key, value in adapted.named_parameters() if value.requires_grad)


def test_unsupported_quantisation_is_refused(folder: Path) -> None:
    with pytest.raises(
        UserError, match="^adapter=qlora: needs trained weights; type inputs.policy=RUN or adapter=lora$"
    ):
        spec().load(QLoRA(), FP32, lambda: ["a b c"])
    with pytest.raises(
        UserError, match="^adapter.double_quant=true: .*; type adapter.double_quant=false or adapter.quantize=nf4$"
    ):
        QLoRA(quantize="int8", double_quant=True)


def test_qlora_is_refused_where_bitsandbytes_does_not_run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import bitsandbytes

    before = torch.random.get_rng_state()
    QLoRA().check_installed()
    QLoRA(quantize="int8").check_installed()
    assert torch.equal(torch.random.get_rng_state(), before)

    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("no kernel for this machine\nand many more lines")

    monkeypatch.setattr(bitsandbytes.nn.Linear4bit, "forward", no_kernel)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(UserError, match=r"no kernel for this machine\); type adapter=lora") as caught:
        spec(folder).load(QLoRA(), FP32)
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    with pytest.raises(UserError, match="adapter=qlora: bitsandbytes does not run on this machine"):
        spec(folder).load(QLoRA(), FP32)
