"""How a policy calls a tool, in text that any tokenizer can write: `<call>calculator(3+4)</call>`.

A call is the end of an assistant turn. The tool's answer comes back as a turn of its own (role "tool"), written by the
chat template, and the assistant goes on in a new turn. So a dialogue with calls is a plain list of messages: SFT masks
the tool's turn as it masks every turn that is not the assistant's, and so does a rollout.
"""

import re
from dataclasses import dataclass

_CALL = re.compile(r"<call>\s*(?P<tool>\w+)\s*\((?P<argument>.*?)\)\s*</call>\s*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """A tool's name and what it is given."""

    tool: str
    argument: str

    def __str__(self) -> str:
        return f"<call>{self.tool}({self.argument})</call>"


def read_call(turn: str) -> Call | None:
    """The call an assistant turn ends with, or None. Of several in one turn only the last counts."""
    start = turn.rfind("<call>")
    match = _CALL.match(turn, start) if start >= 0 else None
    return Call(match["tool"], match["argument"].strip()) if match else None
