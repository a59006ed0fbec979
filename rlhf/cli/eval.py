"""Measure policies on the same prompts: rlhf eval RUN... gives reward, win rate, KL, length, perplexity.

Every number has its standard error; all policies respond to the same prompts with the same random numbers, so
differences are paired. The table is printed, and each run's part of it is added to eval.json in its directory.
"""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf.cli import options
from rlhf.console import shell
from rlhf.errors import UserError

if TYPE_CHECKING:
    from rlhf.evaluation.best_of_n import BestOfN
    from rlhf.evaluation.measuring import Measured, Task
    from rlhf.reward.base import Reward
    from rlhf.using.eval_file import Result
    from rlhf.using.named import Named
    from rlhf.using.templates import Given

TESTBED_RESPONSE = 32  # tokens, the default of conf/sampler/sample
RESPONSE = 128
MANY = 3  # runs from which on their mean has an interval: of two, half of the draws are one run twice


def main(argv: list[str]) -> int:
    """Run the command; return its exit status."""
    args = _parser().parse_args(argv)
    from rlhf import console
    from rlhf.data import contamination
    from rlhf.using import eval_file, named
    from rlhf.using.given_data import load_documents, load_prompts

    # All arguments are checked before torch is imported.
    policies = [named.policy(ref, args.outputs) for ref in args.runs]
    against = named.policy(args.against, args.outputs, "--against") if args.against else None
    scorer = named.reward_model(args.reward_model, args.outputs) if args.reward_model else None
    judge = named.policy(args.judge, args.outputs, "--judge") if args.judge else None
    references = _references(args.reference, [*policies, *([against] if against else [])], args.outputs)
    world = next((node for one in policies if one.run and (node := named.testbed(one.run))), None)
    if args.prompts is None and world is None:
        raise UserError("none of these models was trained on the testbed, so it needs prompts", "type --prompts FILE")
    source = args.prompts or "testbed"
    gold = source == "testbed"
    if judge is not None and against is None:
        raise UserError("compares two policies", fix="type --against RUN", option="--judge")
    if against is not None and not (gold or scorer or judge):
        fix = "type --reward-model RUN or --judge MODEL"
        raise UserError("needs a model that decides which response is better", fix=fix, option="--against")
    if args.best_of and not (gold or scorer):
        raise UserError("needs a score that chooses the best", fix="type --reward-model RUN", option="--best-of")
    if args.best_of and args.temperature == 0:
        fix = "type --temperature 1"
        raise UserError("chooses among equal responses at --temperature 0", fix=fix, option="--best-of")
    prompts = load_prompts(source, world, args.limit)
    measured_models = [one.path for one in (*policies, against, scorer) if one is not None]
    other_prompts = "type --prompts FILE with prompts that it was not trained on"
    for line in contamination.check_models(prompts, measured_models, "prompts", other_prompts):
        console.say(line, "yellow")
    texts = load_documents("text", args.text, world, args.limit, "--text") if args.text else []
    dialogues = (
        load_documents("demonstration", args.demonstrations, world, args.limit, "--demonstrations")
        if args.demonstrations
        else []
    )
    from rlhf.evaluation.measuring import Task
    from rlhf.using import templates

    given = templates.given([*policies, *([against] if against else [])], args.chat_template)
    for note in given.notes:
        console.say(note, "yellow")
    longest = args.max_new_tokens or (TESTBED_RESPONSE if gold else RESPONSE)
    sampling = longest, args.temperature, args.seed, args.batch_size, args.best_of or 0
    task = Task(prompts, texts, dialogues, *sampling)  # type: ignore[arg-type]
    everyone = [*policies, *([against] if against and against.path not in [p.path for p in policies] else [])]
    with templates.as_typed(bool(args.chat_template)):
        measured, rewards = _measure(everyone, references, scorer, gold, task, given)
        best = {one.path: _best_of_n(one, rewards, task) for one in measured} if task.best_of else {}
    baseline = next((m for m in measured if against and m.path == against.path), measured[0])
    if against is not None:
        _wins(measured, baseline, judge, args, task)
    results = [_result(one, baseline, best.get(one.path, [])) for one in measured]

    names = [result.name for result in results]
    title = f"{len(prompts)} prompts of {source}, temperature {args.temperature:g}, seed {args.seed}"
    clusters = len({*measured[0].clusters("length")})
    console.print_table(
        f"{title} (mean ± standard error over {clusters} clusters)", ("metric", *names), eval_file.rows(results, False)
    )
    others = [result for result in results if result.differences]
    if others:
        columns = ("metric", *(result.name for result in others))
        console.print_table(f"\nDifference to {baseline.name}, paired", columns, eval_file.rows(others, True))
    if len(others) >= MANY:
        title = f"\nMean difference of the {len(others)} runs to {baseline.name}, bootstrap over runs and prompts"
        console.print_table(title, ("metric", "mean", "95% interval"), _over_runs(measured, baseline))
    for result in results:
        if result.best_of_n:
            ranked = "the reward model" if scorer else "gold reward"
            console.print_table(f"\nBest of n of {result.name}, ranked by {ranked}", *eval_file.best_of_n_table(result))
    for result in results:
        for note in result.notes:
            console.say(f"{result.name}: {note}", "yellow")
    settings = _settings(args, source, len(prompts), longest, scorer, judge, against)
    console.say("")
    for one, result in zip(everyone, results, strict=True):
        file = one.home(args.outputs, "evals") / eval_file.FILE
        mine = {**settings, "run": str(one.run.folder) if one.run else one.path, "reference": references.get(one.path)}
        eval_file.add(file, mine | {"baseline": baseline.name}, result)
        print(file)
    needs = given.of(policies[-1].path)
    console.print_next_commands(_next(args, everyone, against, ["--chat-template", needs] if needs else []))
    return 0


