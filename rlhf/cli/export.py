"""Export a model: rlhf export RUN --to DIRECTORY writes a Hugging Face directory with a model card.

Plain transformers (for an adapter: peft) loads it and generates the same greedy tokens.
"""

import argparse
import sys
from pathlib import Path

from rlhf.cli import options
from rlhf.console import shell
from rlhf.errors import UserError


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    args = _parser().parse_args(argv)
    from rlhf import console
    from rlhf.models.vocabulary import lacks_template
    from rlhf.running.summary import command
    from rlhf.using import named
    from rlhf.using.export import export
    from rlhf.using.model_card import card

    model = named.model(args.run, args.outputs)
    if named.scalar(model.path) and lacks_template(model.path):
        raise UserError(
            "its tokenizer has no chat template, which a reward model needs to read dialogues",
            fix=f"put one into {Path(model.path) / 'chat_template.jinja'}",
            option="RUN",
            value=args.run,
        )
    found = export(model, args.to, args.merge, args.force)
    if lacks_template(str(found.folder)):
        found.notes.append(
            "its tokenizer has no chat template: put one into chat_template.jinja, which apply_chat_template needs, or "
            "type --chat-template in rlhf chat"
        )
    end_id = _end_id(found.folder) if found.kind == "reward_model" else None
    page = card(model, found, end_id, args.license, command())
    (found.folder / "README.md").write_text(page, encoding="utf-8")
    kinds = {"model": "a model with all its weights", "adapter": "an adapter", "reward_model": "a reward model"}
    console.say(f"{kinds[found.kind]}, {sum(f.stat().st_size for f in found.folder.iterdir()) / 1e6:.1f} MB")
    for note in found.notes:
        console.say(note)
    print(f"\n{found.folder}\n{found.folder / 'README.md'}    # lineage, metrics, and the code that loads it")
    following = (
        [(shell("rlhf", "chat", found.folder), "chat with the exported model")] if found.kind != "reward_model" else []
    )
    if found.kind == "reward_model":
        following = [
            (shell("rlhf", "eval", "RUN", "--reward-model", found.folder), "score a policy with the exported model")
        ]
    console.print_next_commands(following)
    return 0


def _end_id(folder: Path) -> int:
    from transformers import AutoTokenizer

    from rlhf.data.end_tokens import end_of_turn_id

    return end_of_turn_id(AutoTokenizer.from_pretrained(folder, trust_remote_code=False))


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(prog="rlhf export", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "run", metavar="RUN", help="run of a policy or a reward model, model directory, GGUF file or hub id"
    )
    parser.add_argument("--to", type=Path, required=True, metavar="DIRECTORY", help="directory to write; must be empty")
    parser.add_argument(
        "--merge",
        action="store_true",
        help="merge the adapter into the weights (default: write the adapter alone)",
    )
    parser.add_argument("--force", action="store_true", help="replace a model that is in the directory")
    parser.add_argument("--license", metavar="ID", help="licence in the card, such as apache-2.0 (default: unknown)")
    options.outputs(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
