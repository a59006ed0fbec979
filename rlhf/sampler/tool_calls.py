"""Tool-calling sampler: rollouts of several turns.

A turn of the policy that ends with ``<call>TOOL(ARGUMENT)</call>`` (``rlhf.data.tool_calls``) is executed: the tool's
result is appended to the context as a separate turn, and the policy continues. The tokens of the result are attended to
but have no log-probability, no KL and no loss, because the policy did not choose them.
"""

import ast
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Annotated, Protocol

import torch
from pydantic import Field
from torch import Tensor

from rlhf.data.collate import collate_prompts
from rlhf.data.encoding import encode_tool_turn
from rlhf.data.records import Message, Prompt
from rlhf.data.rendering import tokenize_text
from rlhf.data.special_tokens import has_special_tokens
from rlhf.data.testbed.language import BY_NAME
from rlhf.data.testbed.world import Testbed
from rlhf.data.tool_calls import Call, read_call
from rlhf.errors import UserError, key
from rlhf.models.language_model import LanguageModel
from rlhf.sampler.ancestral import AncestralSampler, _until_end
from rlhf.sampler.rollout import Rollout


class Tool(Protocol):
    """Interface of tools: text in, text out.

    A tool raises ValueError for arguments that it cannot process; the policy reads the message. The argument comes from
    a policy that generates arbitrary text: parse it, never execute it, and never repeat it in the result, where it
    could contain the template's special tokens.
    """

    def __call__(self, argument: str) -> str:
        """Return the result for an argument.

        Raises:
            ValueError: For an argument that the tool cannot process.
        """
        ...


class Calculator:
    """Exact calculator: + - * / // %, parentheses and decimals.

    Nothing is executed: the syntax tree is evaluated.

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
        """Return the value: exact if it is an integer, else with six significant digits.

        Raises:
            ValueError: If the argument is too long or not arithmetic.
        """
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
    """Search of the testbed's facts by words: ``search(Mia home)`` gives "Mia lives in Rome.".

    Args:
        testbed: The world; the same as the data's.
        results: Most facts in a result: those with the most words of the query, in the order of the world.
    """

    def __init__(self, testbed: Testbed | None = None, results: Annotated[int, Field(gt=0)] = 1) -> None:
        self.results = results
        self.facts = []
        for (person, topic), value in (testbed or Testbed()).facts.items():
            statement = BY_NAME[topic].statements[0].format(n=person, v=value)
            self.facts.append((statement, {word.lower() for word in re.findall(r"\w+", f"{statement} {topic}")}))

    def __call__(self, argument: str) -> str:
        """Return the facts found, or "nothing found"."""
        query = {word.lower() for word in re.findall(r"\w+", argument)}
        scored = [(len(query & words), statement) for statement, words in self.facts]
        best = max(count for count, _ in scored)
        found = [statement for count, statement in scored if count == best > 0]
        return " ".join(found[: self.results]) or "nothing found"


@dataclass
class GrowingResponse:
    """Response under construction: its tokens and turns, and the log-probabilities of the policy's tokens.

    ``own`` marks the tokens of the policy; tool tokens have log-probability 0.
    """

    ids: list[int] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)
    logp: list[float] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)
    ended: bool = False

    def append_policy_turn(self, ids: list[int], logp: list[float], text: str, ended: bool) -> None:
        """Append a turn of the policy."""
        self.ids += ids
        self.own += [True] * len(ids)
        self.logp += logp
        self.turns.append(Message("assistant", text))
        self.ended = ended

    def append_tool_turn(self, ids: list[int], text: str) -> None:
        """Append a tool's result."""
        self.ids += ids
        self.own += [False] * len(ids)
        self.logp += [0.0] * len(ids)
        self.turns.append(Message("tool", text))


