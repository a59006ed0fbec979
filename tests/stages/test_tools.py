"""Rollouts with tools: a tool's tokens are context for the policy, and are neither trained nor counted."""

import json
from dataclasses import replace

import pytest
import torch

import rlhf.sampler.tool_calls
from rlhf.data.collate import TokenBatch
from rlhf.data.encoding import encode_dialogue, encode_prompt, encode_tool_turn
from rlhf.data.records import Message
from rlhf.data.tool_calls import Call
from rlhf.errors import UserError
from rlhf.functional.advantages import gae
from rlhf.models.causal_lm import CausalLM
from rlhf.models.reference import start_reference
from rlhf.models.scalar import ScalarModel
from rlhf.reward.gold import GoldReward
from rlhf.reward.model import ModelReward
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.base import single
from rlhf.sampler.tool_calls import Calculator, Search, ToolSampler
from rlhf.storage.metrics_file import read_rows
from rlhf_grpo.objective import GRPO
from rlhf_ppo.objective import PPO
from rlhf_ppo.stage import PPOStage

from .conftest import adamw, constant, data, fit, same, weights
from .test_exactness import Stop
from .test_groups import grpo

TOOLS = {"calculator": Calculator(), "search": Search()}


@pytest.fixture
def prompts():
    return data("prompt", 12, 4).train


@pytest.fixture
def policy(load):
    """Return a policy that ends its turns soon."""
    return ending(load())


def ending(policy):
    bias = torch.zeros(policy.config.vocab_size)
    bias[policy.end_id] = 4.0
    policy.base.get_output_embeddings().bias = torch.nn.Parameter(bias, requires_grad=False)
    return policy


@pytest.fixture
def calling(monkeypatch):
    """Parse a call in every other turn, whatever an untrained policy wrote."""
    monkeypatch.setattr(
        rlhf.sampler.tool_calls, "read_call", lambda turn: Call("calculator", "30+4") if len(turn) % 2 else None
    )


def sampler(samples=4, **hyperparameters):
    return ToolSampler(TOOLS, **{"max_new_tokens": 8, "samples": samples, "max_calls": 2, **hyperparameters})


def test_log_probabilities_equal_those_of_a_forward_pass(policy, prompts, calling):
    for temperature in (1.0, 0.8):
        rollout = sampler(temperature=temperature).sample(policy, prompts, seed=0)
        calls = torch.tensor([sum(turn.role == "tool" for turn in turns) for turns in rollout.turns])
        assert len(set(calls.tolist())) == 3  # responses without, with one and with two calls in one batch
        logp = policy.logprobs(rollout.tokens, temperature)[0][:, -rollout.mask.shape[1] :]
        torch.testing.assert_close(logp, rollout.logp, atol=1e-5, rtol=1e-5)
        assert (rollout.logp[~rollout.mask] == 0).all() and (rollout.logp[rollout.mask] < 0).all()


def test_a_batch_with_and_without_calls_is_padded_correctly(policy, prompts, calling):
    """Each row: the policy's turns, between them exactly the template's text of the tool turn, then padding."""
    rollout = sampler().sample(policy, prompts, seed=0)
    inserted = encode_tool_turn(policy.tokenizer, "34")
    for row, turns in enumerate(rollout.turns):
        length = int(rollout.response_attention_mask[row].sum())
        assert (
            rollout.response_attention_mask[row, :length].all()
            and (rollout.response_ids[row, length:] == policy.pad_id).all()
        )
        ids, own = rollout.response_ids[row, :length].tolist(), rollout.mask[row, :length].tolist()
        foreign = [token for token, mine in zip(ids, own, strict=True) if not mine]
        answers = [turn.content for turn in turns if turn.role == "tool"]
        assert answers == ["34"] * len(answers) and foreign == inserted * len(answers)
        ends = [i for i, token in enumerate(ids) if token == policy.end_id and own[i]]
        assert len(ends) == len(answers) + bool(rollout.ended[row])
        assert all(
            own[i + 1] is False for i in ends if i + 1 < length
        )  # a call ends its turn, and the tool's turn follows
        assert [turn.role for turn in turns] == ["assistant", "tool"] * len(answers) + ["assistant"]
        assert rollout.texts[row] == turns[-1].content
        said = [token for token, mine in zip(ids, own, strict=True) if mine and token != policy.end_id]
        special = {*policy.tokenizer.all_special_ids}  # a call's end of turn and the tool's turn are in their place
        assert rollout.special_tokens[row] == bool(special & {*said})
    alone = sampler().sample(policy, prompts[:1], seed=0)
    width = alone.mask.shape[1]
    first = rollout.rows(torch.arange(4))
    assert first.turns == alone.turns
    assert torch.equal(first.mask[:, :width], alone.mask) and not first.mask[:, width:].any()
    torch.testing.assert_close(first.logp[:, :width], alone.logp, atol=1e-5, rtol=1e-5)


