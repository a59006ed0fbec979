"""Inspect a config before training: rlhf inspect data | batch | template | plan KEY=VALUE... (as for a run).

rlhf inspect data stage=sft data=alpaca data.source=FILE     rows read and dropped, with reasons; lengths
rlhf inspect batch stage=sft --step 3 --rows 2               the batch of a training step: tokens, mask, positions
rlhf inspect template model=smollm2_135m                     the chat template with its mask
rlhf inspect plan pipeline=instructgpt                       steps, parameters, memory, amounts of work
"""

import argparse
import sys
from collections.abc import Sequence

from rlhf.cli import options
from rlhf.errors import UserError, suggest

PAGES = ("data", "batch", "template", "plan")


def main(argv: Sequence[str]) -> int:
    """Run the sub-command; return its exit status."""
    parser = _parser()
    options, unknown = parser.parse_known_args(list(argv))
    if options.page not in PAGES:
        if not options.page:
            raise UserError("rlhf inspect: names no page", fix=f"type one of: {', '.join(PAGES)}")
        raise UserError(f"rlhf inspect {options.page}: no such page{suggest(options.page, PAGES)}")
    words = [word for word in [*options.words, *unknown] if not word.startswith("step=")]
    for word in words:
        if word.startswith("-") or not ("=" in word or word.startswith(("+", "~"))):
            is_sweep = word in ("-m", "--multirun")
            problem = "shows one config, not a sweep" if is_sweep else "must be KEY=VALUE, as for a run"
            raise UserError(f"rlhf inspect {options.page} {word}: {problem}", fix="leave it out" if is_sweep else "")
    named = [word.removeprefix("step=") for word in options.words if word.startswith("step=")]
    step = named[-1] if named else None

    if options.page == "data":
        from rlhf.inspection import data_page

        data_page.show(words, step, options.rows)
    elif options.page == "batch":
        from rlhf.inspection import batch_page

        batch_page.show(words, step, options.step, options.rows)
    elif options.page == "template":
        from rlhf.inspection import template_page

        template_page.show(words, step)
    else:
        from rlhf.inspection import plan_page

        plan_page.show(words)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(
        prog="rlhf inspect",
        usage="rlhf inspect data|batch|template|plan [--rows N] [--step N] [step=NAME] KEY=VALUE...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("page", nargs="?", metavar="data|batch|template|plan", help="page to print")
    parser.add_argument(
        "words",
        nargs="*",
        metavar="KEY=VALUE",
        help="as for a run; step=NAME selects a step of a pipeline [the last]",
    )
    options.amount(parser, "--rows", 3, "data, batch: number of records or rows to print [3]")
    options.amount(parser, "--step", 0, "batch: training step whose batch is printed, from 0 [0]")
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
