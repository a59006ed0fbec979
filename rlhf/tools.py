"""Rollouts of several turns in which the policy may call tools.

A turn of the policy that ends with ``<call>TOOL(ARGUMENT)</call>`` (rlhf.data.calls) is answered: the tool's answer is
put into the context as a turn of its own, and the policy goes on. The answer's tokens are attended to and nothing else:
they have no log-probability, no KL, no loss, since the policy did not choose them.
"""

import ast
import operator
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.calls import Call, read_call
from rlhf.data.collate import collate_prompts
from rlhf.data.records import Message, Prompt
from rlhf.data.specials import with_strays
from rlhf.data.template import encode_tool_turn, tokenize_text
from rlhf.data.testbed.language import BY_NAME
from rlhf.data.testbed.world import Testbed
from rlhf.errors import UserError
from rlhf.models.language_model import LanguageModel
from rlhf.rollout import Rollout, Sampler, _until_end


class Tool(Protocol):
    """What a tool is: text in, text out; ValueError, whose message the policy reads, for what it cannot answer.

    The argument comes from a policy that writes anything at all: parse it, never execute it, and never repeat it in the
    answer, where it could write the template's special tokens.
    """

    def __call__(self, argument: str) -> str:
        """The answer."""
        ...


class Calculator:
    """Exact arithmetic: + - * / // %, parentheses and decimals. Nothing is executed: the syntax tree is walked.

    Args:
        max_characters: Longest expression that is read.
    """

    _OPERATORS: dict[type, Callable[..., Fraction]] = {
        ast.Add: operator.add,
        ast.Sub: operator.sub,
        ast.Mult: operator.mul,
        ast.Div: operator.truediv,
        ast.FloorDiv: lambda a, b: Fraction(a // b),
        ast.Mod: operator.mod,
        ast.UAdd: operator.pos,
        ast.USub: operator.neg,
    }

    def __init__(self, max_characters: Annotated[int, Field(gt=0, le=200)] = 80) -> None:
        self.max_characters = max_characters

    def __call__(self, argument: str) -> str:
        """The value: exact where it is whole, else six significant digits."""
        if len(argument) > self.max_characters:
            raise ValueError("too long")
        expression = re.sub(r"(?<=\d),(?=\d{3}\b)", "", argument).translate(str.maketrans("×÷−", "*/-"))
        try:
            value = self._value(ast.parse(expression.strip(), mode="eval").body)
            return str(value.numerator) if value.denominator == 1 else f"{float(value):.6g}"
        except ZeroDivisionError:
            raise ValueError("division by zero") from None
        except (SyntaxError, TypeError, KeyError, OverflowError, RecursionError, MemoryError, ValueError):
            raise ValueError("not arithmetic") from None

    def _value(self, node: ast.AST) -> Fraction:
        if isinstance(node, ast.Constant) and type(node.value) in (int, float):
            return Fraction(repr(node.value))
        if isinstance(node, ast.BinOp):
            return self._OPERATORS[type(node.op)](self._value(node.left), self._value(node.right))
        if isinstance(node, ast.UnaryOp):
            return self._OPERATORS[type(node.op)](self._value(node.operand))
        raise ValueError


class Search:
    """Facts of the testbed's world by their words: ``search(Mia home)`` gives "Mia lives in Rome.".

    Args:
        testbed: The world; the same as the data's.
        results: Most facts in an answer; those with the most words of the query, in the order of the world.
    """

    def __init__(self, testbed: Testbed | None = None, results: Annotated[int, Field(gt=0)] = 1) -> None:
        self.results = results
        self.facts = []
        for (person, topic), value in (testbed or Testbed()).facts.items():
            statement = BY_NAME[topic].statements[0].format(n=person, v=value)
            self.facts.append((statement, {word.lower() for word in re.findall(r"\w+", f"{statement} {topic}")}))

    def __call__(self, argument: str) -> str:
        """The facts found, or "nothing found"."""
        query = {word.lower() for word in re.findall(r"\w+", argument)}
        scored = [(len(query & words), statement) for statement, words in self.facts]
        best = max(count for count, _ in scored)
        found = [statement for count, statement in scored if count == best > 0]
        return " ".join(found[: self.results]) or "nothing found"


@dataclass
class Reply:
    """A reply as it grows: what has been said, by whom, and the log-probabilities of what was the policy's."""

    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    ended: bool = False

    def say(self, ids: list[int], logp: list[float], text: str, ended: bool) -> None:
        """A turn of the policy."""
        self.ids += ids
        self.own += [True] * len(ids)
        self.logp += logp
        self.turns.append(Message("assistant", text))
        self.ended = ended

    def hear(self, ids: list[int], text: str) -> None:
        """A tool's answer."""
        self.ids += ids
        self.own += [False] * len(ids)
        self.logp += [0.0] * len(ids)
        self.turns.append(Message("tool", text))


class ToolSampler(Sampler):
    """Sampling in turns, with tools.

    A reply does not depend on the other rows of the batch: every row has its own random numbers for every turn.

    Args:
        tools: The tools by the names they are called by.
        max_new_tokens: Longest turn of the policy, in tokens, end-of-turn included.
        temperature, top_k, top_p, samples, batch_size: As ``rlhf.rollout.Sampler``.
        max_calls: Calls that are answered; a call after the last of them ends the reply.
        max_result_tokens: Longest answer of a tool, in tokens; the rest is cut off.
    """

    def __init__(
        self,
        tools: dict[str, Tool],
        max_new_tokens: Annotated[int, Field(gt=0)] = 32,
        temperature: Annotated[float, Field(ge=0)] = 1.0,
        top_k: Annotated[int, Field(ge=0)] = 0,
        top_p: Annotated[float, Field(gt=0, le=1)] = 1.0,
        samples: Annotated[int, Field(gt=0)] = 8,
        batch_size: Annotated[int, Field(gt=0)] = 512,
        max_calls: Annotated[int, Field(gt=0)] = 2,
        max_result_tokens: Annotated[int, Field(gt=0)] = 24,
    ) -> None:
        super().__init__(max_new_tokens, temperature, top_k, top_p, samples, batch_size)
        self.tools = dict(tools)
        self.max_calls, self.max_result_tokens = max_calls, max_result_tokens
        if not self.tools:
            raise UserError("rollout.tools is empty: type rollout=sample for replies without tools")

    @property
    def longest(self) -> int:
        """Most tokens of its own that a reply may have."""
        return (self.max_calls + 1) * self.max_new_tokens

    def require_single_turn(self, why: str) -> None:
        """Raises UserError."""
        raise UserError(f"rollout=tools gives replies of several turns, and {why}: type rollout=best_of_k")

    def room(self, policy: LanguageModel) -> int:
        """Most tokens that may follow a prompt: the policy's, and the tools' answers with what the template adds."""
        around = len(encode_tool_turn(policy.tokenizer, "."))
        return self.longest + self.max_calls * (self.max_result_tokens + around)

    def shorter(self, context: int) -> str:
        """As ``Sampler.shorter``: turns and answers count too."""
        return "or a smaller rollout.max_calls or rollout.max_result_tokens"

    @torch.no_grad()
    def sample(self, policy: LanguageModel, prompts: list[Prompt], seed: int) -> Rollout:
        """Samples K replies to each of N prompts: a Rollout of B = N * K rows, the same for the same seed."""
        encoded = self.check(policy, prompts)
        noise = self._noise(len(prompts) * self.samples, self.longest, seed)
        replies = [Reply() for _ in range(len(noise))]

        self._turn(policy, encoded, noise[:, : self.max_new_tokens], replies, self.samples)
        for turn in range(1, self.max_calls + 1):
            calling = [row for row, reply in enumerate(replies) if len(reply.turns) == 2 * turn - 1 and called(reply)]
            if not calling:
                break
            for row in calling:
                call = called(replies[row])
                assert call is not None
                self._answer(policy, replies[row], call)
            contexts = [encoded[row // self.samples] + replies[row].ids for row in calling]
            columns = slice(turn * self.max_new_tokens, (turn + 1) * self.max_new_tokens)
            self._turn(policy, contexts, noise[calling, columns], [replies[row] for row in calling], 1)
        return self._rollout(policy, prompts, encoded, replies)

    def _turn(
        self, policy: LanguageModel, contexts: list[list[int]], noise: Tensor, replies: list[Reply], samples: int
    ) -> None:
        """One turn of the policy on each of N contexts, ``samples`` times."""
        batch = collate_prompts(contexts, policy.pad_id).to(policy.device)
        response, logp = self._continue(policy, batch.ids, batch.attention_mask, noise.to(policy.device), samples)
        mask, ended = _until_end(response, policy.end_id)
        lengths = mask.sum(dim=1).tolist()
        rows = zip(replies, response.tolist(), logp.tolist(), lengths, ended.tolist(), strict=True)
        for reply, ids, values, length, end in rows:
            text = policy.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
            reply.say(ids[:length], values[:length], text, end)

    def _answer(self, policy: LanguageModel, reply: Reply, call: Call) -> None:
        """Calls the tool and puts its answer behind the policy's turn."""
        tool = self.tools.get(call.tool)
        if tool is None:
            text = f"error: no such tool; there is {', '.join(self.tools)}"
        else:
            try:
                text = tool(call.argument)
            except ValueError as error:
                text = f"error: {error}"
        ids = tokenize_text(policy.tokenizer, text)
        if len(ids) > self.max_result_tokens:
            text = policy.tokenizer.decode(ids[: self.max_result_tokens], skip_special_tokens=True)
        reply.hear(encode_tool_turn(policy.tokenizer, text), text)

    def _rollout(
        self, policy: LanguageModel, prompts: list[Prompt], encoded: list[list[int]], replies: list[Reply]
    ) -> Rollout:
        device = policy.device
        batch = collate_prompts(encoded, policy.pad_id).to(device)
        shape = (len(replies), max(len(reply.ids) for reply in replies))
        response = torch.full(shape, policy.pad_id)
        present, mask, logp = torch.zeros(shape).bool(), torch.zeros(shape).bool(), torch.zeros(shape)
        for row, reply in enumerate(replies):
            length = len(reply.ids)
            response[row, :length] = torch.tensor(reply.ids)
            present[row, :length] = True
            mask[row, :length] = torch.tensor(reply.own)
            logp[row, :length] = torch.tensor(reply.logp)
        return Rollout(
            prompts=[prompt for prompt in prompts for _ in range(self.samples)],
            prompt_ids=batch.ids.repeat_interleave(self.samples, dim=0),
            prompt_mask=batch.attention_mask.repeat_interleave(self.samples, dim=0),
            response_ids=response.to(device),
            mask=mask.to(device),
            logp=logp.to(device),
            ended=torch.tensor([reply.ended for reply in replies], device=device),
            texts=[reply.turns[-1].content for reply in replies],
            present=present.to(device),
            turns=[tuple(reply.turns) for reply in replies],
            strays=with_strays(policy.tokenizer, policy.end_id, response, mask),
        )


def called(reply: Reply) -> Call | None:
    """The call that the policy's last turn ends with; a turn that was cut off calls nothing."""
    return read_call(reply.turns[-1].content) if reply.ended and reply.turns[-1].role == "assistant" else None
