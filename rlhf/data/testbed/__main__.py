"""Reference numbers of the testbed, printed by `python -m rlhf.data.testbed`."""

from statistics import mean, stdev

from rlhf.data.testbed.gold import gold
from rlhf.data.testbed.world import Testbed


def main() -> None:
    """Print the gold scores of labellers, the best of 16, the perfect and the best constant response."""
    world = Testbed()
    rng = world._rng("report")
    questions = world.questions(400, rng, held_out=True)
    prompts = [world.prompt(question) for question in questions]
    constant, constant_mean = world.best_constant(prompts)
    for part, wanted in (("all", (True, False)), ("safe", (False,)), ("unsafe", (True,))):
        chosen = [(q, p) for q, p in zip(questions, prompts, strict=True) if p.unsafe in wanted]
        labellers = [gold(p, world.response(q, rng)).total for q, p in chosen for _ in range(20)]
        perfect = mean(gold(p, world.best(q, rng)).total for q, p in chosen)
        best_16 = mean(max(gold(p, world.response(q, rng)).total for _ in range(16)) for q, p in chosen)
        best = mean(gold(p, constant).total for _, p in chosen)
        print(
            f"{part:7} n={len(chosen):3}  labellers {mean(labellers):.3f} (sd {stdev(labellers):.3f})  "
            f"best of 16 {best_16:.3f}  perfect {perfect:.3f}  best constant {best:.3f}"
        )
    print(f"best constant response ({constant_mean:.3f}): {constant}")


if __name__ == "__main__":
    main()
