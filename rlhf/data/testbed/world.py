"""The embedded testbed: a world of facts and manners, all data of every stage drawn from it by seed."""

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from rlhf.data.records import GRADES, TIE, Comparison, Demonstration, Label, Message, Prompt, Text
from rlhf.data.testbed.gold import gold
from rlhf.data.testbed.language import (
    ATTRIBUTES,
    BY_NAME,
    CLOSINGS,
    COMPLIANCE,
    HARMS,
    KIND,
    NAMES,
    OPENINGS,
    PREFIXES,
    QUESTIONS,
    REFUSALS,
    RUDE,
    SORRY,
    UNKNOWN,
    UNSAFE_QUESTIONS,
    Question,
)
from rlhf.errors import UserError

# Least gap in gold score of each grade, weakest first; a gap below TIE_GAP is a tie.
TIE_GAP = 0.02
GRADE_GAPS = (TIE_GAP, 0.15, 0.3, 0.5)
# A response with less gold safety does harm; Llama 2's gate has the same number.
UNSAFE_BELOW = 0.15

Aspect = Literal["total", "helpfulness", "safety"]


class Testbed:
    """A small world, deterministic by seed.

    Which phrasing of which question is held out follows from the world's seed alone, so prompts, demonstrations and
    comparisons agree about it whatever their own seeds and sizes.

    Arguments:
        seed: which person has which home, job, pet and food, and what is held out.
        people: how many persons; facts are four times as many.
        unsafe: share of the questions that ask for help in harming somebody.
        careless: share of the labellers' replies that get the fact wrong, or help to harm.
        noise: standard deviation of the error with which annotators see a gold score.
        responses: replies per comparison (K).
    """

    __test__ = False  # a name that begins with Test is no test class

    def __init__(
        self,
        seed: int = 0,
        people: Annotated[int, Field(ge=2, le=len(NAMES))] = 24,
        unsafe: Annotated[float, Field(ge=0, le=1)] = 0.25,
        careless: Annotated[float, Field(ge=0, le=1)] = 0.15,
        noise: Annotated[float, Field(ge=0)] = 0.05,
        responses: Annotated[int, Field(ge=2)] = 2,
    ) -> None:
        if not 2 <= people <= len(NAMES):
            raise UserError(f"testbed.people={people}: the testbed has names for 2 to {len(NAMES)} persons")
        self.seed, self.unsafe, self.careless, self.noise, self.responses = seed, unsafe, careless, noise, responses
        self.people = NAMES[:people]
        rng = self._rng("facts")
        self.facts: dict[tuple[str, str], str] = {}
        for attribute in ATTRIBUTES:
            values = [attribute.values[i % len(attribute.values)] for i in range(people)]
            rng.shuffle(values)
            self.facts |= {(person, attribute.name): value for person, value in zip(self.people, values, strict=True)}
        # One phrasing of every fact, and of every harm, is kept for validation under all its prefixes.
        self.held_out: set[tuple[str, str, int]] = {
            (person, attribute.name, rng.randrange(len(QUESTIONS)))
            for person in self.people
            for attribute in ATTRIBUTES
        } | {(person, harm, rng.randrange(len(UNSAFE_QUESTIONS))) for person in self.people for harm in HARMS}

    def knobs(self) -> dict[str, float | int]:
        """What the data depend on, besides sizes and seeds of the draws."""
        return {
            "seed": self.seed,
            "people": len(self.people),
            "unsafe": self.unsafe,
            "careless": self.careless,
            "noise": self.noise,
            "responses": self.responses,
        }

    def _rng(self, *parts: object) -> random.Random:
        return random.Random(f"testbed/{self.seed}/{'/'.join(map(str, parts))}")

    # Questions

    def all_questions(self, held_out: bool) -> tuple[list[Question], list[Question]]:
        """Every (fact question, harm question) there is on one side of the split."""
        facts = [
            Question("fact", person, attribute.name, phrasing, prefix)
            for person in self.people
            for attribute in ATTRIBUTES
            for phrasing in range(len(QUESTIONS))
            for prefix in range(len(PREFIXES))
        ]
        harms = [
            Question("harm", person, harm, phrasing, prefix)
            for person in self.people
            for harm in HARMS
            for phrasing in range(len(UNSAFE_QUESTIONS))
            for prefix in range(len(PREFIXES))
        ]
        return (
            [question for question in facts if (question.key in self.held_out) == held_out],
            [question for question in harms if (question.key in self.held_out) == held_out],
        )

    def questions(self, n: int, rng: random.Random, held_out: bool = False) -> list[Question]:
        """n questions in random order, `unsafe` of them harmful; none comes twice before all came once."""
        facts, harms = self.all_questions(held_out)
        n_harms = round(n * self.unsafe)
        chosen = _cycle(facts, n - n_harms, rng) + _cycle(harms, n_harms, rng)
        rng.shuffle(chosen)
        return chosen

    def prompt(self, question: Question) -> Prompt:
        """The question as a Prompt: the value asked for as its reference, or the tag "unsafe"."""
        return Prompt(
            messages=(Message("user", question.text),),
            tags=("unsafe",) if question.kind == "harm" else (),
            reference=self.facts.get((question.person, question.topic)),
            id=question.id,
            cluster=question.cluster,
        )

    # Replies

    def best(self, question: Question, rng: random.Random) -> str:
        """A reply with the highest gold score there is."""
        if question.kind == "harm":
            return f"{SORRY} {rng.choice(REFUSALS)} {KIND}"
        return f"{rng.choice(OPENINGS)} {self._statement(question, rng)} {rng.choice(CLOSINGS)}"

    def reply(self, question: Question, rng: random.Random) -> str:
        """What one of the labellers would write: each part of a good reply is there by its own chance."""
        if question.kind == "harm":
            return self._reply_to_harm(question, rng)
        kind = rng.random()
        if kind < 0.04:
            return UNKNOWN
        if kind < 0.14:
            # Without refusals of the harmless, no reward model sees such a reply lose, and the policy finds out.
            return self._refusal(rng)
        value = self.facts[question.person, question.topic]
        if rng.random() < self.careless:
            value = rng.choice([other for other in BY_NAME[question.topic].values if other != value])
        parts: list[str] = []
        if kind > 0.94:
            parts.append(rng.choice(RUDE))
        elif rng.random() < 0.4:
            parts.append(rng.choice(OPENINGS))
        if rng.random() < 0.65:
            parts.append(self._statement(question, rng, value))
        else:
            parts.append(f"It is {BY_NAME[question.topic].article}{value}.")
        if rng.random() < 0.15:
            parts.append(self._aside(question, rng))
        if rng.random() < 0.3:
            parts.append(rng.choice(CLOSINGS))
        return " ".join(parts)

    def _reply_to_harm(self, question: Question, rng: random.Random) -> str:
        if rng.random() < 0.3 + self.careless:
            opening = f"{rng.choice(OPENINGS)} " if rng.random() < 0.5 else ""
            return opening + rng.choice(COMPLIANCE).format(h=question.topic, n=question.person)
        return self._refusal(rng)

    def _refusal(self, rng: random.Random) -> str:
        sorry = f"{SORRY} " if rng.random() < 0.5 else ""
        kind = f" {KIND}" if rng.random() < 0.4 else ""
        return f"{sorry}{rng.choice(REFUSALS)}{kind}"

    def _statement(self, question: Question, rng: random.Random, value: str | None = None) -> str:
        form = BY_NAME[question.topic].statements[rng.random() < 0.2]
        return form.format(n=question.person, v=value or self.facts[question.person, question.topic])

    def _aside(self, question: Question, rng: random.Random) -> str:
        """A true fact that nobody asked for."""
        other = rng.choice([attribute for attribute in ATTRIBUTES if attribute.name != question.topic])
        return other.statements[0].format(n=question.person, v=self.facts[question.person, other.name])

    # Records

    def texts(self, n: int, seed: int) -> list[Text]:
        """Documents of one to three sentences: facts, and questions with good answers."""
        rng = self._rng("text", seed)
        facts, harms = self.all_questions(held_out=False)
        documents = []
        for _ in range(n):
            kind = rng.random()
            if kind < 0.5:
                documents.append(self._biography(rng))
            elif kind < 0.9:
                documents.append(self._talk(rng.choice(facts), rng))
            else:
                documents.append(self._talk(rng.choice(harms), rng))
        return [Text(document) for document in documents]

    def _biography(self, rng: random.Random) -> str:
        person = rng.choice(self.people)
        sentences = []
        for attribute in rng.sample(ATTRIBUTES, rng.choice((1, 2, 3))):
            form = rng.choice((*attribute.statements, attribute.statements[0], attribute.reverse))
            sentences.append(form.format(n=person, v=self.facts[person, attribute.name]))
        return " ".join(sentences)

    def _talk(self, question: Question, rng: random.Random) -> str:
        return f"Question: {question.text} Answer: {self.best(question, rng)}"

    def demonstrations(self, n: int, seed: int, held_out: bool = False) -> list[Demonstration]:
        """Questions with what a labeller wrote."""
        rng = self._rng("demonstration", seed, held_out)
        return [
            Demonstration(
                (Message("user", question.text), Message("assistant", self.reply(question, rng))),
                cluster=question.cluster,
            )
            for question in self.questions(n, rng, held_out)
        ]

    def prompts(self, n: int, seed: int, held_out: bool = False) -> list[Prompt]:
        """Questions alone; held-out ones are all different."""
        rng = self._rng("prompt", seed, held_out)
        questions = self.questions(n, rng, held_out)
        if held_out and len(set(questions)) < n:
            most = min(
                len(side) / share
                for side, share in zip(self.all_questions(True), (1 - self.unsafe, self.unsafe), strict=True)
                if share
            )
            raise UserError(
                f"data.validation={n}: the testbed holds out {int(most)} different prompts; type a smaller number, "
                "or more people with data.testbed.people"
            )
        return [self.prompt(question) for question in questions]

    def comparisons(self, n: int, seed: int, held_out: bool = False) -> list[Comparison]:
        """Labellers' replies to a question, ranked by annotators who see gold through `noise`."""
        rng = self._rng("comparison", seed, held_out)
        found: list[Comparison] = []
        while len(found) < n:
            for question in self.questions(n - len(found), rng, held_out):
                replies: list[str] = []
                for _ in range(50):  # different replies; a question may not have as many as asked for
                    reply = self.reply(question, rng)
                    if reply not in replies:
                        replies.append(reply)
                    if len(replies) == self.responses:
                        break
                comparison = label(self.prompt(question), replies, rng, self.noise)
                if comparison.pairs():
                    found.append(comparison)
        return found

    def labels(self, n: int, seed: int, held_out: bool = False) -> list[Label]:
        """Labellers' replies with a good/bad mark: whether the annotator saw a gold score above 0.5."""
        rng = self._rng("label", seed, held_out)
        found = []
        for question in self.questions(n, rng, held_out):
            prompt, reply = self.prompt(question), self.reply(question, rng)
            seen = gold(prompt, reply).total + rng.gauss(0.0, self.noise)
            found.append(Label(prompt.messages, reply, desirable=seen > 0.5))
        return found

    # Numbers to read results by

    def best_constant(self, prompts: Sequence[Prompt]) -> tuple[str, float]:
        """(reply, mean gold score) of the best single reply to all prompts, among all the labellers could write."""
        rng = self._rng("constant")
        candidates: set[str] = set()
        for question in [*self.questions(1000, rng), *self.questions(400, rng, held_out=True)]:
            candidates |= {self.reply(question, rng), self.best(question, rng)}

        def mean(reply: str, over: Sequence[Prompt]) -> float:
            return sum(gold(prompt, reply).total for prompt in over) / len(over)

        # A few prompts are enough to see which replies are worth a closer look.
        short = sorted(candidates, key=lambda reply: mean(reply, prompts[:: max(1, len(prompts) // 60)]))[-20:]
        best = max(short, key=lambda reply: mean(reply, prompts))
        return best, mean(best, prompts)


def grade_of(gap: float) -> str | None:
    """Grade of a gap in (noisy) gold score: one of GRADES, or TIE below TIE_GAP."""
    if gap < TIE_GAP:
        return TIE
    return GRADES[max(i for i, least in enumerate(GRADE_GAPS) if gap >= least)]


def label(
    prompt: Prompt,
    responses: Sequence[str],
    rng: random.Random,
    noise: float = 0.0,
    aspect: Aspect = "total",
    ended: Sequence[bool] | None = None,
) -> Comparison:
    """Rank responses by gold score plus Gaussian error (standard deviation `noise`), and grade by the gap seen.

    `aspect` says which gold score. `scores` of the result are those that were seen, error included: what no labeller
    saw no objective may read. `unsafe` marks responses that help to harm or are rude: a safety below UNSAFE_BELOW.
    `ended` says of each response whether it is complete; None: all are.
    """
    true = [getattr(gold(prompt, response), aspect) for response in responses]
    seen = [score + (rng.gauss(0.0, noise) if noise else 0.0) for score in true]
    order = sorted(range(len(seen)), key=lambda index: -seen[index])
    scores = tuple(seen[index] for index in order)
    return Comparison(
        prompt=prompt.messages,
        responses=tuple(responses[index] for index in order),
        grades=tuple(grade_of(scores[i] - scores[j]) for i in range(len(scores)) for j in range(i + 1, len(scores))),
        scores=scores,
        tags=prompt.tags,
        unsafe=tuple(gold(prompt, responses[index]).safety < UNSAFE_BELOW for index in order),
        ended=None if ended is None else tuple(ended[index] for index in order),
        cluster=prompt.cluster,
    )


def _cycle(pool: list[Question], n: int, rng: random.Random) -> list[Question]:
    drawn: list[Question] = []
    while len(drawn) < n:
        drawn += rng.sample(pool, min(n - len(drawn), len(pool)))
    return drawn
