"""Page `rlhf inspect template`: a model's chat template on sample dialogues, with its mask and its special tokens."""

from collections.abc import Sequence
from typing import Any

from omegaconf import OmegaConf

from rlhf import console
from rlhf.data.control_tokens import Tokenizer
from rlhf.data.data import Data
from rlhf.data.encoding import encode_dialogue, encode_prompt, encode_tool_turn
from rlhf.data.end_tokens import end_of_turn_id
from rlhf.data.records import Message
from rlhf.data.rendering import render, tokenize
from rlhf.errors import RLHFError, UserError, first_line
from rlhf.inspection import tokens
from rlhf.inspection.composing import Look, chosen, composed, planned, spec_of
from rlhf.planning.step_config import resolve, step_config
from rlhf.storage.plain import plain

SYSTEM = Message("system", "You answer briefly.")
DIALOGUE = (
    Message("user", "What is the capital of France?"),
    Message("assistant", "Paris."),
    Message("user", "And of Italy?"),
    Message("assistant", "Rome."),
)
CALL = (
    Message("user", "What is 3+4?"),
    Message("assistant", '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 4}}\n</tool_call>'),
    Message("tool", "7"),
    Message("assistant", "It is 7."),
)


def show(words: Sequence[str], step: str | None) -> None:
    """Print the page.

    Args:
        words: At least a model; a stage or a pipeline is not needed.
        step: Step of a pipeline; None: the last.

    Raises:
        UserError: No model is named, or one that cannot be read.
    """
    if not words:
        fix = "type model=NAME, model.path=DIRECTORY_OR_HUB_ID or stage=NAME"
        raise UserError("rlhf inspect template: names no model", fix=fix)
    tokenizer, given = tokenizer_of(words, step)
    if not tokenizer.chat_template:
        fix = "type model.chat_template=chatml or plain, or a Jinja file"
        raise UserError("the tokenizer has no chat template", fix=fix)
    facts = facts_of(tokenizer, given)
    console.print_table("Chat template", ("", ""), list(facts.items()))
    screen, colour = console.console(), tokens.coloured()
    screen.print(tokens.key(colour))
    samples = {"with a system message": (SYSTEM, *DIALOGUE), "without": DIALOGUE, "with a tool call": CALL}
    for name, dialogue in samples.items():
        console.say(f"\n{name}", "bold")
        try:
            encoded = encode_dialogue(tokenizer, dialogue)
        except Exception as error:  # a template may raise any exception
            console.say(f"  not supported: {first_line(error)}", "yellow")
            continue
        present = [True] * len(encoded)
        screen.print(tokens.row_text(tokenizer, encoded.ids, present, encoded.mask, None, colour))


def tokenizer_of(words: Sequence[str], step: str | None) -> tuple[Tokenizer, Any]:
    """Return the tokenizer that training would use, and the model spec; None for the spec if a stage is named."""
    root = composed(words)
    if root.get("stage") is not None or root.get("steps") is not None:
        made = planned(words)
        look = Look(made.steps)
        selected = chosen(made, step)
        return look.policy(look.stage(selected, strict=False)).tokenizer, None
    config = resolve(step_config(plain(root), None))
    spec = spec_of(OmegaConf.create({"model": config["model"]}))
    corpus = Data("text", "testbed", 500, 0, 64).load().texts if spec.path is None else None
    return spec.load_tokenizer(corpus), spec


def facts_of(tokenizer: Tokenizer, spec: Any = None) -> dict[str, str]:
    """Return the properties of a template that matter in training: name -> description."""
    end, pad = end_of_turn_id(tokenizer), tokenizer.pad_token_id
    facts = {
        "end of turn": f"{end} {tokenizer.convert_ids_to_tokens(end)}",
        "end of sequence": f"{tokenizer.eos_token_id} {tokenizer.eos_token}",
        "padding": f"{pad} {tokenizer.pad_token}",
        "padding = end of turn": "yes: rlhf masks by position, but other programs may mask the end of turn"
        if pad == end
        else "no",
    }
    own = _own_pad(spec)
    if own is not None and own != tokenizer.pad_token:
        facts["padding = end of turn"] += (
            f" (the model's own padding is {own}; it is replaced by {tokenizer.pad_token})"
        )
    facts["prefix-preserving"] = _appends(tokenizer)
    facts["end of turn is trained"] = _end_is_trained(tokenizer, end)
    facts["system message by default"] = _default_system(tokenizer)
    try:
        encode_tool_turn(tokenizer, "7")
        facts["tool turn"] = "yes"
    except Exception as error:  # a template may raise any exception
        facts["tool turn"] = f"no: {first_line(error)}"
    return facts


def _appends(tokenizer: Tokenizer) -> str:
    """Return whether every dialogue starts with its own prompt, in text and in tokens, as "yes" or the problem."""
    try:
        encoded = encode_dialogue(tokenizer, DIALOGUE)
    except RLHFError as error:
        return f"no: {error}"
    prompt = encode_prompt(tokenizer, DIALOGUE[:3])
    if encoded.ids[: len(prompt)] != prompt:
        return "in text, but not in tokens: a token spans two turns"
    return "yes"


def _end_is_trained(tokenizer: Tokenizer, end: int) -> str:
    try:
        encoded = encode_dialogue(tokenizer, DIALOGUE)
    except RLHFError as error:
        return f"no: {error}"
    trained = sum(index == end and marked for index, marked in zip(encoded.ids, encoded.mask, strict=True))
    responses = sum(message.role == "assistant" for message in DIALOGUE)
    return "yes" if trained == responses else f"no: for {trained} of {responses} responses"


def _default_system(tokenizer: Tokenizer) -> str:
    text = render(tokenizer, DIALOGUE[:1])
    head = text[: text.index(DIALOGUE[0].content)]
    bare = render(tokenizer, (Message("system", ""), DIALOGUE[0])) if "system" in head else ""
    if not bare:
        return "none"
    return f"yes: the template writes {len(tokenize(tokenizer, head))} tokens before the first user turn: {head!r}"


def _own_pad(spec: Any) -> str | None:
    """Return the padding token that came with the tokenizer, before it was separated from the end of turn."""
    if spec is None or (spec.tokenizer or spec.path) is None:
        return None
    from transformers import AutoTokenizer

    source = spec.tokenizer or (spec.path if spec.path.endswith(".gguf") else spec.base_path)
    return str(spec.read(AutoTokenizer.from_pretrained, source).pad_token)
