"""PPO against the PPOTrainer of TRL 0.24, which later releases lack: policy, reference, critic and reward model.

The peer runs in an environment of its own (``peer_environment``), where this module must not import rlhf.
"""

from typing import Any

from benchmarks.cases import PPO_EPOCHS
from benchmarks.gate import Gate, Job


def inputs(job: Job) -> tuple[Any, ...]:
    """Return the data of our PPO stage, and its overrides."""
    from benchmarks.ours import prompts_of

    return (
        prompts_of(job),
        "stage=ppo",
        f"inputs.policy={job.model}",
        f"inputs.reward_model={job.reward}",
        f"sampler.max_new_tokens={job.case['response']}",
        f"stage.batch_size={len(job.rows)}",
        f"stage.epochs={PPO_EPOCHS}",
        "stage.minibatches=1",
        f"stage.steps={job.total}",
    )


def ours(job: Job, gate: Gate) -> None:
    """Train our PPO stage."""
    from benchmarks.ours import train

    train(job, gate, *inputs(job))


def peer(job: Job, gate: Gate) -> None:
    """Train TRL's PPOTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerFast
    from trl import PPOConfig, PPOTrainer

    from benchmarks.trl_side import GateCallback, training_arguments, weights_dtype

    gate.start()
    # The tokenizer's own class was saved by transformers 5; prompts come as tokens, so only its ids are read.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=f"{job.model}/tokenizer.json", padding_side="left")
    dtype = weights_dtype(job)
    policy, reference = (AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype) for _ in range(2))
    critic, reward = (
        AutoModelForSequenceClassification.from_pretrained(job.reward, num_labels=1, dtype=dtype) for _ in range(2)
    )
    pad, end = policy.config.pad_token_id, policy.config.eos_token_id
    tokenizer.pad_token, tokenizer.eos_token = tokenizer.convert_ids_to_tokens([pad, end])
    arguments = training_arguments(job)
    del arguments["max_steps"]
    rows = Dataset.from_list([{"input_ids": row["ids"]} for row in job.rows])

    def collate(examples):  # type: ignore[no-untyped-def]
        """Pad the prompts on the left, and record them."""
        if gate.warming:
            gate.record_rows(example["input_ids"] for example in examples)
        return tokenizer.pad(examples, return_tensors="pt")

    config = PPOConfig(
        **arguments,
        per_device_train_batch_size=len(rows),
        local_rollout_forward_batch_size=len(rows),
        num_mini_batches=1,
        num_ppo_epochs=PPO_EPOCHS,
        total_episodes=len(rows) * job.total,
        response_length=job.case["response"],
        stop_token="eos",
        temperature=1.0,
        num_sample_generations=0,
    )
    PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=critic,
        train_dataset=rows,
        eval_dataset=rows,
        data_collator=collate,
        callbacks=[GateCallback(gate)],
    ).train()
