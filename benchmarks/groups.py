"""GRPO and RLOO against TRL's trainers: K responses to each prompt, scored by the same function."""

from typing import Any

from benchmarks.gate import Gate, Job

BETAS = {"grpo": 0.04, "rloo": 0.05}  # KL coefficients, our defaults; TRL's RLOO default, and DeepSeekMath's


def distinct_share(prompt: Any, response: str) -> float:
    """Return the share of distinct characters in a response: a reward that costs nothing."""
    return len(set(response)) / (1 + len(response))


def inputs(job: Job) -> tuple[Any, ...]:
    """Return the data of our GRPO stage or our RLOO stage, and its overrides."""
    from benchmarks.ours import prompts_of

    case = job.case
    return (
        prompts_of(job),
        f"stage={case['stage']}",
        f"inputs.policy={job.model}",
        "reward=function",
        "reward.function=benchmarks.groups:distinct_share",
        f"objective.beta={BETAS[case['stage']]}",
        f"sampler.samples={case['samples']}",
        f"sampler.max_new_tokens={case['response']}",
        f"stage.batch_size={len(job.rows)}",
        f"stage.steps={job.total}",
    )


def ours(job: Job, gate: Gate) -> None:
    """Train our GRPO stage or our RLOO stage."""
    from benchmarks.ours import train

    train(job, gate, *inputs(job))


def peer(job: Job, gate: Gate) -> None:
    """Train TRL's GRPOTrainer or RLOOTrainer."""
    import trl
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.trl_side import GateCallback, attended, lora_config, training_arguments, weights_dtype

    case = job.case
    name = case["stage"].upper()
    base: Any = getattr(trl, f"{name}Trainer")

    class Trainer(base):  # type: ignore[misc]
        """Trainer that records its prompts."""

        def training_step(self, model, inputs, *arguments, **named):  # type: ignore[no-untyped-def]
            """Train, then record the prompts of the batch that was sampled."""
            loss = super().training_step(model, inputs, *arguments, **named)
            if gate.warming:
                (batch,) = self._buffered_inputs
                rows = attended(batch["prompt_ids"], batch["prompt_mask"])
                gate.record_rows(list(row) for row in {tuple(row) for row in rows})
            return loss

    def score(completions: list[Any], **_: Any) -> list[float]:
        return [distinct_share(None, completion[0]["content"]) for completion in completions]

    gate.start()
    arguments = training_arguments(job)
    if case["stage"] == "grpo":
        arguments["loss_type"] = "grpo"  # the mean over each response, then over responses, as ours
    config = getattr(trl, f"{name}Config")(
        **arguments,
        per_device_train_batch_size=len(job.rows) * case["samples"],
        num_generations=case["samples"],
        max_completion_length=case["response"],
        beta=BETAS[case["stage"]],
    )
    Trainer(
        model=AutoModelForCausalLM.from_pretrained(job.model, dtype=weights_dtype(job)),
        reward_funcs=score,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": row["messages"]} for row in job.rows]),
        processing_class=AutoTokenizer.from_pretrained(job.model),
        peft_config=lora_config(job),
        callbacks=[GateCallback(gate)],
    ).train()