class ToolSampler(AncestralSampler):
    """Sampler of several turns with tool calls.

    A response does not depend on the other rows of the batch: every row has its own random numbers for every turn.

    Args:
        tools: The tools by the names that the policy calls them by.
        max_new_tokens: Longest turn of the policy, in tokens, end-of-turn included.
        temperature, top_k, top_p, samples, batch_size: As in ``rlhf.sampler.ancestral.AncestralSampler``.
        max_calls: Maximum number of executed calls; a further call ends the response.
        max_result_tokens: Longest result of a tool, in tokens; the rest is truncated.
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
            raise UserError(
                "is empty", fix=f"type {key('sampler', 'sample')} for responses without tools", option="sampler.tools"
            )

    @property
    def longest(self) -> int:
        """Upper bound of the policy's own tokens in a response."""
        return (self.max_calls + 1) * self.max_new_tokens

    def require_single_turn(self, why: str) -> None:
        """Raise UserError, because responses have several turns."""
        raise UserError(
            f"its responses have several turns, and {why}",
            fix=f"type {key('sampler', 'best_of_k')}",
            option="sampler",
            value="tools",
        )

    def room(self, policy: LanguageModel) -> int:
        """Return the most tokens that may follow a prompt.

        These are the policy's tokens, and the tool results with the tokens that the template adds to them.
        """
        around = len(encode_tool_turn(policy.tokenizer, "."))
        return self.longest + self.max_calls * (self.max_result_tokens + around)

    def reducible_hyperparameters(self, context: int) -> Mapping[str, int | None]:
        """Return the hyperparameters that shorten the longest response; calls and tool results use the context too."""
        return dict.fromkeys(("max_new_tokens", "max_calls", "max_result_tokens"))

    @torch.no_grad()
    def sample(self, policy: LanguageModel, prompts: list[Prompt], seed: int) -> Rollout:
        """Sample K responses to each of N prompts: a Rollout of B = N * K rows, deterministic by ``seed``.

        Raises:
            UserError: For a prompt that is too long for the context.
        """
        encoded = self.check(policy, prompts)
        noise = self._noise(len(prompts) * self.samples, self.longest, seed)
        responses = [GrowingResponse() for _ in range(len(noise))]

        self._turn(policy, encoded, noise[:, : self.max_new_tokens], responses, self.samples)
        for turn in range(1, self.max_calls + 1):
            calling = [
                row
                for row, response in enumerate(responses)
                if len(response.turns) == 2 * turn - 1 and called(response)
            ]
            if not calling:
                break
            for row in calling:
                call = called(responses[row])
                assert call is not None
                self._answer(policy, responses[row], call)
            contexts = [encoded[row // self.samples] + responses[row].ids for row in calling]
            columns = slice(turn * self.max_new_tokens, (turn + 1) * self.max_new_tokens)
            self._turn(policy, contexts, noise[calling, columns], [responses[row] for row in calling], 1)
        return self._rollout(policy, prompts, encoded, responses)

    def _turn(
        self,
        policy: LanguageModel,
        contexts: list[list[int]],
        noise: Tensor,
        responses: list[GrowingResponse],
        samples: int,
    ) -> None:
        """Sample one turn of the policy for each of N contexts, ``samples`` times."""
        batch = collate_prompts(contexts, policy.pad_id).to(policy.device)
        response_ids, logp = self._continue(policy, batch.ids, batch.attention_mask, noise.to(policy.device), samples)
        mask, ended = _until_end(response_ids, policy.end_id)
        lengths = mask.sum(dim=1).tolist()
        rows = zip(responses, response_ids.tolist(), logp.tolist(), lengths, ended.tolist(), strict=True)
        for response, ids, values, length, end in rows:
            text = policy.tokenizer.decode(ids[:length], skip_special_tokens=True).strip()
            response.append_policy_turn(ids[:length], values[:length], text, end)

    def _answer(self, policy: LanguageModel, response: GrowingResponse, call: Call) -> None:
        """Execute a call and append the result after the policy's turn."""
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
        response.append_tool_turn(encode_tool_turn(policy.tokenizer, text), text)

    def _rollout(
        self, policy: LanguageModel, prompts: list[Prompt], encoded: list[list[int]], responses: list[GrowingResponse]
    ) -> Rollout:
        device = policy.device
        batch = collate_prompts(encoded, policy.pad_id).to(device)
        shape = (len(responses), max(len(response.ids) for response in responses))
        response_ids = torch.full(shape, policy.pad_id)
        present, mask, logp = torch.zeros(shape).bool(), torch.zeros(shape).bool(), torch.zeros(shape)
        for row, response in enumerate(responses):
            length = len(response.ids)
            response_ids[row, :length] = torch.tensor(response.ids)
            present[row, :length] = True
            mask[row, :length] = torch.tensor(response.own)
            logp[row, :length] = torch.tensor(response.logp)
        return Rollout(
            prompts=[prompt for prompt in prompts for _ in range(self.samples)],
            prompt_ids=batch.ids.repeat_interleave(self.samples, dim=0),
            prompt_mask=batch.attention_mask.repeat_interleave(self.samples, dim=0),
            response_ids=response_ids.to(device),
            mask=mask.to(device),
            logp=logp.to(device),
            ended=torch.tensor([response.ended for response in responses], device=device),
            texts=[response.turns[-1].content for response in responses],
            response_attention_mask=present.to(device),
            turns=[tuple(response.turns) for response in responses],
            special_tokens=has_special_tokens(policy.tokenizer, policy.end_id, response_ids, mask),
        )


def called(response: GrowingResponse) -> Call | None:
    """Return the call that ends the policy's last turn, if any; a truncated turn calls nothing."""
    return read_call(response.turns[-1].content) if response.ended and response.turns[-1].role == "assistant" else None
