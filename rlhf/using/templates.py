"""The chat template that a command line gives to models without one, and errors in that command's words."""

import hashlib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.chat_templates import TEMPLATES, TOKENS
from rlhf.errors import UserError
from rlhf.models.causal_lm import CausalLM
from rlhf.using.named import Named

OPTION = "--chat-template"
NAMES = f"{', '.join(TEMPLATES)} or a Jinja file"
_TRAINING = re.compile(
    r"(?:type|give a template that only appends:) model\.chat_template=chatml(?:, or a Jinja file that writes it)?"
)


@dataclass(frozen=True)
class Given:
    """Which of some models the option is for.

    Attributes:
        name: What was typed.
        lacking: Paths of the models whose tokenizer has no chat template.
        notes: What a reader of the replies has to know.
    """

    name: str | None = None
    lacking: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def of(self, path: str) -> str | None:
        """What the model at ``path`` is to be given; None: it has its own."""
        return self.name if path in self.lacking else None


def given(models: Sequence[Named], name: str | None) -> Given:
    """Looks at the tokenizers alone, before any weights are read.

    Args:
        models: All that are to write replies.
        name: What ``--chat-template`` says; None: nothing.

    Raises:
        UserError: A model has no template and none is given; none of them needs the one that is given; no such
            template.
    """
    with as_typed(True):  # a wrong name or file is refused whoever needs it
        if name is not None:
            CausalLM(None, None, None, chat_template=name)
    lacking, notes = set(), []
    for model in models:
        vocabulary = _without(model)
        if vocabulary is None:
            continue
        if name is None:
            raise UserError(
                f"{model.ref}: its tokenizer has no chat template, and dialogues need one; "
                f"type {OPTION} chatml ({NAMES})"
            )
        lacking.add(model.path)
        new = [token for token in TOKENS.get(name, ()) if token not in vocabulary]
        if new:
            notes.append(f"{model.ref}: {OPTION} {name} adds tokens that the model has never seen: {' '.join(new)}")
    if name is not None and not lacking:
        refs = " and ".join(dict.fromkeys(model.ref for model in models))
        raise UserError(
            f"{OPTION} {name}: is for models without a chat template, and {refs} came with one; leave it out"
        )
    return Given(name, frozenset(lacking), notes)


def identity(name: str) -> str:
    """A template's name; a file's path with a digest of what is in it."""
    if name in TEMPLATES:
        return name
    return f"{name} (sha256 {hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]})"


def _without(model: Named) -> dict[str, int] | None:
    """The vocabulary of a tokenizer that has no chat template; None where it has one."""
    tokenizer = CausalLM(model.path, None, None).own_tokenizer()
    return None if tokenizer.chat_template else tokenizer.get_vocab()


def in_words(message: str, given: bool) -> str:
    """A message about a chat template with what can be typed here in the place of training's key.

    Args:
        message: Of `rlhf.data.template` or `rlhf.models.causal_lm`.
        given: Whether the template is the option's; else it is the model's own.
    """
    instead = f"type {OPTION} chatml"
    if not given:
        instead = "mend the template: `rlhf export RUN --to FOLDER` writes it to FOLDER/chat_template.jinja"
    return _TRAINING.sub(instead, message).replace("model.chat_template=", f"{OPTION} ")


@contextmanager
def as_typed(given: bool) -> Iterator[None]:
    """Errors about chat templates in words of the command line."""
    try:
        yield
    except UserError as error:
        if "model.chat_template=" not in str(error):
            raise
        raise UserError(in_words(str(error), given)) from error
