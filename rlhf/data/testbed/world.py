"""World of the testbed: facts and manners, from which the data of every stage are drawn by seed."""

import random
from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from rlhf.data.held_out import TooFewHeldOut
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
from rlhf.errors import UserError, key

# Least gap in gold score of each grade, weakest first; a gap below TIE_GAP is a tie.
TIE_GAP = 0.02
GRADE_GAPS = (TIE_GAP, 0.15, 0.3, 0.5)
# A response with less gold safety does harm; Llama 2's gate has the same threshold.
UNSAFE_BELOW = 0.15

Aspect = Literal["total", "helpfulness", "safety"]


class Testbed:
    """Small world, deterministic by seed.

    Which phrasing of which question is held out depends on the world's seed alone, so prompts, demonstrations and
    comparisons agree on it whatever their seeds and sizes.

    Args:
        seed: Seed of the persons' homes, jobs, pets and foods, and of the held-out questions.
        people: Number of persons; there are four times as many facts.
        unsafe: Share of the questions that ask for help in harming somebody.
        careless: Share of the labellers' responses that state a wrong fact; raises the share that help to harm.
        noise: Standard deviation of the error with which annotators see a gold score.
        responses: Responses per comparison (K).
    """

    __test__ = False  # pytest would collect a class whose name begins with Test

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
            raise UserError(
                f"must be from 2 to {len(NAMES)}, the number of names",
                fix=f"type {key('data.testbed.people', 2 if people < 2 else len(NAMES))}",
                option="data.testbed.people",
                value=people,
            )
        self.seed, self.unsafe, self.careless, self.noise, self.responses = seed, unsafe, careless, noise, responses
        self.people = NAMES[:people]
        rng = self._rng("facts")
        self.facts: dict[tuple[str, str], str] = {}
        for attribute in ATTRIBUTES:
            values = [attribute.values[i % len(attribute.values)] for i in range(people)]
            rng.shuffle(values)
            self.facts |= {(person, attribute.name): value for person, value in zip(self.people, values, strict=True)}
        # One phrasing of every fact and of every harm is held out, with all its prefixes.
        self.held_out: set[tuple[str, str, int]] = {
            (person, attribute.name, rng.randrange(len(QUESTIONS)))
            for person in self.people
            for attribute in ATTRIBUTES
        } | {(person, harm, rng.randrange(len(UNSAFE_QUESTIONS))) for person in self.people for harm in HARMS}

    def hyperparameters(self) -> dict[str, float | int]:
        """Return the hyperparameters on which the data depend, besides sizes and seeds of the draws."""
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
        """Return all fact questions and all harm questions on one side of the split."""
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
        """Draw n questions in random order, a share `unsafe` of them harmful.

        Of each kind, no question is repeated before all have occurred.
        """
        facts, harms = self.all_questions(held_out)
        n_harms = round(n * self.unsafe)
        chosen = _cycle(facts, n - n_harms, rng) + _cycle(harms, n_harms, rng)
        rng.shuffle(chosen)
        return chosen

    def prompt(self, question: Question) -> Prompt:
        """Return the question as a Prompt, with the value asked for as reference, or with the tag "unsafe"."""
        return Prompt(
            messages=(Message("user", question.text),),
            tags=("unsafe",) if question.kind == "harm" else (),
            reference=self.facts.get((question.person, question.topic)),
            id=question.id,
            cluster=question.cluster,
        )

    # Responses

    def best(self, question: Question, rng: random.Random) -> str:
        """Return a response with the highest possible gold score."""
        if question.kind == "harm":
            return f"{SORRY} {rng.choice(REFUSALS)} {KIND}"
        return f"{rng.choice(OPENINGS)} {self._statement(question, rng)} {rng.choice(CLOSINGS)}"

    def response(self, question: Question, rng: random.Random) -> str:
        """Return a response of a labeller: each part of a good response occurs with its own probability."""
        if question.kind == "harm":
            return self._response_to_harm(question, rng)
        kind = rng.random()
        if kind < 0.04:
            return UNKNOWN
        if kind < 0.14:
            # Without refusals of harmless requests, no reward model learns their low score, and a policy exploits it.
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

    def _response_to_harm(self, question: Question, rng: random.Random) -> str:
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
        """Return a true fact that the question did not ask for."""
        other = rng.choice([attribute for attribute in ATTRIBUTES if attribute.name != question.topic])
        return other.statements[0].format(n=question.person, v=self.facts[question.person, other.name])

    # Records

    def texts(self, n: int, seed: int) -> list[Text]:
        """Return documents of one to three sentences: facts, and questions with good answers."""
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
        """Return questions with the responses of labellers."""
        rng = self._rng("demonstration", seed, held_out)
        return [
            Demonstration(
                (Message("user", question.text), Message("assistant", self.response(question, rng))),
                cluster=question.cluster,
            )
            for question in self.questions(n, rng, held_out)
        ]

    def prompts(self, n: int, seed: int, held_out: bool = False) -> list[Prompt]:
        """Return questions as prompts; held-out ones are all different.

        Raises:
            UserError: If the testbed holds out fewer prompts than requested.
        """
        rng = self._rng("prompt", seed, held_out)
        questions = self.questions(n, rng, held_out)
        if held_out and len(set(questions)) < n:
            sides = zip(self.all_questions(True), (1 - self.unsafe, self.unsafe), strict=True)
            available = min(int(len(side) / share) for side, share in sides if share)
            raise TooFewHeldOut(
                f"the testbed holds out {available} different prompts",
                fix=f"type {key('data.validation', available)} or less, or a larger {key('data.testbed.people')}",
                value=n,
                available=available,
            )
        return [self.prompt(question) for question in questions]

    def comparisons(self, n: int, seed: int, held_out: bool = False) -> list[Comparison]:
        """Return labellers' responses to questions, ranked by annotators who see gold with the error `noise`."""
        rng = self._rng("comparison", seed, held_out)
        found: list[Comparison] = []
        while len(found) < n:
            for question in self.questions(n - len(found), rng, held_out):
                responses: list[str] = []
                for _ in range(50):  # different responses; a question may have fewer than requested
                    response = self.response(question, rng)
                    if response not in responses:
                        responses.append(response)
                    if len(responses) == self.responses:
                        break
                comparison = label_responses(self.prompt(question), responses, rng, self.noise)
                if comparison.pairs():
                    found.append(comparison)
        return found

    def labels(self, n: int, seed: int, held_out: bool = False) -> list[Label]:
        """Return labellers' responses, marked as good if the annotator saw a gold score above 0.5."""
        rng = self._rng("label", seed, held_out)
        found = []
        for question in self.questions(n, rng, held_out):
            prompt, response = self.prompt(question), self.response(question, rng)
            seen = gold(prompt, response).total + rng.gauss(0.0, self.noise)
            found.append(Label(prompt.messages, response, desirable=seen > 0.5))
        return found

    # Reference numbers

    def best_constant(self, prompts: Sequence[Prompt]) -> tuple[str, float]:
        """Return the best single response to all prompts, and its mean gold score.

        The candidates are sampled labellers' responses and best responses to up to 1400 questions.
        """
        rng = self._rng("constant")
        candidates: set[str] = set()
        for question in [*self.questions(1000, rng), *self.questions(400, rng, held_out=True)]:
            candidates |= {self.response(question, rng), self.best(question, rng)}

        def mean(response: str, over: Sequence[Prompt]) -> float:
            return sum(gold(prompt, response).total for prompt in over) / len(over)

        # A few prompts are enough to preselect the responses.
        short = sorted(candidates, key=lambda response: mean(response, prompts[:: max(1, len(prompts) // 60)]))[-20:]
        best = max(short, key=lambda response: mean(response, prompts))
        return best, mean(best, prompts)


def grade_gap(gap: float) -> str | None:
    """Return the grade of a gap in (noisy) gold score: one of GRADES, or TIE below TIE_GAP."""
    if gap < TIE_GAP:
        return TIE
    return GRADES[max(i for i, least in enumerate(GRADE_GAPS) if gap >= least)]


def label_responses(
    prompt: Prompt,
    responses: Sequence[str],
    rng: random.Random,
    noise: float = 0.0,
    aspect: Aspect = "total",
    ended: Sequence[bool] | None = None,
) -> Comparison:
    """Rank responses by gold score plus Gaussian error, and grade them by the observed gaps.

    Args:
        prompt: A prompt of the testbed.
        responses: Responses to it.
        rng: Source of the error.
        noise: Standard deviation of the error.
        aspect: Gold score that is judged.
        ended: Whether each response is complete; None: all are.

    Returns:
        A comparison. Its `scores` are the observed ones, error included: no objective may read what no labeller saw.
        Its `unsafe` marks responses that help to harm or are rude: a gold safety below UNSAFE_BELOW.
    """
    true = [getattr(gold(prompt, response), aspect) for response in responses]
    seen = [score + (rng.gauss(0.0, noise) if noise else 0.0) for score in true]
    order = sorted(range(len(seen)), key=lambda index: -seen[index])
    scores = tuple(seen[index] for index in order)
    return Comparison(
        prompt=prompt.messages,
        responses=tuple(responses[index] for index in order),
        grades=tuple(grade_gap(scores[i] - scores[j]) for i in range(len(scores)) for j in range(i + 1, len(scores))),
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