def test_a_response_does_not_depend_on_the_rest_of_the_batch(policy, prompts, calling):
    whole, chunked = (sampler(batch_size=size).sample(policy, prompts, seed=0) for size in (512, 5))
    assert whole.turns == chunked.turns
    torch.testing.assert_close(whole.logp, chunked.logp, atol=1e-5, rtol=1e-5)


def test_without_calls_the_sampler_equals_the_plain_one(policy, prompts, monkeypatch):
    monkeypatch.setattr(ToolSampler, "_noise", lambda self, rows, columns, seed: noise[:, :columns])
    monkeypatch.setattr(AncestralSampler, "_noise", lambda self, rows, columns, seed: noise[:, :columns])
    noise = torch.rand(48, 24, generator=torch.Generator().manual_seed(0))
    plain = AncestralSampler(8, samples=4).sample(policy, prompts, seed=0)
    tools = sampler().sample(policy, prompts, seed=0)
    assert plain.texts == tools.texts
    for name in ("response_ids", "mask", "logp", "ended"):
        torch.testing.assert_close(getattr(plain, name), getattr(tools, name), atol=1e-6, rtol=0, msg=name)
    for name in ("attention_mask", "loss_mask", "position_ids"):
        assert torch.equal(getattr(plain.tokens, name), getattr(tools.tokens, name)), name


def test_calls_and_results_are_limited(policy, prompts, monkeypatch):
    """Calls, turns and results are limited as configured, and a context too short for them is refused."""
    monkeypatch.setattr(rlhf.sampler.tool_calls, "read_call", lambda turn: Call("long", ""))
    tools = {"long": lambda argument: "word " * 50}
    long = ToolSampler(tools, max_new_tokens=6, samples=2, max_calls=3, max_result_tokens=5)
    rollout = long.sample(policy, prompts, seed=0)
    calls = [sum(turn.role == "tool" for turn in turns) for turns in rollout.turns]
    assert max(calls) == 3
    around = len(encode_tool_turn(policy.tokenizer, "."))
    assert rollout.lengths.max() <= long.longest == 24
    assert int((rollout.response_attention_mask & ~rollout.mask).sum(1).max()) <= 3 * (5 + around)
    room = ToolSampler(TOOLS, max_new_tokens=32, max_calls=3, max_result_tokens=5)
    with pytest.raises(UserError, match="type a smaller sampler.max_new_tokens or sampler.max_calls or "):
        room.sample(policy, prompts, seed=0)
    with pytest.raises(UserError) as error:
        sampler().require_single_turn("a selected response is a single turn")
    assert str(error.value) == (
        "sampler=tools: its responses have several turns, and a selected response is a single turn; "
        "type sampler=best_of_k"
    )
    with pytest.raises(UserError, match="^sampler.tools: is empty; type sampler=sample "):
        ToolSampler({})


def test_errors_of_tools_are_passed_to_the_policy(policy, prompts, monkeypatch):
    for call, answer in (
        (Call("calculator", "3+"), "error: not arithmetic"),
        (Call("oracle", "3"), "error: no such tool; there is calculator, search"),
    ):
        monkeypatch.setattr(rlhf.sampler.tool_calls, "read_call", lambda turn, call=call: call)
        rollout = sampler(max_calls=1, max_result_tokens=40).sample(policy, prompts, seed=0)
        told = {turn.content for turns in rollout.turns for turn in turns if turn.role == "tool"}
        assert told == {answer}
        numbers = rollout.diagnostics()
        assert numbers["calls"] > 0.1 and numbers["call_errors"] == 1.0


