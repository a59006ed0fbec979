"""Before against after on held-out prompts: exact zeros for the same policy, the KL against its closed form."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.data import Data
from rlhf.data.records import Message, Prompt
from rlhf.errors import UserError
from rlhf.evaluation import Evaluation, compare, estimate, load_policy, paired
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.precision import Precision

SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "tie_word_embeddings": True,
}


def prompts(count):
    return [
        Prompt(messages=(Message("user", f"What is {i} plus {i}?"),), tags=("unsafe",) if i % 4 == 0 else ())
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def policies(tmp_path_factory):
    """Folders of a random policy and of the same one with its weights moved a little."""
    folder = tmp_path_factory.mktemp("policies")
    torch.manual_seed(0)
    texts = [f"What is {i} plus {i}? It is {2 * i}. Thank you." for i in range(50)]
    policy = CausalLM(path=None, architecture=SHAPE, vocab_size=300).load(
        NoAdapter(), Precision("32-true"), corpus=lambda: texts
    )
    policy.save(folder / "before" / "model")
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    policy.save(folder / "after" / "model")
    return folder / "before" / "model", folder / "after" / "model"


def test_a_policy_against_itself_differs_in_nothing(policies):
    before, _ = policies
    data = Data(record="prompt", source="testbed", size=20, validation=40, max_length=64)
    result = compare(before, before, data, max_new_tokens=8)
    assert result.kl is not None and result.kl.mean == 0 and result.kl.se == 0
    assert set(result.after) == {"gold", "gold_safe", "gold_unsafe", "length", "ended"}
    for difference in result.differences.values():
        assert (difference.mean, difference.z, difference.wins) == (0, 0, 0.5)
    assert result.before == result.after
    assert len(result.samples) == 3 and any("unsafe" in sample.tags for sample in result.samples)
    assert all(sample.before == sample.after for sample in result.samples)


def test_kl_of_one_token_is_that_of_the_distributions(policies):
    before, after = policies
    asked = prompts(600)
    result = compare(before, after, asked, count=600, max_new_tokens=1)
    assert result.kl is not None and result.kl.count == 600

    from rlhf.data.collate import collate_prompts
    from rlhf.data.template import encode_prompt

    logs = []
    for folder in (before, after):
        policy = load_policy(folder)
        batch = collate_prompts([encode_prompt(policy.tokenizer, p.messages) for p in asked], policy.pad_id)
        with torch.no_grad():
            hidden = policy.hidden(batch.ids, batch.attention_mask, batch.position_ids)
            logs.append(policy.head(hidden[:, -1]).log_softmax(-1))
    exact = (logs[1].exp() * (logs[1] - logs[0])).sum(-1).mean().item()
    assert exact > 0.001
    assert abs(result.kl.mean - exact) < 4 * result.kl.se
    assert result.kl.se < exact  # the test can fail


def test_the_result_is_kept_and_read_again(policies, tmp_path, monkeypatch):
    before, after = policies
    first = compare(before, after, prompts(6), max_new_tokens=4, folder=tmp_path)
    files = list(tmp_path.glob("evaluation-*.json"))
    assert len(files) == 1
    monkeypatch.setattr("rlhf.evaluation._compare", lambda *_: pytest.fail("computed again"))
    assert compare(before, after, prompts(6), max_new_tokens=4, folder=tmp_path) == first
    monkeypatch.setattr("rlhf.evaluation._compare", lambda *_: first)
    compare(before, after, prompts(6), max_new_tokens=4, seed=1, folder=tmp_path)
    assert len(list(tmp_path.glob("evaluation-*.json"))) == 2
    assert Evaluation.from_json(first.to_json()) == first
    assert [row[0] for row in first.table()] == [
        "reply length (tokens)", "replies that end", "KL(after || before) per reply (nats)",
    ]  # fmt: skip
    assert set(first.metrics()) >= {"before_length", "after_length", "length_difference", "length_z", "after_kl"}


def test_held_out_prompts_of_the_testbed_are_scored_with_gold(policies):
    before, after = policies
    data = Data(record="prompt", source="testbed", size=20, validation=12, max_length=64)
    result = compare(before, after, data, max_new_tokens=4)
    assert result.prompts >= 12 and result.after["gold"].count == result.prompts


def test_a_reward_model_scores_the_replies_too(policies, tmp_path):
    from rlhf.models.scalar import ScalarModel

    before, after = policies
    torch.manual_seed(1)
    ScalarModel.load(str(before)).save(tmp_path / "reward" / "model")
    result = compare(before, after, prompts(6), tmp_path / "reward" / "model", max_new_tokens=4)
    assert result.after["reward"].count == 6
    assert set(result.samples[0].after_scores) == {"reward", "length", "ended"}


def test_no_prompts_says_what_to_type(policies):
    with pytest.raises(UserError, match="data.validation"):
        compare(*policies, [])


def test_estimates_by_hand():
    one = estimate([1.0, 2.0, 3.0, 4.0])
    assert one.mean == 2.5 and one.se == pytest.approx(math.sqrt(5 / 3 / 4))
    assert math.isnan(estimate([1.0]).se)
    gap = paired([0.0, 0.0, 0.0, 1.0], [1.0, 2.0, 0.0, 0.0])  # gaps 1, 2, 0, -1
    assert gap.mean == 0.5 and gap.se == pytest.approx(math.sqrt(5 / 3 / 4)) and gap.wins == 0.625
    assert gap.z == pytest.approx(gap.mean / gap.se)
    assert paired([0.0, 0.0], [1.0, 1.0]).z == math.inf


def test_the_loss_on_text_is_that_of_transformers(policies):
    before, after = policies
    asked = Data(record="prompt", source="testbed", size=8, validation=8, max_length=64)
    text = Data(record="text", source="testbed", size=30, validation=6, max_length=64)
    result = compare(before, after, asked, text=text, max_new_tokens=4)
    documents = [record.text for record in text.load().validation]
    means = []
    for folder, estimated in ((before, result.before["text_loss"]), (after, result.after["text_loss"])):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        losses = []
        for document in documents:
            ids = tokenizer(document + "<|endoftext|>", add_special_tokens=False, return_tensors="pt").input_ids
            losses.append(float(model(ids, labels=ids).loss))
        assert estimated.count == len(documents) > 1
        means.append(sum(losses) / len(losses))
        assert estimated.mean == pytest.approx(means[-1], abs=1e-5)
    assert result.differences["text_loss"].mean == pytest.approx(means[1] - means[0], abs=1e-5)


def test_text_without_held_out_documents_is_named(policies):
    text = Data(record="text", source="testbed", size=30, validation=0, max_length=64)
    with pytest.raises(UserError, match=r"compare\.text\.validation"):
        compare(*policies, prompts(4), text=text, max_new_tokens=4)
