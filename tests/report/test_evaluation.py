"""Policies before and after on held-out prompts: exact zeros for the same policy, KL against its closed form."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.collate import TokenBatch, collate
from rlhf.data.data import Data
from rlhf.data.records import Message, Prompt, Text
from rlhf.errors import UserError
from rlhf.evaluation import compare as evaluation
from rlhf.evaluation.compare import Evaluation, compare, load_policy
from rlhf.evaluation.perplexity import text_likelihood
from rlhf.functional.statistics import estimate, paired
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.sampler.ancestral import AncestralSampler

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
    """Return directories of a random policy and of the same one with slightly moved weights."""
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


def test_a_policy_compared_with_itself_has_no_difference(policies):
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


def test_kl_of_one_token_equals_that_of_the_distributions(policies):
    before, after = policies
    asked = prompts(600)
    result = compare(before, after, asked, count=600, max_new_tokens=1)
    assert result.kl is not None and result.kl.count == 600

    from rlhf.data.collate import collate_prompts
    from rlhf.data.encoding import encode_prompt

    logs = []
    for folder in (before, after):
        policy = load_policy(folder)
        batch = collate_prompts([encode_prompt(policy.tokenizer, p.messages) for p in asked], policy.pad_id)
        with torch.no_grad():
            hidden = policy.hidden(TokenBatch.of(batch.ids, batch.attention_mask, position_ids=batch.position_ids))
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
    monkeypatch.setattr("rlhf.evaluation.compare._compare", lambda *_: pytest.fail("computed again"))
    assert compare(before, after, prompts(6), max_new_tokens=4, folder=tmp_path) == first
    monkeypatch.setattr("rlhf.evaluation.compare._compare", lambda *_: first)
    for damaged in (b'{"before": {', b"[1]", b"\xff\xfe", b"", b'{"before": {}}'):  # a kill, or another version
        files[0].write_bytes(damaged)
        assert compare(before, after, prompts(6), max_new_tokens=4, folder=tmp_path) == first
        assert json.loads(files[0].read_text()) == first.to_json()
    compare(before, after, prompts(6), max_new_tokens=4, seed=1, folder=tmp_path)
    assert len(list(tmp_path.glob("evaluation-*.json"))) == 2
    assert Evaluation.from_json(first.to_json()) == first
    assert [row[0] for row in first.table()] == [
        "response length (tokens)", "share of responses that end", "KL(after || before) per response (nats)",
    ]  # fmt: skip
    assert set(first.metrics()) >= {"before_length", "after_length", "length_difference", "length_z", "after_kl"}


def test_held_out_prompts_of_the_testbed_are_scored_with_gold(policies):
    before, after = policies
    data = Data(record="prompt", source="testbed", size=20, validation=12, max_length=64)
    result = compare(before, after, data, max_new_tokens=4)
    assert result.prompts >= 12 and result.after["gold"].count == result.prompts


def test_a_reward_model_scores_the_responses(policies, tmp_path):
    from rlhf.models.scalar import ScalarModel

    before, after = policies
    torch.manual_seed(1)
    ScalarModel.load(str(before)).save(tmp_path / "reward" / "model")
    result = compare(before, after, prompts(6), tmp_path / "reward" / "model", max_new_tokens=4)
    assert result.after["reward"].count == 6
    assert set(result.samples[0].after_scores) == {"reward", "length", "ended"}


def test_an_empty_set_of_prompts_is_refused(policies):
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


def test_the_loss_on_text_equals_that_of_transformers(policies):
    before, after = policies
    asked = Data(record="prompt", source="testbed", size=8, validation=8, max_length=64)
    text = Data(record="text", source="testbed", size=30, validation=6, max_length=64)
    result = compare(before, after, asked, text=text, max_new_tokens=4)
    documents = [record.text for record in text.load().validation]
    means = []  # over all tokens: a long document has more weight than a short one
    for folder, estimated in ((before, result.before["text_loss"]), (after, result.after["text_loss"])):
        model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
        losses, counts = [], []
        for document in documents:
            ids = tokenizer(document + "<|endoftext|>", add_special_tokens=False, return_tensors="pt").input_ids
            losses.append(float(model(ids, labels=ids).loss))
            counts.append(ids.shape[1] - 1)
        assert estimated.count == len(documents) > 1 and len(set(counts)) > 1
        means.append(sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts))
        assert estimated.mean == pytest.approx(means[-1], abs=1e-5)
    assert result.differences["text_loss"].mean == pytest.approx(means[1] - means[0], abs=1e-5)


class Documents:
    """Data set of documents."""

    source = "memory"

    def __init__(self, *texts: str) -> None:
        self.validation = [Text(text) for text in texts]

    def load(self) -> "Documents":
        return self


def test_a_long_text_is_read_in_windows_within_the_context(policies, monkeypatch):
    """Comparison, eval and validation have one definition of a document's loss, computed here window by window."""
    before, after = policies
    long, short = "Two plus two is four, of course. " * 30, "What is 3 plus 3? It is 6."
    model, tokenizer = AutoModelForCausalLM.from_pretrained(after), AutoTokenizer.from_pretrained(after)
    context, nats, count = 128, 0.0, 0
    for text in (long, short):
        ids = tokenizer(text + "<|endoftext|>", add_special_tokens=False).input_ids
        for start in range(0, len(ids) - 1, context - 1):
            window = torch.tensor([ids[start : start + context]])
            with torch.no_grad():
                nats += float(model(window, labels=window).loss) * (window.shape[1] - 1)
            count += window.shape[1] - 1
    assert len(tokenizer(long).input_ids) > 2 * context

    widths = []
    plain = LanguageModel.logprobs

    def logprobs(self, tokens, *rest, **named):
        widths.append(tokens.ids.shape[1])
        return plain(self, tokens, *rest, **named)

    monkeypatch.setattr(LanguageModel, "logprobs", logprobs)
    result = compare(before, after, prompts(4), text=Documents(long, short), max_new_tokens=4)
    assert result.after["text_loss"].mean == pytest.approx(nats / count, abs=1e-5)
    assert max(widths) <= context

    policy = load_policy(after)
    found = text_likelihood(policy, [Text(long), Text(short)])
    assert found.tokens[0] + found.tokens[1] == count
    assert estimate(found.perplexity()).mean == pytest.approx(math.exp(nats / count), rel=1e-4)

    data = Data(record="text", source="testbed", size=8, validation=0, max_length=context)
    rows, _ = data.encode(policy.tokenizer, [Text(long), Text(short)])
    batch = collate(rows, policy.pad_id)
    logp, _ = policy.logprobs(TokenBatch.of(batch.ids, batch.attention_mask, batch.loss_mask, batch.position_ids))
    assert float(-logp.sum() / batch.loss_mask.sum()) == pytest.approx(nats / count, abs=1e-5)


