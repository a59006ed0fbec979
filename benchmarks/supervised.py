"""SFT against TRL's SFTTrainer: dialogues with the loss on the assistant's tokens."""

from typing import Any

from benchmarks.gate import Gate, Job


def inputs(job: Job) -> tuple[Any, ...]:
    """Return the data of our SFT stage, and its overrides."""
    from benchmarks.ours import split_of
    from rlhf.data.encoded_rows import Encoded
    from rlhf.data.records import Demonstration, Message

    rows = [Encoded(row["ids"], row["mask"]) for row in job.rows]
    record = Demonstration((Message("user", "given"), Message("assistant", "as tokens")))
    data = split_of("demonstration", [record] * len(rows), rows)
    return (
        data,
        "stage=sft",
        f"inputs.policy={job.model}",
        f"stage.batch_size={len(rows)}",
        f"stage.epochs={job.total}",
    )


def ours(job: Job, gate: Gate) -> None:
    """Train our SFT stage."""
    from benchmarks.ours import train

    train(job, gate, *inputs(job))


def peer(job: Job, gate: Gate) -> None:
    """Train TRL's SFTTrainer."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from benchmarks.trl_side import GateCallback, attended, lora_config, training_arguments, weights_dtype

    class Trainer(SFTTrainer):
        """Trainer that records its batches."""

        def training_step(self, model, inputs, *arguments, **named):  # type: ignore[no-untyped-def]
            """Record the rows, then train."""
            if gate.warming:
                gate.record_rows(attended(inputs["input_ids"], inputs["attention_mask"]))
            return super().training_step(model, inputs, *arguments, **named)

    gate.start()
    labels = [
        {
            "input_ids": row["ids"],
            "labels": [token if kept else -100 for token, kept in zip(row["ids"], row["mask"], strict=True)],
        }
        for row in job.rows
    ]
    arguments = SFTConfig(
        **training_arguments(job),
        per_device_train_batch_size=len(labels),
        max_length=job.case["length"],
    )
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=weights_dtype(job)),
        args=arguments,
        train_dataset=Dataset.from_list(labels),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora_config(job),
        callbacks=[GateCallback(gate)],
    ).train()
