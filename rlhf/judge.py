"""A language model as annotator (RLAIF), and demonstrations that teach one to judge. docs/rlaif.md tells the whole."""

import hashlib
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from rlhf.data.collate import collate_prompts
from rlhf.data.data import Data, Split
from rlhf.data.records import GRADES, TIE, Comparison, Demonstration, Message, Prompt
from rlhf.data.sources import digest_files
from rlhf.data.template import encode_prompt, tokenize
from rlhf.errors import UserError
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.rollout import Rollout, Sampler

TEMPLATES = {
    "short": "{prompt}\nA: {first}\nB: {second}",
    "instruction": (
        "Two assistants replied to a message. Which reply is better? Prefer the one that is correct, does what was "
        "asked, is harmless and wastes no words. Ignore the order in which they are shown.\n\n"
        "Message:\n{prompt}\n\nReply A:\n{first}\n\nReply B:\n{second}\n\n"
        "Answer with one letter, A or B, and nothing else."
    ),
}
"""Templates by name; any text file with the same three fields will do as well."""

OPTIONS = ("A", "B")
READING = 3  # how answers are read; a change counts it up, so that kept ones of before are asked for again
FEW = 20  # answers before their share of nonsense says anything

Answer = tuple[float | None, str]
"""Log-odds of the reply shown first against the other (None: nonsense), and what was said."""


def read_template(template: str, key: str) -> str:
    """A template by name or from a text file, as typed for ``key``.

    Raises UserError where there is none, or where it lacks a field.
    """
    text = TEMPLATES.get(template)
    if text is None:
        # A path must look like one: a run's fingerprint hashes the content of what looks like a path.
        if "/" not in template or not Path(template).expanduser().is_file():
            raise UserError(
                f"{key}={template}: no such template; type one of {', '.join(TEMPLATES)}, or a text file with "
                "a slash in it, such as ./judge.txt"
            )
        text = Path(template).expanduser().read_text(encoding="utf-8")
    missing = [field for field in ("{prompt}", "{first}", "{second}") if field not in text]
    if missing:
        raise UserError(
            f"{key}={template}: lacks {' and '.join(missing)}; it must show {{prompt}}, {{first}}, {{second}}"
        )
    return text


def fill(template: str, prompt: Sequence[Message], first: str, second: str) -> str:
    """A template with a dialogue and two replies in it; braces in those stay as they are."""
    asked = prompt[0].content if len(prompt) == 1 else "\n".join(f"{turn.role}: {turn.content}" for turn in prompt)
    values = {"prompt": asked, "first": first, "second": second}
    return re.sub(r"\{(prompt|first|second)\}", lambda match: values[match[1]], template)


# The article: at the head of a sentence, and not followed by what an option named A would do there.
_ARTICLE = re.compile(
    r"(?:^|[.!?:;\n\"(])\s*(A) (?:[a-z]+ly )*+"
    r"(?!(?:is|was|has|had|does|did|will|would|can|could|should|may|might|and|or|over|than|because|since|as|but|by|in|"
    r"with|on|to|for)\b|(?:better|more)(?: than\b|\W*$)|[a-z]+(?:[^su]s|ed)\b)[a-z]"
)
_BETTER = re.compile(
    r"\b([AB])\b((?:(?!\b[AB]\b)[^.;])*?)\b(?:better|best|wins|stronger|superior|preferable|preferred)\b"
)
_WORSE = re.compile(r"\b([AB])\b((?:(?!\b[AB]\b)[^.;])*?)\b(?:worse|worst|loses|weaker|inferior)\b")
_OVER = re.compile(
    r"\b(?:prefer|choose|chose|pick)\w* (?:\w+ )?([AB])\b|\b([AB])\b (?:over|beats|outperforms) (?:\w+ )?[AB]\b|"
    r"\b([AB]) ?> ?[AB]\b|\b[AB] ?< ?([AB])\b|"
    r"(?i:\b(?:answer|verdict|choice|winner)\b\W*(?:is\b\W*)?(?:(?:reply|response|option)\W*)?)"
    r"\b([AB])\b(?! (?:and|or)\b)"
)
_NEGATED = re.compile(r"\b(?:not|never|neither|nor|no)\b|n't\b", re.IGNORECASE)
_TIE = re.compile(r"\b(?:tie|tied|draw|equal|equally|toss-up|neither)\b", re.IGNORECASE)