def tooled(load, **hyperparameters):
    stage = grpo(load, GRPO(beta=0.1), sampler=sampler(), **{"batch_size": 8, "steps": 3, **hyperparameters})
    ending(stage.policy)
    stage.reference = start_reference(stage.policy)
    return stage


def test_tool_tokens_carry_no_gradient(load, tmp_path, calling):
    """States that predict a tool's tokens have no gradient; those of all the policy's own tokens have."""
    stage = tooled(load, epochs=1, minibatches=1)
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []
    stage.policy.padding_free = False  # a state at every position of the batch
    update, hidden = stage.update, stage.policy._padded_hidden

    def keep(tokens):
        states = hidden(tokens)
        if states.requires_grad and seen:  # not while the stage is being prepared
            states.retain_grad()
            seen[-1] = (*seen[-1], states)
        return states

    def watched(minibatch, first):
        seen.append((minibatch,))
        return update(minibatch, first)

    stage.update, stage.policy._padded_hidden = watched, keep  # type: ignore[method-assign]
    fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=0)
    ((responses, states),) = seen
    asked = states.grad.abs().sum(-1)[:, :-1] > 0  # position t-1 predicts token t
    wanted = responses.tokens.loss_mask[:, 1:]
    foreign = responses.tokens.attention_mask[:, -responses.mask.shape[1] :] & ~responses.mask
    assert foreign.any()
    assert not (asked & ~wanted).any()
    spread = responses.advantages.abs() > 1e-6
    assert asked[wanted & spread.unsqueeze(1)].all()
    assert read_rows(tmp_path / "metrics.csv")[0]["calls"] > 0


@pytest.mark.parametrize("template", ["plain", "chatml"])
def test_a_reward_model_reads_the_whole_dialogue(template, folder, policy, prompts, calling, tmp_path):
    """The score is that of the dialogue as it is tokenised for training, read at its last token."""
    torch.manual_seed(3)
    scorer = ScalarModel.load(CausalLM(str(folder), None, None, chat_template=template))
    scorer.save(tmp_path / "reward")
    reward = ModelReward(str(tmp_path / "reward"))
    rollout = sampler().sample(policy, prompts, seed=0)
    scores = reward(rollout)
    calls = [sum(turn.role == "tool" for turn in turns) for turns in rollout.turns]
    ended = rollout.ended.tolist()
    assert {count for count, end in zip(calls, ended, strict=True) if end} == {0, 1, 2}
    for row, (prompt, turns) in enumerate(zip(rollout.prompts, rollout.turns, strict=True)):
        if ended[row]:
            ids = torch.tensor([encode_dialogue(scorer.tokenizer, [*prompt.messages, *turns]).ids])
            expected = scorer.scores(TokenBatch.of(ids, torch.ones_like(ids)))
            torch.testing.assert_close(scores[row : row + 1], expected, atol=1e-5, rtol=1e-4)
    # Another tool result is another dialogue; the last turns, which other rewards read, are the same.
    other = [tuple(Message(t.role, "99") if t.role == "tool" else t for t in turns) for turns in rollout.turns]
    changed = (reward(replace(rollout, turns=other)) - scores).abs() > 1e-6
    assert changed.tolist() == [count > 0 for count in calls]


def test_the_context_of_the_reward_model_must_fit_tool_results(load, tmp_path):
    short = tmp_path / "reward"
    ScalarModel.load(load()).save(short)
    config = json.loads((short / "config.json").read_text())
    (short / "config.json").write_text(json.dumps(config | {"max_position_embeddings": 64}))
    stage = tooled(load)
    stage.sampler = sampler(max_result_tokens=16)
    stage.reward = ModelReward(str(short))
    with pytest.raises(UserError, match="the reward model .* reads 64"):
        fit(stage, tmp_path / "run")


def test_a_different_tool_result_changes_the_context_and_is_no_target(policy, prompts, calling):
    """The log-probabilities after a result depend on it; its own are in no sum."""
    rollout = sampler().sample(policy, prompts, seed=0)
    foreign = rollout.response_attention_mask & ~rollout.mask
    changed = torch.where(foreign & (rollout.response_ids != policy.end_id), 50, rollout.response_ids)
    other = type(rollout)(**{**rollout.__dict__, "response_ids": changed})
    width = rollout.mask.shape[1]
    before, after = (policy.logprobs(r.tokens)[0][:, -width:] for r in (rollout, other))
    assert (before[foreign] == 0).all() and (after[foreign] == 0).all()
    first = foreign.long().cumsum(1) == 0
    torch.testing.assert_close(before[first], after[first])
    assert (before - after).abs().max() > 1e-3


