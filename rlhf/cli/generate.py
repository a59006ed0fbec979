"""Generate responses to a file of prompts: rlhf generate RUN --prompts FILE writes JSON lines.

The same command resumes a file that was interrupted. Responses do not depend on the batch size.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from rlhf.cli import options
from rlhf.console import shell


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    args = _parser().parse_args(argv)
    from rlhf import console
    from rlhf.runs import fingerprint
    from rlhf.using import named
    from rlhf.using.given_data import load_prompts
    from rlhf.using.response_file import ResponseFile, digest

    found = named.policy(args.run, args.outputs)
    world = named.testbed(found.run) if found.run is not None else None
    prompts = load_prompts(args.prompts, world, args.limit)
    from rlhf.using import templates

    given = templates.given([found], args.chat_template)
    for note in given.notes:
        console.say(note, "yellow")
    model = Path(found.path)
    settings: dict[str, Any] = {
        "run": str(found.run.folder) if found.run else None,
        "model": fingerprint.identity(model) if model.exists() else found.path,
        "prompts": args.prompts,
        "prompts_sha256": digest(prompts),
        "count": len(prompts),
        "samples": args.samples,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
    }
    if args.chat_template:
        settings["chat_template"] = templates.identity(args.chat_template)
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:6]
    default = args.outputs / "generations" / f"{found.slug}-{Path(args.prompts).name.split('.')[0]}-{key}.jsonl"
    file = ResponseFile(args.out or default, settings, args.samples)
    with file.writing(args.force) as done:
        if done == len(prompts):
            console.say(f"{file.path} is complete; type --force to write it again")
        else:
            with templates.as_typed(bool(args.chat_template)):
                _write(found.path, prompts, file, done, args)
    rows = file.rows()
    ended = sum(row["ended"] for row in rows) / len(rows)
    tokens = sum(row["tokens"] for row in rows) / len(rows)
    likely = sum(row["logprob"] for row in rows) / len(rows)
    console.say(
        f"{len(rows)} responses to {len(prompts)} prompts: {tokens:.1f} tokens on average, {100 * ended:.0f}% ended "
        f"with end-of-turn, mean log-probability {likely:.2f}"
    )
    console.say(f"\n{file.path}\n{file.meta}")
    template_option = ["--chat-template", args.chat_template] if args.chat_template else []
    measure = shell("rlhf", "eval", args.run, "--prompts", args.prompts, *template_option)
    chat = shell("rlhf", "chat", args.run, *template_option)
    console.print_next_commands([(measure, "measure them: length, KL, reward, win rates"), (chat, "chat with it")])
    return 0


def _write(path: str, prompts: list[Any], file: Any, done: int, args: argparse.Namespace) -> None:
    """Sample and write the missing responses."""
    from rlhf.callbacks.progress import Meter
    from rlhf.evaluation.compare import load_policy
    from rlhf.sampler.generation import SeededSampler, generate_batches, room

    policy = load_policy(path, args.chat_template)
    longest = room(policy, prompts, args.max_new_tokens)
    if args.max_new_tokens is None:
        print(f"at most {longest} tokens per response (context {policy.context_length}; --max-new-tokens sets it)")
    sampler = SeededSampler(longest, args.temperature, args.top_k, args.top_p, args.samples, args.batch_size)
    if done % sampler.prompts_at_once:
        # A partial batch would be padded differently, which changes the last digits of its log-probabilities.
        done -= done % sampler.prompts_at_once
        file.keep(done)
    with Meter("generate", len(prompts), "prompt", start=done) as meter:
        for rollout in generate_batches(policy, prompts, sampler, args.seed, done):
            file.add(rollout, done)
            count = len(rollout.texts) // args.samples
            done += count
            meter.advance(
                count, length=float(rollout.lengths.float().mean()), ended=float(rollout.ended.float().mean())
            )


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(prog="rlhf generate", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="run, fingerprint prefix, model directory, GGUF file or hub id")
    parser.add_argument(
        "--prompts",
        required=True,
        metavar="FILE",
        help="prompts, demonstrations, comparisons (jsonl, json, parquet, .gz), a text file with one prompt per line, "
        "a glob, a data set of the hub, or testbed (its held-out prompts)",
    )
    parser.add_argument("--out", type=Path, metavar="FILE.jsonl", help="output file (default: in OUTPUTS/generations)")
    parser.add_argument("--force", action="store_true", help="overwrite a file that was made with other settings")
    options.count(parser, "--samples", 1, "responses per prompt (default: 1)", most=100_000)
    options.count(parser, "--limit", None, "only the first N prompts")
    options.chat_template(parser, "a model")
    options.sampling(parser, 1.0, None, "128, or what remains of the context after the longest prompt")
    options.batch_size(parser, 64)
    options.outputs(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
