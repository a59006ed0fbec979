"""Tool calls as text that any tokenizer can encode: `<call>calculator(3+4)</call>`.

A call ends an assistant turn. The tool's result is a separate turn (role "tool"), written by the chat template, and the
assistant continues in a new turn. A dialogue with calls is therefore a plain list of messages: SFT masks the tool's
turn as it masks every turn that is not the assistant's, and so does a rollout.
"""

import re
from dataclasses import dataclass

_CALL = re.compile(r"<call>\s*(?P<tool>\w+)\s*\((?P<argument>.*?)\)\s*</call>\s*\Z", re.DOTALL)


@dataclass(frozen=True, slots=True)
class Call:
    """Call of a tool: its name and its argument."""

    tool: str
    argument: str

    def __str__(self) -> str:
        return f"<call>{self.tool}({self.argument})</call>"


def read_call(turn: str) -> Call | None:
    """Parse the call that ends an assistant turn, or return None; of several calls only the last counts."""
    start = turn.rfind("<call>")
    match = _CALL.match(turn, start) if start >= 0 else None
    return Call(match["tool"], match["argument"].strip()) if match else None
