"""Language-model annotator (RLAIF), which judges pairs of responses; see docs/rlaif.md."""

import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from rlhf.annotator.base import Annotator
from rlhf.annotator.judge_text import fill, parse, read_template
from rlhf.data.collate import collate_prompts
from rlhf.data.encoding import encode_prompt
from rlhf.data.records import GRADES, TIE, Comparison, Message, Prompt
from rlhf.data.rendering import tokenize
from rlhf.data.sources import digest_files
from rlhf.errors import UserError, key
from rlhf.models.adapters import NoAdapter
from rlhf.models.causal_lm import CausalLM
from rlhf.models.language_model import LanguageModel
from rlhf.models.precision import Precision
from rlhf.sampler.ancestral import AncestralSampler
from rlhf.sampler.rollout import Rollout

OPTIONS = ("A", "B")
READING = 3  # version of the reading of answers; increase it on a change, to invalidate cached answers
FEW = 20  # answers before the share of unreadable answers is meaningful

# Log-odds of the response shown first against the other (None: unreadable), and the text that the judge generated.
Answer = tuple[float | None, str]


class JudgeAnnotator(Annotator):
    """Annotator that asks a causal language model which of two different responses is better, for every pair.

    Each pair is shown in both orders. A response wins if it is preferred in both. If the judge prefers a *position* (or
    its answer is unreadable), the pair is a tie and makes no training pair. Responses are ranked by the mean of their
    log-odds over their pairs, which solves the pairwise log-odds in the least-squares sense; a verdict that contradicts
    this ranking (a cycle A over B over C over A) is a tie too. Lee et al. 2023 (arXiv 2309.00267) also ask both orders,
    and average.

    Args:
        path: Run directory, model directory or hub id of the judge.
        template: Question template: a name, or a text file with {prompt}, {first} and {second}.
        answer: Read the verdict from the probabilities of the next token (``logprobs``), or from greedily generated
            text (``generate``).
        both_orders: Whether each pair is asked twice, with the responses exchanged.
        thresholds: Smallest log-odds of slightly better, better and significantly better (with ``logprobs``).
        least_mass: An answer is unreadable where A and B together have less probability (with ``logprobs``).
        max_unreadable: Share of unreadable answers above which the run stops.
        max_new_tokens: Longest generated answer, tokens (with ``generate``).
        batch_size: Questions per batch; bounds memory.
        dtype: Dtype of the weights.
        cache: Cache answers in OUTPUTS/judge, so that no question is asked twice.
    """

    def __init__(
        self,
        path: str,
        template: str = "instruction",
        answer: Literal["logprobs", "generate"] = "logprobs",
        both_orders: bool = True,
        thresholds: tuple[float, float, float] = (0.5, 1.0, 2.0),
        least_mass: Annotated[float, Field(ge=0, le=1)] = 0.1,
        max_unreadable: Annotated[float, Field(ge=0, le=1)] = 0.1,
        max_new_tokens: Annotated[int, Field(gt=0)] = 16,
        batch_size: Annotated[int, Field(gt=0)] = 64,
        dtype: Literal["float32", "bfloat16"] = "float32",
        cache: bool = True,
    ) -> None:
        self.path, self.template, self.answer, self.both_orders = (
            path,
            self.check_hyperparameters(template),
            answer,
            both_orders,
        )
        self.thresholds, self.least_mass, self.max_unreadable = tuple(thresholds), least_mass, max_unreadable
        self.max_new_tokens, self.batch_size, self.cache = max_new_tokens, batch_size, cache
        spec = CausalLM(path=path, architecture=None, vocab_size=None)
        precision = Precision("32-true" if dtype == "float32" else "bf16-true")
        self.model: LanguageModel = spec.load(NoAdapter(), precision).disable_dropout().frozen()
        self.identity = _identity(spec, self.model, dtype)
        if self.model.tokenizer.chat_template:
            self.option_ids = [tokenize(self.model.tokenizer, option)[0] for option in OPTIONS]
        else:
            self.option_ids = encode_completion_question(self.model.tokenizer, "A or B?")[1]
        self.spellings = [
            sorted({first, *spellings(self.model.tokenizer, option)})
            for first, option in zip(self.option_ids, OPTIONS, strict=False)
        ]
        if len(set(self.option_ids)) < 2:
            raise UserError(
                "its tokenizer encodes the answers A and B alike",
                fix="type the path of another judge",
                option="annotator.path",
                value=path,
            )
        if answer == "generate" and not self.model.tokenizer.chat_template:
            raise UserError(
                "has no chat template, which generated answers need",
                fix=f"type {key('annotator.answer', 'logprobs')}",
                option="annotator.path",
                value=path,
            )
        self.known: dict[str, Answer] = {}
        self.file: Path | None = None
        self.counts: Counter[str] = Counter()  # of the last call
        self._asked, self._unreadable, self._example = 0, 0, ""

    @staticmethod
    def check_hyperparameters(template: str = "instruction", **_: Any) -> str:
        """Return the template's text, before the judge is loaded.

        Raises:
            UserError: As ``read_template``.
        """
        return read_template(template, "annotator.template")

    def to(self, device: torch.device) -> None:
        """Move the weights to ``device``."""
        self.model.to(device)

    def open(self, folder: Path) -> None:
        """Load the cached answers in ``folder``, and append new answers there."""
        if not self.cache:
            return
        self.file = folder / f"{self.identity[:16]}.jsonl"
        if self.file.exists():
            for line in self.file.read_text(encoding="utf-8").splitlines():
                try:
                    row = json.loads(line)
                    self.known[row["question"]] = (row["answer"], row["said"])
                except (json.JSONDecodeError, KeyError, TypeError):
                    continue  # a line truncated by a kill

    def __call__(self, rollout: Rollout, samples: int, seed: int) -> list[Comparison]:
        """Return one graded comparison per prompt; omit prompts without any preference."""
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
        """Return the log-odds of the first response of a pair and whether it is decided; update the counts."""
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
        """Return the responses of one prompt as a comparison, best first."""

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
        """Return the grade of a preference with these log-odds; None for generated answers."""
        if self.answer == "generate":
            return None
        return GRADES[sum(odds >= threshold for threshold in self.thresholds)]

    def rates(self, counts: Counter[str]) -> dict[str, float]:
        """Return rates for a run's summary from the counts of the whole run."""
        pairs, read = max(1, counts["pairs"]), max(1, counts["first"] + counts["second"])
        asked = max(1, counts["first"] + counts["second"] + counts["unreadable"] + counts["undecided"])
        return {
            "judge/pairs": counts["pairs"],
            "judge/ties": counts["ties"] / pairs,
            "judge/position_bias": counts["same_place"] / pairs,
            "judge/first_choice": counts["first"] / read,
            "judge/unreadable": counts["unreadable"] / asked,
            "judge/intransitive": counts["intransitive"] / pairs,
        }

    # -- questions --------------------------------------------------------------------------------------------------

    def ask(self, questions: Sequence[str], advance: Callable[[int], None] | None = None) -> list[Answer]:
        """Return the judge's answers to filled templates, in order, from the cache where possible.

        Args:
            questions: Filled templates.
            advance: Progress callback; receives the number of questions answered since the last call.

        Raises:
            UserError: If too many of the answers are unreadable.
        """
        advance = advance or (lambda _: None)
        names = [self._key(question) for question in questions]
        new = {name: question for name, question in zip(names, questions, strict=True) if name not in self.known}
        advance(len(names) - len(new))
        for part in _parts(sorted(new, key=lambda name: len(new[name])), self.batch_size):  # length-grouped
            answers = self._answers([new[name] for name in part])
            self.known.update(zip(part, answers, strict=True))
            self._keep(part)
            advance(len(part))
        found = [self.known[name] for name in names]
        unreadable = [text for value, text in found if value is None]
        self._asked, self._unreadable = self._asked + len(found), self._unreadable + len(unreadable)
        self._example = self._example or (unreadable[0] if unreadable else "")
        if self._asked >= FEW and self._unreadable > self.max_unreadable * self._asked:
            raise UserError(
                f"{self._unreadable} of {self._asked} answers are neither A nor B, for example {self._example!r}, and "
                f"{key('annotator.max_unreadable', self.max_unreadable)} allows "
                f"{int(self.max_unreadable * self._asked)}",
                fix=f"type the path of another judge, or another {key('annotator.template')}",
                option="annotator.path",
                value=self.path,
            )
        return found

    def _key(self, question: str) -> str:
        """Return the name under which the answer to a question is cached."""
        limit = self.least_mass if self.answer == "logprobs" else self.max_new_tokens
        how = [self.identity, self.answer, limit, question]
        return hashlib.sha256(json.dumps(how).encode()).hexdigest()

    def _keep(self, names: Sequence[str]) -> None:
        if self.file is None:
            return
        rows = [{"question": name, "answer": self.known[name][0], "said": self.known[name][1]} for name in names]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(self.file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        try:  # one append per batch, because several runs may write to the file at once
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
            encoded = [encode_completion_question(tokenizer, question)[0] for question in questions]
        answers: list[Answer] = [(None, f"(nothing: the question has more than {room} tokens)")] * len(questions)
        fitting = [index for index, ids in enumerate(encoded) if len(ids) <= room]
        if not fitting:
            return answers
        if self.answer == "generate":
            sampler = AncestralSampler(max_new_tokens=self.max_new_tokens, temperature=0.0)
            texts = sampler.sample(self.model, [Prompt(dialogues[index]) for index in fitting], seed=0).texts
            read: list[Answer] = [(parse(text), text) for text in texts]
        else:
            read = self._next_tokens([encoded[index] for index in fitting])
        for index, answer in zip(fitting, read, strict=True):
            answers[index] = answer
        return answers

    @torch.no_grad()
    def _next_tokens(self, encoded: list[list[int]]) -> list[Answer]:
        """Return the log-odds of A against B as the next token, each summed over its spellings."""
        batch = collate_prompts(encoded, self.model.pad_id).to(self.model.device)
        hidden = self.model.hidden(batch)[:, -1]
        logp = self.model.head(hidden).float().log_softmax(dim=-1)
        first, second = (logp[:, ids].logsumexp(dim=-1).tolist() for ids in self.spellings)
        likeliest = logp.argmax(dim=-1).tolist()
        answers: list[Answer] = []
        for one, two, token in zip(first, second, likeliest, strict=True):
            readable = math.exp(one) + math.exp(two) >= self.least_mass
            answers.append((one - two if readable else None, self.model.tokenizer.decode([token])))
        return answers


def encode_completion_question(tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
    r"""Return a question for a model without chat template: prompt ids, and the next id of each option.

    The text is "QUESTION\nAnswer: A". The prompt ends where the token ids of the two options diverge, because
    tokenizers differ in where they put the space: byte-level BPE mostly has a token " A", so that no text would
    continue a prompt that ends in a space. The second list is empty if the ids do not diverge.
    """
    one, two = (tokenize(tokenizer, f"{question}\nAnswer: {option}") for option in OPTIONS)
    parted = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    return (one, []) if parted is None else (one[:parted], [one[parted], two[parted]])


def spellings(tokenizer: Any, option: str) -> list[int]:
    """Return the ids of the single tokens that spell an option, with or without preceding white space."""
    return sorted(
        index
        for token, index in tokenizer.get_vocab().items()
        if token.endswith(option) and tokenizer.decode([index]).strip() == option
    )


def _identity(spec: CausalLM, model: LanguageModel, dtype: str) -> str:
    """Return the identity of a judge: content of its directory, or hub id and commit, with dtype and question form."""
    folder = Path(spec.folder or "")
    if folder.is_dir():
        name = digest_files(sorted([*folder.glob("*.safetensors"), *folder.glob("*.json"), *folder.glob("*.jinja")]))
    else:
        name = f"{spec.path}@{getattr(model.config, '_commit_hash', None)}"
    asked = "" if model.tokenizer.chat_template else "/Answer:"  # form of the question, on which the answers depend
    return hashlib.sha256(f"{name}/{dtype}{asked}/{READING}".encode()).hexdigest()


def _parts(items: list[str], size: int) -> list[list[str]]:
    return [items[i : i + size] for i in range(0, len(items), size)]