def parse(text: str) -> float | None:
    """Return what a written answer says: 1 for A, -1 for B, 0 for a tie, None for nonsense.

    The last [[A]], [[B]] or [[C]] counts; else the option that is called better, or the other one is called worse; else
    the only option that is named; else a word for a tie. An "A" that is an article ("A close call") names no option.
    """
    marked = re.findall(r"\[\[(A|B|C)\]\]", text)
    if marked:
        return {"A": 1.0, "B": -1.0, "C": 0.0}[marked[-1]]
    if text.strip(" \n*.()") in ("a", "b"):
        text = text.upper()
    text = _ARTICLE.sub(lambda match: match[0].replace("A", "a", 1), text)
    named = set(re.findall(r"\b[AB]\b", text))
    if len(named) < 2 or not _TIE.search(text):
        winners = {match[1] for match in _BETTER.finditer(text) if not _NEGATED.search(match[2])}
        winners |= {"AB"[match[1] == "A"] for match in _WORSE.finditer(text) if not _NEGATED.search(match[2])}
        winners |= {next(filter(None, match.groups())) for match in _OVER.finditer(text)}
        if len(winners) == 1:
            return 1.0 if winners == {"A"} else -1.0
        if len(named) == 1 and not winners:
            return None if _NEGATED.search(text) else 1.0 if named == {"A"} else -1.0
    tied = bool(_TIE.search(text)) and not re.search(r"\b(?:not|no|n't) (?:a )?(?:tie|draw|equal)", text, re.IGNORECASE)
    return 0.0 if tied and len(named) != 1 else None