def _references(ref: str | None, policies: "list[Named]", outputs: Path) -> dict[str, str]:
    """Return policy's path -> path of the model that its KL is measured against; policies without one are left out."""
    from rlhf.using import named

    if ref == "none":
        return {}
    if ref is not None:
        return dict.fromkeys((one.path for one in policies), named.policy(ref, outputs, "--reference").path)
    started = {one.path: named.started_from(one.run) for one in policies if one.run is not None}
    return {path: reference for path, reference in started.items() if reference is not None}


def _measure(
    everyone: "list[Named]",
    references: dict[str, str],
    scorer: "Named | None",
    gold: bool,
    task: "Task",
    given: "Given",
) -> "tuple[list[Measured], dict[str, Reward]]":
    """Return every policy's responses with all metrics except wins, and the rewards that scored them by metric.

    Only one model is in memory at a time.
    """
    from rlhf.errors import UserError
    from rlhf.evaluation.measuring import add_kl, add_scores, device, measure
    from rlhf.reward.base import make_ready
    from rlhf.reward.gold import GoldReward
    from rlhf.reward.model import ModelReward

    measured = [measure(one.label, one.path, task, given.of(one.path)) for one in everyone]
    for reference in dict.fromkeys(references.values()) if task.temperature > 0 else ():
        try:
            add_kl([one for one in measured if references.get(one.path) == reference], reference, task)
        except UserError as error:  # the lineage names a model that is missing; the other metrics do not need it
            for one in measured:
                if references.get(one.path) == reference:
                    one.notes.append(f"no KL: {error}; type --reference MODEL for another")
    for one in measured if references else ():
        if one.path not in references:
            one.notes.append("no KL: the model that it started from is unknown; type --reference MODEL")
        elif task.temperature == 0:
            one.notes.append("no KL: at temperature 0 responses are not samples of the policy")
    rewards: dict[str, Reward] = {}
    if gold:
        rewards["gold"] = GoldReward()
        add_scores(measured, "gold", rewards["gold"], {"safe": lambda p: not p.unsafe, "unsafe": lambda p: p.unsafe})
    if scorer is not None:
        rewards["reward"] = ModelReward(scorer.path, task.batch_size)
        make_ready(rewards["reward"], device())
        add_scores(measured, "reward", rewards["reward"])
    return measured, rewards


def _best_of_n(one: "Measured", rewards: "dict[str, Reward]", task: "Task") -> "list[BestOfN]":
    """Return the metrics of the best of n of a policy's responses, chosen by the reward model, else by gold reward."""
    import torch

    from rlhf.evaluation.best_of_n import best_of_n, score_responses
    from rlhf.evaluation.measuring import device, on

    moved = [on(rollout, device()) for rollout in one.many]
    metrics = {name: score_responses(moved, reward, task.best_of) for name, reward in rewards.items()}
    for name in ("length", "ended"):
        values = torch.cat([rollout.lengths if name == "length" else rollout.ended for rollout in one.many])
        metrics[name] = values.view(-1, task.best_of).double()
    return best_of_n(task.prompts, metrics)


def _wins(
    measured: "list[Measured]", baseline: "Measured", judge: "Named | None", args: argparse.Namespace, task: "Task"
) -> None:
    """Add the win rates of the other policies against the baseline, by gold reward, reward model and judge."""
    from rlhf.evaluation.wins import Judge, by_scores

    compare = Judge(judge.path, args.judge_template, args.outputs / "judge", args.batch_size) if judge else None
    for one in measured:
        if one is baseline:
            continue
        for name in ("gold", "reward"):
            if name in one.values:
                one.values[f"win_{name}"] = by_scores(one.values[name], baseline.values[name])
        if compare is not None:
            before, same = compare.asked, compare.same_place
            one.values["win_judge"] = compare(task.prompts, one.texts, baseline.texts)
            pairs, same = compare.asked - before, compare.same_place - same
            one.notes.append(
                f"the judge preferred the same position in both orders for {same} of {pairs} pairs, which count as ties"
            )


