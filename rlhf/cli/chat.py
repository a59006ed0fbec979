"""Chat with a policy: rlhf chat RUN.

Responses are printed while they are sampled, and prompts use the model's own chat template. If standard input is not a
terminal, every line of it is a user turn (line breaks within a response are kept).
"""

import argparse
import sys
from typing import TYPE_CHECKING

from rlhf.cli import options
from rlhf.console import shell
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.using.chat import Chat

COMMANDS = "/reset clears the dialogue, /system TEXT clears it and sets a system message, /quit exits"


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    args = _parser().parse_args(argv)
    from rlhf.using import named

    found = named.policy(args.run, args.outputs)
    from rlhf.data.records import Message
    from rlhf.evaluation.compare import load_policy
    from rlhf.sampler.ancestral import AncestralSampler
    from rlhf.using import templates
    from rlhf.using.chat import Chat

    given = templates.given([found], args.chat_template)
    for note in given.notes:
        print(f"({note})", file=sys.stderr)
    template = given.of(found.path)
    sampler = AncestralSampler(args.max_new_tokens, args.temperature, args.top_k, args.top_p)
    with templates.as_typed(template is not None):
        policy = load_policy(found.path, template)
    chat = Chat(policy, sampler, args.system, args.seed, template is not None)
    chat.encoded([*chat.messages, Message("user", "a")])  # raises now for a template that cannot render a dialogue
    if sys.stdin.isatty():
        print(f"{found.label}, context of {policy.context_length} tokens. {COMMANDS}.")
    run_dialogue(chat, sys.stdin.isatty())
    if sys.stdin.isatty():
        template_option = ["--chat-template", args.chat_template] if args.chat_template else []
        following = shell("rlhf", "generate", args.run, "--prompts", "FILE", *template_option)
        print(f"next: {following}    # responses to a file of prompts")
    return 0


def run_dialogue(chat: "Chat", interactive: bool) -> None:
    """Read and process turns until the end of the input or /quit."""
    while (line := _read(interactive)) is not None:
        text = line.strip()
        if not text:
            continue
        if text.startswith("/"):
            if text == "/quit":
                return
            _command(chat, text)
            continue
        try:
            for piece in chat.respond(text):
                print(piece, end="", flush=True)
            print(flush=True)
        except UserError as error:
            print(f"({error})", file=sys.stderr, flush=True)
            continue
        except KeyboardInterrupt:  # stops a long response; the turn is dropped
            print("\n(interrupted; this turn is dropped)", file=sys.stderr)
            continue
        if chat.cut:
            print(f"({chat.cut})", file=sys.stderr, flush=True)


def _read(interactive: bool) -> str | None:
    if not interactive:
        return sys.stdin.readline() or None
    try:
        return input("> ")
    except (EOFError, KeyboardInterrupt):
        print()
        return None


def _command(chat: "Chat", text: str) -> None:
    word, _, rest = text.partition(" ")
    if word == "/reset":
        chat.reset()
        print("(the dialogue is cleared)", file=sys.stderr)
    elif word == "/system":
        chat.reset(rest.strip())
        print(f"(the dialogue is cleared; {'new' if rest.strip() else 'no'} system message)", file=sys.stderr)
    else:
        print(f"({word}: no such command; {COMMANDS})", file=sys.stderr)


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(prog="rlhf chat", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("run", metavar="RUN", help="run, fingerprint prefix, model directory, GGUF file or hub id")
    parser.add_argument("--system", metavar="TEXT", help="system message (default: none, or the template's own)")
    options.chat_template(parser, "a model")
    options.sampling(parser, 0.7, 256)
    options.outputs(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