class JudgeAnnotator:
    """Asks a causal language model which of two replies is better, for every pair of different replies.

    Each pair is shown in both orders. A reply wins if it is preferred in both; if the judge prefers a *place* (or says
    nothing that can be read), the pair is a tie and makes no training pair. Replies are ranked by the mean of their
    log-odds over their pairs, which solves the pairwise log-odds in the least-squares sense; a verdict that contradicts
    this ranking (A over B over C over A) is a tie too. Lee et al. 2023 (arXiv 2309.00267) ask both orders as well, and
    average.

    Args:
        path: Run folder, model folder or hub id of the judge.
        template: How a question is put: the name of a template, or a text file with {prompt}, {first} and {second}.
        answer: Read the verdict from the probabilities of the next token (``logprobs``), or from greedily written text.
        both_orders: Whether each pair is asked twice, with the replies exchanged.
        thresholds: Smallest log-odds that are slightly better, better and significantly better (with ``logprobs``).
        least_mass: An answer is nonsense where A and B together have less probability (with ``logprobs``).
        max_nonsense: Share of nonsense answers above which the run stops.
        max_new_tokens: Longest written answer, tokens (with ``generate``).
        batch_size: Questions asked at a time; bounds memory.
        dtype: Number format of the weights.
        cache: Keep answers in OUTPUTS/judge, so that no question is asked twice.
    """

    def __init__(
        self,
        path: str,
        template: str = "instruction",
        answer: Literal["logprobs", "generate"] = "logprobs",
        both_orders: bool = True,
        thresholds: tuple[float, float, float] = (0.5, 1.0, 2.0),
        least_mass: Annotated[float, Field(ge=0, le=1)] = 0.1,
        max_nonsense: Annotated[float, Field(ge=0, le=1)] = 0.1,
        max_new_tokens: Annotated[int, Field(gt=0)] = 16,
        batch_size: Annotated[int, Field(gt=0)] = 64,
        dtype: Literal["float32", "bfloat16"] = "float32",
        cache: bool = True,
    ) -> None:
        self.path, self.template, self.answer, self.both_orders = path, self.check_knobs(template), answer, both_orders
        self.thresholds, self.least_mass, self.max_nonsense = tuple(thresholds), least_mass, max_nonsense
        self.max_new_tokens, self.batch_size, self.cache = max_new_tokens, batch_size, cache
        spec = CausalLM(path=path, architecture=None, vocab_size=None)
        precision = Precision("32-true" if dtype == "float32" else "bf16-true")
        self.model: LanguageModel = spec.load(NoAdapter(), precision).disable_dropout().frozen()
        self.identity = _identity(spec, self.model, dtype)
        if self.model.tokenizer.chat_template:
            self.option_ids = [tokenize(self.model.tokenizer, option)[0] for option in OPTIONS]
        else:
            self.option_ids = continued(self.model.tokenizer, "A or B?")[1]
        self.spellings = [
            sorted({first, *spellings(self.model.tokenizer, option)})
            for first, option in zip(self.option_ids, OPTIONS, strict=False)
        ]
        if len(set(self.option_ids)) < 2:
            raise UserError(f"annotator.path={path}: its tokenizer does not tell A from B; give another judge")
        if answer == "generate" and not self.model.tokenizer.chat_template:
            raise UserError(
                f"annotator.path={path}: has no chat template to write with; type annotator.answer=logprobs"
            )
        self.known: dict[str, Answer] = {}
        self.file: Path | None = None
        self.counts: Counter[str] = Counter()  # of the last call
        self._asked, self._nonsense, self._example = 0, 0, ""

    @staticmethod
    def check_knobs(template: str = "instruction", **_: Any) -> str:
        """The template's text. Raises UserError as ``read_template`` does, before the judge is loaded."""
        return read_template(template, "annotator.template")

    def to(self, device: torch.device) -> "JudgeAnnotator":
        """Moves the weights."""
        self.model.to(device)
        return self

    def open(self, folder: Path) -> None:
        """Reads the answers that are kept in ``folder``, and keeps new ones there."""
        if not self.cache:
            return
        self.file = folder / f"{self.identity[:16]}.jsonl"
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self.known[row["question"]] = (row["answer"], row["said"])
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line that a kill cut short

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """One graded comparison a prompt; prompts without any preference are left out."""
        self.counts = Counter()
        groups = range(0, len(rollout.texts), samples)
        duels = [
            (start, i, j)
            for start in groups
            for i in range(samples)
            for j in range(i + 1, samples)
            if rollout.texts[start + i] != rollout.texts[start + j]
        ]
        questions: list[str] = []
        for start, i, j in duels:
            prompt, one, two = rollout.prompts[start].messages, rollout.texts[start + i], rollout.texts[start + j]
            questions.append(fill(self.template, prompt, one, two))
            if self.both_orders:
                questions.append(fill(self.template, prompt, two, one))
        answers = iter(self.ask(questions))
        odds: dict[tuple[int, int], float] = {}
        won: dict[tuple[int, int], bool] = {}
        for start, i, j in duels:
            shown = [next(answers)[0] for _ in range(1 + self.both_orders)]
            odds[start + i, start + j], won[start + i, start + j] = self._verdict(shown)
        made = [self._ranking(rollout, start, samples, odds, won) for start in groups]
        return [comparison for comparison in made if comparison.pairs()]

    def _verdict(self, shown: list[float | None]) -> tuple[float, bool]:
        """Log-odds for the first reply of a pair, and whether there is a verdict; counts what happened."""
        self.counts["pairs"] += 1
        self.counts["first"] += sum(value is not None and value > 0 for value in shown)
        self.counts["second"] += sum(value is not None and value < 0 for value in shown)
        self.counts["unreadable"] += sum(value is None for value in shown)
        self.counts["undecided"] += sum(value == 0 for value in shown)
        values = [value for value in shown if value is not None]
        same_place = len(values) == 2 and values[0] * values[1] > 0
        self.counts["same_place"] += same_place
        if len(shown) == 2:
            signed = [sign * value for sign, value in zip((1, -1), shown, strict=True) if value is not None]
        else:
            signed = values
        decided = len(signed) == len(shown) and (all(v > 0 for v in signed) or all(v < 0 for v in signed))
        self.counts["ties"] += not decided
        return (sum(signed) / len(signed) if signed else 0.0), decided

    def _ranking(
        self,
        rollout: Rollout,
        start: int,
        samples: int,
        odds: dict[tuple[int, int], float],
        won: dict[tuple[int, int], bool],
    ) -> Comparison:
        """The replies of one prompt, best first."""

        def between(a: int, b: int) -> float:
            return odds[a, b] if (a, b) in odds else -odds[b, a] if (b, a) in odds else 0.0

        rows = range(start, start + samples)
        score = {row: sum(between(row, other) for other in rows) / samples for row in rows}
        ranked = sorted(rows, key=lambda row: -score[row])
        grades: list[str | None] = []
        for position, a in enumerate(ranked):
            for b in ranked[position + 1 :]:
                decided = won.get((a, b), won.get((b, a), False))
                gap = between(a, b)
                if decided and gap < 0:
                    self.counts["intransitive"] += 1
                grades.append(self.grade(gap) if decided and gap > 0 else TIE)
        return Comparison(
            prompt=rollout.prompts[start].messages,
            responses=tuple(rollout.texts[row] for row in ranked),
            grades=tuple(grades),
            scores=tuple(score[row] for row in ranked),
            tags=rollout.prompts[start].tags,
            ended=tuple(rollout.ended[ranked].tolist()),
        )

    def grade(self, odds: float) -> str | None:
        """The grade of a preference with these log-odds; a written answer has none."""
        if self.answer == "generate":
            return None
        return GRADES[sum(odds >= threshold for threshold in self.thresholds)]

    @staticmethod
    def rates(counts: Counter[str]) -> dict[str, float]:
        """What the counts of a whole run say, for its summary."""
        pairs, read = max(1, counts["pairs"]), max(1, counts["first"] + counts["second"])
        asked = max(1, counts["first"] + counts["second"] + counts["unreadable"] + counts["undecided"])
        return {
            "judge/pairs": counts["pairs"],
            "judge/ties": counts["ties"] / pairs,
            "judge/position_bias": counts["same_place"] / pairs,
            "judge/first_choice": counts["first"] / read,
            "judge/nonsense": counts["unreadable"] / asked,
            "judge/intransitive": counts["intransitive"] / pairs,
        }

    # -- asking -----------------------------------------------------------------------------------------------------

    def ask(self, questions: Sequence[str], told: Callable[[int], None] | None = None) -> list[Answer]:
        """Answers to filled templates, in order; from the cache where they are known.

        ``told`` hears how many more are answered. Raises UserError once too many of them are nonsense.
        """
        told = told or (lambda _: None)
        keys = [self._key(question) for question in questions]
        new = {key: question for key, question in zip(keys, questions, strict=True) if key not in self.known}
        told(len(keys) - len(new))
        for part in _parts(sorted(new, key=lambda key: len(new[key])), self.batch_size):  # like lengths, little padding
            answers = self._answers([new[key] for key in part])
            self.known.update(zip(part, answers, strict=True))
            self._keep(part)
            told(len(part))
        found = [self.known[key] for key in keys]
        nonsense = [said for value, said in found if value is None]
        self._asked, self._nonsense = self._asked + len(found), self._nonsense + len(nonsense)
        self._example = self._example or (nonsense[0] if nonsense else "")
        if self._asked >= FEW and self._nonsense > self.max_nonsense * self._asked:
            raise UserError(
                f"annotator.path={self.path}: {self._nonsense} of {self._asked} answers are neither A nor B (one says "
                f"{self._example!r}; annotator.max_nonsense={self.max_nonsense} allows "
                f"{int(self.max_nonsense * self._asked)}): give a model that can judge, or another annotator.template"
            )
        return found

    def _key(self, question: str) -> str:
        limit = self.least_mass if self.answer == "logprobs" else self.max_new_tokens
        how = [self.identity, self.answer, limit, question]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()

    def _keep(self, keys: Sequence[str]) -> None:
        if self.file is None:
            return
        rows = [{"question": key, "answer": self.known[key][0], "said": self.known[key][1]} for key in keys]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:  # one write to the end of the file: several runs may keep their answers at once
            os.write(handle, text.encode())
        finally:
            os.close(handle)

    def _answers(self, questions: list[str]) -> list[Answer]:
        tokenizer = self.model.tokenizer
        dialogues = [(Message("user", question),) for question in questions]
        room = self.model.context_length - (self.max_new_tokens if self.answer == "generate" else 1)
        if tokenizer.chat_template:
            encoded = [encode_prompt(tokenizer, dialogue) for dialogue in dialogues]
        else:
            encoded = [continued(tokenizer, question)[0] for question in questions]
        answers: list[Answer] = [(None, f"(nothing: the question has more than {room} tokens)")] * len(questions)
        fitting = [index for index, ids in enumerate(encoded) if len(ids) <= room]
        if not fitting:
            return answers
        if self.answer == "generate":
            sampler = Sampler(max_new_tokens=self.max_new_tokens, temperature=0.0)
            texts = sampler.sample(self.model, [Prompt(dialogues[index]) for index in fitting], seed=0).texts
            read: list[Answer] = [(parse(text), text) for text in texts]
        else:
            read = self._next_tokens([encoded[index] for index in fitting])
        for index, answer in zip(fitting, read, strict=True):
            answers[index] = answer
        return answers

    @torch.no_grad()
    def _next_tokens(self, encoded: list[list[int]]) -> list[Answer]:
        """Return the log-odds of A against B as the next token, each in all its spellings."""
        batch = collate_prompts(encoded, self.model.pad_id).to(self.model.device)
        hidden = self.model.hidden(batch.ids, batch.attention_mask, batch.position_ids)[:, -1]
        logp = self.model.head(hidden).float().log_softmax(dim=-1)
        first, second = (logp[:, ids].logsumexp(dim=-1).tolist() for ids in self.spellings)
        likeliest = logp.argmax(dim=-1).tolist()
        answers: list[Answer] = []
        for one, two, token in zip(first, second, likeliest, strict=True):
            readable = math.exp(one) + math.exp(two) >= self.least_mass
            answers.append((one - two if readable else None, self.model.tokenizer.decode([token])))
        return answers