def _result(one: "Measured", baseline: "Measured", best: "list[BestOfN]") -> "Result":
    from rlhf.functional.statistics import estimate, paired
    from rlhf.using.eval_file import LABELS, Result

    metrics = {name: estimate(one.values[name], one.clusters(name)) for name in LABELS if name in one.values}
    differences = {}
    if one is not baseline:
        shared = [name for name in metrics if name in baseline.values and name != "kl"]
        if one.vocabulary != baseline.vocabulary:  # perplexities per token are not comparable between vocabularies
            shared = [name for name in shared if not name.startswith("perplexity")]
        differences = {name: paired(baseline.values[name], one.values[name], one.clusters(name)) for name in shared}
    prompts = [prompt for rollout in one.rollouts for prompt in rollout.prompts][:3]
    samples = [{"prompt": p.messages[-1].content, "response": t} for p, t in zip(prompts, one.texts[:3], strict=True)]
    return Result(one.name, metrics, differences, one.notes, samples, best)


def _over_runs(measured: "list[Measured]", baseline: "Measured") -> list[tuple[str, ...]]:
    """Return a table's rows of the mean difference over runs, such as those of several training seeds."""
    from rlhf.functional.statistics import hierarchical_bootstrap
    from rlhf.using.eval_file import LABELS

    runs = [one for one in measured if one is not baseline]
    rows: list[tuple[str, ...]] = []
    for name, label in LABELS.items():
        if name == "kl" or any(name not in one.values for one in measured):
            continue
        gaps = [[a - b for a, b in zip(one.values[name], baseline.values[name], strict=True)] for one in runs]
        low, high = hierarchical_bootstrap(gaps, baseline.clusters(name))
        mean = sum(map(sum, gaps)) / (len(gaps) * len(gaps[0]))
        rows.append((label, f"{mean:+.3f}", f"{low:+.3f} to {high:+.3f}"))
    return rows


def _settings(
    args: argparse.Namespace, source: str, count: int, longest: int, *models: "Named | None"
) -> dict[str, Any]:
    from rlhf.using import templates

    scorer, judge, against = (None if one is None else str(one.run.folder if one.run else one.path) for one in models)
    return {
        "prompts": source,
        "count": count,
        "max_new_tokens": longest,
        "temperature": args.temperature,
        "seed": args.seed,
        "text": args.text,
        "demonstrations": args.demonstrations,
        "reward_model": scorer,
        "judge": judge,
        "judge_template": args.judge_template if judge else None,
        "against": against,
        **({"best_of": args.best_of} if args.best_of else {}),
        **({"chat_template": templates.identity(args.chat_template)} if args.chat_template else {}),
    }


def _next(
    args: argparse.Namespace, everyone: "list[Named]", against: "Named | None", template: list[str]
) -> list[tuple[str, str]]:
    last = args.runs[-1]
    found = [
        (shell("rlhf", "chat", last, *template), "chat with it"),
        (shell("rlhf", "export", last, "--to", "DIRECTORY"), "export it"),
    ]
    if against is None and everyone[-1].run is not None:
        found.insert(0, (shell("rlhf", "eval", last, "--against", "RUN", *template), "win rate against another run"))
    return found


def _parser() -> argparse.ArgumentParser:
    parser = options.Parser(prog="rlhf eval", description=(__doc__ or "").split("\n\n")[0])
    add = parser.add_argument
    add("runs", nargs="+", metavar="RUN", help="run, fingerprint prefix, model directory, GGUF file or hub id")
    add("--prompts", metavar="FILE", help="prompts, in any of rlhf's data formats (default: the testbed's held-out "
        "prompts, for runs whose lineage is the testbed)")  # fmt: skip
    options.count(parser, "--limit", 400, "prompts and documents used, the first ones (default: 400)")
    add("--against", metavar="RUN", help="policy that the others are compared with: win rates and paired differences")
    add("--reward-model", "--reward_model", metavar="RUN", help="reward model that scores the responses")
    add("--judge", metavar="MODEL", help="language model that compares both responses, in both orders")
    add("--judge-template", metavar="T", default="instruction", help="short, instruction, or a text file with "
        "{prompt}, {first} and {second} (default: instruction)")  # fmt: skip
    add("--reference", metavar="MODEL", help="model that KL is measured against, none for no KL (default: the model "
        "that each run started from)")  # fmt: skip
    options.count(parser, "--best-of", None, "also measure the best of 2, 4, ... N responses as a policy, chosen by "
        "--reward-model, else by gold reward", least=2)  # fmt: skip
    add("--text", metavar="FILE", help="plain text whose perplexity is measured; testbed for its held-out text")
    add("--demonstrations", metavar="FILE", help="dialogues; the perplexity of their assistant turns is measured")
    options.chat_template(parser, "those of the policies")
    options.longest(parser, None, f"{TESTBED_RESPONSE} on the testbed, else {RESPONSE}")
    options.temperature(parser, 1.0)
    options.seed(parser)
    options.batch_size(parser, 64)
    options.outputs(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
