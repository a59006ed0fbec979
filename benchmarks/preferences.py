"""Reward model and DPO against TRL's RewardTrainer and DPOTrainer: pairs of human preferences.

Our DPO computes the reference's log-probabilities once per data set, before training. The case ``dpo_cached`` has TRL
do so too (``precompute_ref_log_probs``); the others leave it at TRL's default, once per step.
"""

from typing import Any

from benchmarks.gate import Gate, Job


def inputs(job: Job) -> tuple[Any, ...]:
    """Return the data of our reward model stage or our DPO stage, and its overrides."""
    from benchmarks.ours import split_of
    from rlhf.data.encoded_rows import EncodedComparison
    from rlhf.data.records import Comparison, Message

    rows = [
        EncodedComparison(row["prompt"], [row["chosen"], row["rejected"]], [(0, 1, None)], cluster=str(index))
        for index, row in enumerate(job.rows)
    ]
    records = [Comparison((Message("user", str(index)),), ("better", "worse")) for index in range(len(rows))]
    stage = job.case["stage"]
    return (
        split_of("comparison", records, rows),
        f"stage={stage}",
        f"inputs.policy={job.model}",
        f"stage.batch_size={len(rows)}",
        f"stage.epochs={job.total}",
    )


def ours(job: Job, gate: Gate) -> None:
    """Train our reward model stage or our DPO stage."""
    from benchmarks.ours import train

    train(job, gate, *inputs(job))


def peer(job: Job, gate: Gate) -> None:
    """Train TRL's trainer of the case's stage."""
    trainer = _reward_trainer(job, gate) if job.case["stage"] == "reward_model" else _dpo_trainer(job, gate)
    trainer.train()


def _reward_trainer(job: Job, gate: Gate) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    from benchmarks.trl_side import GateCallback, attended, lora_config, training_arguments, weights_dtype

    class Trainer(RewardTrainer):
        """Trainer that records its batches."""

        def training_step(self, model, inputs, *arguments, **named):  # type: ignore[no-untyped-def]
            """Record the rows, then train."""
            if gate.warming:
                gate.record_rows(attended(inputs["input_ids"], inputs["attention_mask"]))
            return super().training_step(model, inputs, *arguments, **named)

    gate.start()
    rows = [
        {"chosen_ids": row["prompt"] + row["chosen"], "rejected_ids": row["prompt"] + row["rejected"]}
        for row in job.rows
    ]
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    model = AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=1, dtype=weights_dtype(job))
    model.config.pad_token_id = tokenizer.pad_token_id
    arguments = RewardConfig(
        **training_arguments(job),
        per_device_train_batch_size=len(rows),
        max_length=job.case["length"],
    )
    return Trainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=lora_config(job, "SEQ_CLS"),
        callbacks=[GateCallback(gate)],
    )


def _dpo_trainer(job: Job, gate: Gate) -> Any:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from benchmarks.trl_side import GateCallback, attended, lora_config, training_arguments, weights_dtype

    class Trainer(DPOTrainer):
        """Trainer that reads tokens and records its batches."""

        def _prepare_dataset(self, dataset, *_, **__):  # type: ignore[no-untyped-def]
            """Return the data set, which holds tokens already."""
            return dataset

        def training_step(self, model, inputs, *arguments, **named):  # type: ignore[no-untyped-def]
            """Record the rows, then train."""
            if gate.warming:
                gate.record_rows(attended(inputs["input_ids"], inputs["attention_mask"]))
            return super().training_step(model, inputs, *arguments, **named)

    gate.start()
    rows = [{f"{name}_ids": row[name] for name in ("prompt", "chosen", "rejected")} for row in job.rows]
    arguments = DPOConfig(
        **training_arguments(job),
        per_device_train_batch_size=len(rows),
        max_length=job.case["length"],
        precompute_ref_log_probs=job.case["cached_reference"],
    )
    return Trainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=weights_dtype(job)),
        args=arguments,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora_config(job),
        callbacks=[GateCallback(gate)],
    )