def test_micro_batches_and_kills_do_not_change_a_run_with_tools(load, tmp_path, calling):
    results = []
    for size in (None, 4):
        stage = tooled(load, micro_batch_size=size)
        fit(stage, tmp_path / str(size))
        results.append(weights(stage))
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, atol=2e-4, rtol=1e-3)
    killed = tooled(load)
    with pytest.raises((KeyboardInterrupt, SystemExit)):
        fit(killed, tmp_path / "killed", callbacks=[Stop(1, tmp_path / "killed")])
    (checkpoint,) = (tmp_path / "killed" / "checkpoints").glob("*.ckpt")
    resumed = tooled(load)
    fit(resumed, tmp_path / "killed", resume=checkpoint)
    assert same(weights(resumed), results[0])


def test_gae_skips_masked_tokens():
    """A tool's result is no step: the result is the same with and without the gap."""
    generator = torch.Generator().manual_seed(0)
    rewards, values = torch.randn(2, 3, 4, generator=generator)
    expected = gae(rewards, values, torch.ones(3, 4), 0.9, 0.8)
    gap = torch.tensor([1, 1, 0, 0, 1, 0, 1]).bool()
    wide = [torch.full((3, 7), 9.0).masked_scatter(gap.expand(3, 7), x) for x in (rewards, values)]
    made = gae(*wide, gap.expand(3, 7), 0.9, 0.8)
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours[:, gap], theirs) and (ours[:, ~gap] == 0).all()


def test_ppo_trains_with_tools(load, tmp_path, calling):
    stage = PPOStage(
        ending(load()),
        PPO(),
        data("prompt"),
        None,
        GoldReward(),
        sampler(samples=1),
        adamw,
        constant,
        batch_size=8,
        steps=2,
        epochs=1,
        minibatches=2,
    )
    fit(stage, tmp_path)
    row = read_rows(tmp_path / "metrics.csv")[0]
    assert row["calls"] > 0 and row["first_ratio"] == pytest.approx(1.0, abs=1e-6)
    assert row["kl"] == pytest.approx(0.0, abs=1e-4)


def test_the_context_equals_that_of_sft(load, prompts):
    """A dialogue with a call has the same tokens and the same mask in SFT and in a rollout."""
    tokenizer = load().tokenizer
    messages = prompts[0].messages
    said = [("assistant", "<call>calculator(3+4)</call>"), ("tool", "7"), ("assistant", "7.")]
    dialogue = [*messages, *(Message(role, text) for role, text in said)]
    row = encode_dialogue(tokenizer, dialogue)
    call, answer = (encode_dialogue(tokenizer, [*messages, turn]) for turn in (dialogue[-3], dialogue[-1]))
    pieces = [
        (encode_prompt(tokenizer, messages), False),
        ([t for t, m in zip(call.ids, call.mask, strict=True) if m], True),
        (encode_tool_turn(tokenizer, "7"), False),
        ([t for t, m in zip(answer.ids, answer.mask, strict=True) if m], True),
    ]
    assert row.ids == [token for ids, _ in pieces for token in ids]
    assert row.mask == [own for ids, own in pieces for _ in ids]


def test_templates_without_a_tool_role_use_a_user_turn(load):
    tokenizer = load().tokenizer
    tokenizer.chat_template = (
        "{%- for m in messages -%}{%- if m.role == 'tool' -%}{{ raise_exception('no tools') }}{%- endif -%}"
        "{{- '<|' + m.role + '|>' + m.content + '<|end|>\\n' -}}{%- endfor -%}"
        "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
    )
    assert tokenizer.decode(encode_tool_turn(tokenizer, "7")) == "\n<|user|>7<|end|>\n<|assistant|>"


def test_written_samples_show_the_turns(load, tmp_path, calling):
    import json

    stage = tooled(load)
    fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=0)
    stage.write_samples(8)
    rows = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert len(rows) == 8 and any(len(row["turns"]) > 1 for row in rows)
    assert single(stage.sampler).samples == 1 and stage.sampler.samples == 4