def continued(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    """A question for a model without chat template: its ids up to where the answers part, and the answers' next ids.

    The text is "QUESTION\\nAnswer: A". Where the space goes is the tokenizer's affair: byte-level BPE mostly has a
    token " A", so that a question that ended in a space would ask for what no text goes on with.
    """
    one, two = (tokenize(tokenizer, f"{question}\nAnswer: {option}") for option in OPTIONS)
    parted = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return (one, []) if parted is None else (one[:parted], [one[parted], two[parted]])


def spellings(tokenizer: Any, option: str) -> list[int]:
    """Return the ids of the single tokens that spell an option, with or without white space before it."""
    return sorted(
        index
        for token, index in tokenizer.get_vocab().items()
        if token.endswith(option) and tokenizer.decode([index]).strip() == option
    )


class Judgements(Data):
    """Comparisons as demonstrations of judging: each pair as a question in both orders, its answer A or B.

    A model fine-tuned on these (``stage=sft data=judgements``) is a judge for the same template.

    Args:
        comparisons: Where the preferences come from.
        template: How a question is put, as for the judge.
    """

    def __init__(self, comparisons: Data, template: str = "short") -> None:
        super().__init__(
            record="demonstration",
            source=comparisons.source,
            size=None,
            validation=0,
            max_length=comparisons.max_length,
            seed=comparisons.seed,
        )
        self.comparisons, self.name, self.template = comparisons, template, self.check_knobs(template)

    @staticmethod
    def check_knobs(template: str = "short", **_: Any) -> str:  # type: ignore[override]
        """The template's text. Raises UserError as ``read_template`` does; the comparisons are a node of their own."""
        return read_template(template, "data.template")

    def digest(self) -> str:
        """sha256 over the comparisons' digest and the template."""
        return hashlib.sha256(f"{self.comparisons.digest()}/{self.template}".encode()).hexdigest()

    def load(self) -> Split:
        """Two demonstrations for every pair of the comparisons; the held-out ones stay held out."""
        split = self.comparisons.load()
        train, validation = self._questions(split.train), self._questions(split.validation)
        report = replace(split.report, source=self.source, train=len(train), validation=len(validation))
        return Split(train, validation, report, self)

    def _questions(self, comparisons: Sequence[Any]) -> list[Demonstration]:
        made = []
        for comparison in comparisons:
            if not isinstance(comparison, Comparison):
                raise UserError(f"data.comparisons holds {comparison.name}s; type data@data.comparisons=comparisons")
            for better, worse, _ in comparison.pairs():
                one, two = comparison.responses[better], comparison.responses[worse]
                for first, second, answer in ((one, two, OPTIONS[0]), (two, one, OPTIONS[1])):
                    question = fill(self.template, comparison.prompt, first, second)
                    made.append(Demonstration((Message("user", question), Message("assistant", answer))))
        return made


def _identity(spec: CausalLM, model: LanguageModel, dtype: str) -> str:
    """What names a judge: the content of its folder, or its hub id at one commit; and its number format."""
    folder = Path(spec.folder or "")
    if folder.is_dir():
        name = digest_files(sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]))
    else:
        name = f"{spec.path}@{getattr(model.config, '_commit_hash', None)}"
    asked = "" if model.tokenizer.chat_template else "/Answer:"  # how it is asked; part of what its answers hang on
    return hashlib.sha256(f"{name}/{dtype}{asked}/{READING}".encode()).hexdigest()


def _parts(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
