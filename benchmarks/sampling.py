"""Sampling against ``model.generate``: K responses to each prompt, from the model's own distribution."""

from benchmarks.gate import Gate, Job


def ours(job: Job, gate: Gate) -> None:
    """Sample with our sampler."""
    import torch
    from hydra.utils import instantiate

    from benchmarks.ours import rows_of
    from rlhf.data.records import Message, Prompt
    from rlhf.models.adapters import NoAdapter
    from rlhf.models.causal_lm import CausalLM
    from rlhf.sampler.ancestral import AncestralSampler
    from rlhf.testing import compose_config

    gate.start()
    precision = instantiate(compose_config(f"precision={job.dtype}").precision)
    policy = CausalLM(job.model, None, None).load(NoAdapter(), precision).frozen().to(job.device)
    prompts = [Prompt(tuple(Message(**message) for message in row["messages"])) for row in job.rows]
    gate.record_rows(ids for prompt in prompts for ids in rows_of(prompt, policy))
    sampler = AncestralSampler(job.case["response"], samples=job.case["samples"])
    for seed in range(job.total):
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            rollout = sampler.sample(policy, prompts, seed)
        gate.end_step(response=float(rollout.mask.sum(dim=1).float().mean()))


def peer(job: Job, gate: Gate) -> None:
    """Sample with ``generate``."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from benchmarks.trl_side import weights_dtype

    gate.start()
    tokenizer = AutoTokenizer.from_pretrained(job.model, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=weights_dtype(job)).eval().to(job.device)
    batch = tokenizer.pad({"input_ids": [row["ids"] for row in job.rows]}, return_tensors="pt").to(job.device)
    gate.record_rows(row["ids"] for row in job.rows)
    end = model.generation_config.eos_token_id
    for seed in range(job.total):
        torch.manual_seed(seed)
        with torch.autocast(job.device, torch.bfloat16, enabled=job.dtype == "bf16"):
            ids = model.generate(
                **batch,
                max_new_tokens=job.case["response"],
                num_return_sequences=job.case["samples"],
                do_sample=True,
                top_k=0,
                top_p=1.0,
                pad_token_id=tokenizer.pad_token_id,
            )
        response = ids[:, batch["input_ids"].shape[1] :]
        ended = torch.isin(response, torch.as_tensor(end, device=response.device)).long()
        lengths = (ended.cumsum(dim=1) - ended == 0).sum(dim=1)
        gate.end_step(response=float(lengths.float().mean()))
