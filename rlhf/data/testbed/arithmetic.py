"""Small word problems with verifiable answers: `data.source=arithmetic`, deterministic by seed."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from rlhf.data.held_out import TooFewHeldOut
from rlhf.data.records import Demonstration, Message, Prompt, Text
from rlhf.data.testbed.language import NAMES
from rlhf.data.tool_calls import Call
from rlhf.errors import UserError, key

PEOPLE = NAMES[:12]
THINGS = ("figs", "plums", "cakes", "coins", "books", "cups")

# The same number of stories for both operations, so that each story is equally likely.
STORIES = {
    "+": (
        "What is {a} plus {b}?",
        "{n} has {a} {t} and gets {b} more. How many {t} does {n} have?",
        "There are {a} {t} in a box. {n} puts {b} more in. How many are in the box?",
        "{n} buys {a} {t} today and {b} {t} the day after. How many {t} is that?",
    ),
    "-": (
        "What is {a} minus {b}?",
        "{n} has {a} {t} and loses {b}. How many {t} does {n} have?",
        "There are {a} {t} in a box. {n} takes {b} out. How many are in the box?",
        "{n} buys {a} {t} and sells {b} of them. How many {t} are left?",
    ),
}
ANSWERS = ("The answer is {r}.", "That makes {r}.", "It is {r}.")


@dataclass(frozen=True)
class Problem:
    """Problem `a + b` or `a - b` in the words of one story."""

    a: int
    operation: Literal["+", "-"]
    b: int
    story: int
    person: str
    thing: str

    @property
    def result(self) -> int:
        """Correct result."""
        return self.a + self.b if self.operation == "+" else self.a - self.b

    @property
    def key(self) -> tuple[int, str, int, int]:
        """Numbers, operation and story, which are held out together for every person and thing."""
        return self.a, self.operation, self.b, self.story

    @property
    def expression(self) -> str:
        """Expression without spaces, such as 3+4."""
        return f"{self.a}{self.operation}{self.b}"

    @property
    def text(self) -> str:
        """Text of the story."""
        story = STORIES[self.operation][self.story]
        return story.format(a=self.a, b=self.b, n=self.person, t=self.thing)


class Arithmetic:
    """Addition and subtraction of small numbers in a few stories.

    Every sum is held out in one of its stories, which depends on ``seed`` alone. Held-out problems therefore ask for
    sums that occurred in training, in words that occurred in training, but never both together.

    Args:
        seed: Seed of the selection of held-out problems.
        largest: Largest number in a problem; results are from 0 to twice it.
        careless: Share of demonstrations with a wrong result.
        calls: Share of demonstrations that call the calculator (see sampler=tools) instead of computing the result.
    """

    def __init__(
        self,
        seed: int = 0,
        largest: Annotated[int, Field(ge=2, le=999)] = 9,
        careless: Annotated[float, Field(ge=0, le=1)] = 0.3,
        calls: Annotated[float, Field(ge=0, le=1)] = 0.0,
    ) -> None:
        self.seed, self.largest, self.careless, self.calls = seed, largest, careless, calls

    def hyperparameters(self) -> dict[str, float | int]:
        """Return the hyperparameters on which the data depend, besides sizes and seeds of the draws."""
        return {"seed": self.seed, "largest": self.largest, "careless": self.careless, "calls": self.calls}

    def _rng(self, *parts: object) -> random.Random:
        return random.Random(f"arithmetic/{self.seed}/{'/'.join(map(str, parts))}")

    def is_held_out(self, problem: Problem) -> bool:
        """Return whether this story of this sum is held out for validation."""
        stories = len(STORIES[problem.operation])
        return self._rng("held out", problem.expression).randrange(stories) == problem.story

    def problem(self, rng: random.Random, held_out: bool) -> Problem:
        """Draw a problem of one side of the split."""
        while True:
            operation: Literal["+", "-"] = rng.choice(("+", "-"))
            a, b = rng.randint(0, self.largest), rng.randint(0, self.largest)
            if operation == "-" and a < b:
                a, b = b, a
            story = rng.randrange(len(STORIES[operation]))
            problem = Problem(a, operation, b, story, rng.choice(PEOPLE), rng.choice(THINGS))
            if self.is_held_out(problem) == held_out:
                return problem

    def problems(self, n: int, rng: random.Random, held_out: bool = False) -> list[Problem]:
        """Draw n problems; held-out ones are all different.

        Raises:
            UserError: If there are fewer held-out problems than requested.
        """
        if not held_out:
            return [self.problem(rng, held_out) for _ in range(n)]
        if (self.largest + 1) ** 2 < n and (available := self.held_out_texts()) < n:
            raise TooFewHeldOut(
                f"numbers up to {self.largest} make only {available} held-out problems",
                fix=f"type {key('data.validation', available)} or less, or a larger {key('data.arithmetic.largest')}",
                value=n,
                available=available,
            )
        found: dict[str, Problem] = {}
        for _ in range(100 * n):
            problem = self.problem(rng, held_out)
            found.setdefault(problem.text, problem)
            if len(found) == n:
                return list(found.values())
        raise UserError(
            f"numbers up to {self.largest} make only about {len(found)} held-out problems",
            fix=f"type {key('data.validation', len(found))} or less, or a larger {key('data.arithmetic.largest')}",
            option="data.validation",
            value=n,
        )

    def held_out_texts(self) -> int:
        """Return the number of held-out problems with different texts.

        One story of every sum and difference is held out.
        """
        pairs = [(a, b) for a in range(self.largest + 1) for b in range(self.largest + 1)]
        sums: list[tuple[Literal["+", "-"], int, int]] = [("+", a, b) for a, b in pairs] + [
            ("-", a, b) for a, b in pairs if a >= b
        ]
        texts = {
            problem.text
            for operation, a, b in sums
            for story in range(len(STORIES[operation]))
            if self.is_held_out(Problem(a, operation, b, story, PEOPLE[0], THINGS[0]))
            for person in PEOPLE
            for thing in THINGS
            for problem in (Problem(a, operation, b, story, person, thing),)
        }
        return len(texts)

    def prompt(self, problem: Problem) -> Prompt:
        """Return the problem as a Prompt, with its result as reference."""
        identity = "/".join(map(str, (*problem.key, problem.person, problem.thing)))
        return Prompt(
            (Message("user", problem.text),), reference=str(problem.result), id=identity, cluster=problem.expression
        )

    def turns(self, problem: Problem, rng: random.Random) -> list[Message]:
        """Return a demonstrator's turns: the sum and its result, or a calculator call and its result."""
        a, b, operation = problem.a, problem.b, problem.operation
        careless = rng.random() < self.careless
        answer = rng.choice(ANSWERS)
        if rng.random() < self.calls:
            if careless:  # calls with the wrong expression; the calculator's result of it is correct
                operation = "-" if operation == "+" and a >= b else "+"
            result = a + b if operation == "+" else a - b
            call = Call("calculator", f"{a}{operation}{b}")
            return [
                Message("assistant", str(call)),
                Message("tool", str(result)),
                Message("assistant", answer.format(r=result)),
            ]
        result = problem.result
        if careless:
            result = max(0, result + rng.choice((-2, -1, 1, 2)))
        return [Message("assistant", f"{a} {operation} {b} = {result}. {answer.format(r=result)}")]

    # Records

    def prompts(self, n: int, seed: int, held_out: bool = False) -> list[Prompt]:
        """Return problems as prompts."""
        return [self.prompt(problem) for problem in self.problems(n, self._rng("prompt", seed, held_out), held_out)]

    def demonstrations(self, n: int, seed: int, held_out: bool = False) -> list[Demonstration]:
        """Return problems with the turns of a demonstrator, who makes errors at the rate `careless`."""
        rng = self._rng("demonstration", seed, held_out)
        return [
            Demonstration((Message("user", problem.text), *self.turns(problem, rng)), cluster=problem.expression)
            for problem in self.problems(n, rng, held_out)
        ]

    def texts(self, n: int, seed: int) -> Sequence[Text]:
        """Return correct sums and problems with correct answers, none of them held out."""
        rng = self._rng("text", seed)
        documents = []
        for _ in range(n):
            problem = self.problem(rng, held_out=False)
            line = f"{problem.a} {problem.operation} {problem.b} = {problem.result}."
            if rng.random() < 0.5:
                line = f"Question: {problem.text} Answer: {line} {rng.choice(ANSWERS).format(r=problem.result)}"
            documents.append(Text(line))
        return documents
