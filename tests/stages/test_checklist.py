"""Details that public implementations got wrong and that no other test covers; docs/correctness.md lists them all."""

import re
from dataclasses import replace

import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf

from rlhf.data.collate import TokenBatch
from rlhf.data.encoding import encode_dialogue, encode_prompt, encode_response
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.storage.metrics_file import read_rows
from tests.names import ROOT, known, stage_files

from .conftest import data, fit
from .test_exactness import ppo, reward_model
from .test_reward_model import ranked, stage_on

WANTED = {
    *("kl", "kl_k3", "entropy", "approx_kl", "clip_fraction", "ratio_variance", "explained_variance", "value_loss"),
    *("score", "score_std", "rlhf_reward", "length", "ended", "repetition", "distinct", "first_ratio", "beta"),
}


def test_ppo_logs_the_metrics_of_the_checklist(load, tmp_path):
    fit(ppo(load), tmp_path, limit_train_batches=1, limit_val_batches=0)
    assert WANTED - {*read_rows(tmp_path / "metrics.csv")[0]} == set()


def test_scores_do_not_depend_on_the_rest_of_the_batch(load, tmp_path):
    """Chosen and rejected in one forward pass with other padding, in two, or alone: the same scores (fp32)."""
    stage = stage_on(load, normalize="none")
    fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=0)
    whole, chosen, rejected = stage.score_comparisons(stage.examples)
    alone = [stage.score_comparisons([example]) for example in stage.examples]
    torch.testing.assert_close(whole, torch.cat([scores for scores, *_ in alone]), atol=1e-5, rtol=1e-4)
    for example, (_, better, worse) in zip(stage.examples[:3], alone, strict=False):
        for (i, j, _), high, low in zip(example.pairs, better, worse, strict=True):
            apart = []
            for response in (i, j):
                ids = torch.tensor([example.prompt + example.responses[response]])
                apart.append(stage.scorer.scores(TokenBatch.of(ids, torch.ones_like(ids))))
            assert apart[0].shape == (1,)  # a batch of one stays a batch
            torch.testing.assert_close(torch.cat(apart), torch.stack([high, low]), atol=1e-5, rtol=1e-4)


def test_a_reward_model_trains_and_scores_without_dropout(load, tmp_path):
    def dropping(lora: bool = False):
        model = load(lora)
        for module in model.modules():
            if hasattr(module, "attention_dropout"):
                module.attention_dropout = 0.5
        return model.train()

    kept, dropped = reward_model(load), reward_model(dropping)
    for stage, name in ((kept, "a"), (dropped, "b")):
        fit(stage, tmp_path / name, limit_train_batches=2)
    for one, other in zip(kept.scorer.parameters(), dropped.scorer.parameters(), strict=True):
        torch.testing.assert_close(one, other)


def test_a_response_ends_once(load):
    """One end-of-turn, and no generation prompt after it, for the reward model, DPO and SFT."""
    tokenizer = load().tokenizer
    end = encode_response(tokenizer, "")[-1]
    record = data("comparison").train[0]
    for text in record.responses:
        response = encode_response(tokenizer, text)
        assert response[-1] == end and response.count(end) == 1
    dialogue = data("demonstration").train[0].messages
    row = encode_dialogue(tokenizer, dialogue)
    assert [token for token, own in zip(row.ids, row.mask, strict=True) if own].count(end) == sum(
        turn.role == "assistant" for turn in dialogue
    )
    assert row.ids[-1] == end
    split = ranked(4)
    examples, _ = split.data.encode(tokenizer, split.train)
    for example in examples:
        assert all(response[-1] == end and response.count(end) == 1 for response in example.responses)
        assert example.prompt == encode_prompt(tokenizer, split.train[examples.index(example)].prompt)


def test_optimizer_defaults_are_those_of_the_papers():
    """Adam with epsilon 1e-8 and decay rates 0.9 and 0.95 (InstructGPT, Llama 2), gradients clipped at 1.

    They hold in every stage that trains; epsilon is 1e-5 where a stage samples (tests/conf/test_optimizer_defaults.py).
    """
    make = instantiate(OmegaConf.load(ROOT / "conf/optimizer/adamw.yaml"))
    (group,) = make([{"params": [torch.nn.Parameter(torch.ones(2, 2))]}]).param_groups
    assert group["eps"] == 1e-8 and group["betas"] == (0.9, 0.95)
    for path in stage_files():
        node = OmegaConf.load(path).stage
        assert node.get("gradient_clip", 1.0) == 1.0, path


def test_log_probabilities_and_values_are_float32_in_half_precision(load):
    """Sums of 16-bit numbers over a response would lose whole nats."""
    policy = load()
    rollout = AncestralSampler(8).sample(policy, data("prompt").train[:4], 0)
    policy.base.to(torch.bfloat16)
    with torch.no_grad():
        logp, entropy = policy.logprobs(rollout.tokens, entropy=True)
        sampled = AncestralSampler(8).sample(policy, data("prompt").train[:4], 0)
    assert logp.dtype == entropy.dtype == sampled.logp.dtype == torch.float32


# -- the document -----------------------------------------------------------------------------------------------------

PAGE = (ROOT / "docs/correctness.md").read_text(encoding="utf-8")


def test_every_test_named_on_the_page_exists():
    named = set(re.findall(r"`(tests/[\w/]+\.py::test_\w+)`", PAGE))
    assert len(named) > 120
    assert named - known() == set()


def test_every_row_names_a_test_or_a_check_at_run_time():
    """A check at run time that a row names is a function that exists."""
    sources = "".join(path.read_text() for folder in ("rlhf", "plugins") for path in ROOT.glob(f"{folder}/**/*.py"))
    rows = [line for line in PAGE.splitlines() if line.startswith("|") and not line.startswith(("|--", "| detail"))]
    assert len(rows) > 90
    for row in rows:
        checks = re.findall(r"run: `(\w+)`", row)
        assert "::test_" in row or checks, row
        assert all(f"def {check}(" in sources for check in checks), row


def test_every_objective_and_stage_is_on_the_page():
    files = [*ROOT.glob("plugins/*/conf/objective/*.yaml"), *stage_files()]
    missing = {path.stem for path in files if f"`{path.stem}`" not in PAGE}
    assert not missing, missing


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_gives_the_same_preference_loss(side, load, tmp_path):
    from rlhf_dpo.objective import DPO
    from rlhf_dpo.stage import DPOStage

    from .conftest import adamw, constant

    stage = DPOStage(load(), DPO(beta=0.5), data("comparison", 8, 2), adamw, constant, batch_size=8)
    fit(stage, tmp_path, limit_train_batches=1, limit_val_batches=0)
    part = stage.collate(list(stage.examples))
    plain, _ = stage.batch_adapter.losses(stage.policy, part, None, 0)

    def padded(x, empty):
        wide = (3, 0) if side == "left" else (0, 3)
        return torch.nn.functional.pad(x, wide, value=empty)

    t = part.tokens
    wide = TokenBatch(
        padded(t.ids, stage.policy.pad_id), *(padded(x, 0) for x in (t.attention_mask, t.loss_mask, t.position_ids))
    )
    other, _ = stage.batch_adapter.losses(stage.policy, replace(part, tokens=wide), None, 0)
    torch.testing.assert_close(other, plain, atol=1e-5, rtol=1e-5)