def test_paraphrased_prompts_are_one_cluster(policies):
    """Each prompt three times, and a paraphrase by name: errors over 5 questions, computed from the responses."""
    before, _ = policies
    named = [Prompt((Message("user", f"{word} is 9 plus 9?"),), cluster="nine") for word in ("What", "How much")]
    asked = [*prompts(4) * 3, *named]
    result = compare(before, before, asked, max_new_tokens=8)
    lengths = AncestralSampler(8, batch_size=128).sample(load_policy(before), asked, 0).lengths.tolist()
    mean = sum(lengths) / 14
    totals = [sum(lengths[i:12:4]) - 3 * mean for i in range(4)] + [sum(lengths[12:]) - 2 * mean]
    assert result.clusters == 5 and result.after["length"].count == 14
    assert result.after["length"].se == pytest.approx(math.sqrt(5 / 4 * sum(x * x for x in totals)) / 14)
    assert result.kl is not None and result.kl.clusters == result.differences["length"].clusters == 5


def test_text_without_held_out_documents_is_refused(policies):
    text = Data(record="text", source="testbed", size=30, validation=0, max_length=64)
    with pytest.raises(UserError, match=r"compare\.text\.validation"):
        compare(*policies, prompts(4), text=text, max_new_tokens=4)


def test_the_first_policy_is_measured_with_the_best_of_n(policies, monkeypatch):
    """Against responses sampled and scored apart; the second policy's difference is to the best one of them."""
    score = lambda rollout: rollout.response_ids[:, 0].float()  # noqa: E731  # gold is equal for random responses
    monkeypatch.setattr(evaluation, "GoldReward", lambda: score)
    data = Data(record="prompt", source="testbed", size=20, validation=6, max_length=64)
    result = compare(*policies, data, max_new_tokens=8, best_of=4)
    asked = data.load().validation
    sampler = AncestralSampler(8, samples=4, batch_size=128)
    gold = score(sampler.sample(load_policy(policies[0]), asked, 0)).view(-1, 4)
    two, four = result.best_of_n
    assert (two.n, four.n) == (2, 4)
    assert four.metrics["gold"].mean == pytest.approx(gold.amax(dim=1).mean().item())
    assert four.differences["gold"].mean == pytest.approx(result.after["gold"].mean - four.metrics["gold"].mean)
    assert 0 < two.kl.mean <= two.kl_bound and "gold reward, best of 4" in {row[0] for row in result.table()}
    assert result.metrics()["best_of_4_gold"] == four.metrics["gold"].mean
    assert Evaluation.from_json(json.loads(json.dumps(result.to_json()))) == result
    with pytest.raises(UserError, match=r"compare\.best_of=4: needs a score"):
        compare(*policies, asked, max_new_tokens=8, best_of=4)
