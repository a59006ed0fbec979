"""Chat template that the command line gives to models without one, and errors in terms of that command line."""

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.chat_templates import TEMPLATES, TOKENS
from rlhf.errors import UserError, moved
from rlhf.models.model_source import ModelSource
from rlhf.models.tokenizer_loading import load_own_tokenizer
from rlhf.using.named import Named

OPTION = "--chat-template"
NAMES = f"{', '.join(TEMPLATES)} or a Jinja file"
KEY = "model.chat_template"  # config key of the same template in training


@dataclass(frozen=True)
class Given:
    """Assignment of the option's template to the models that need it.

    Attributes:
        name: The template's name or file as typed.
        lacking: Paths of the models whose tokenizer has no chat template.
        notes: Notes for a reader of the responses, one line each.
    """

    name: str | None = None
    lacking: frozenset[str] = frozenset()
    notes: list[str] = field(default_factory=list)

    def of(self, path: str) -> str | None:
        """Return the template for the model at ``path``; None if it has its own."""
        return self.name if path in self.lacking else None


def given(models: Sequence[Named], name: str | None) -> Given:
    """Assign the template to the models that need it; reads tokenizers only, before any weights are loaded.

    Args:
        models: All models that are to generate responses.
        name: The value of ``--chat-template``; None without the option.

    Raises:
        UserError: A model has no template and none is given; none of them needs the given one; no such template.
    """
    with as_typed(True):  # raises for a wrong name or file even if no model needs it
        if name is not None:
            ModelSource(None, None, None, chat_template=name)
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
    """Return a built-in template's name, or a file's path with a digest of its content."""
    if name in TEMPLATES:
        return name
    return f"{name} (sha256 {hashlib.sha256(Path(name).read_bytes()).hexdigest()[:16]})"


def _without(model: Named) -> dict[str, int] | None:
    """Return the vocabulary of a tokenizer without a chat template; None if it has one."""
    tokenizer = load_own_tokenizer(ModelSource(model.path, None, None))
    return None if tokenizer.chat_template else tokenizer.get_vocab()


@contextmanager
def as_typed(given: bool) -> Iterator[None]:
    """Context manager: raise errors about chat templates in terms of this command, which has no config keys.

    Args:
        given: Whether the template comes from ``--chat-template``; else it is the model's own.
    """
    try:
        yield
    except UserError as error:
        for finding in error.findings:
            if not given and (finding.option == KEY or KEY in finding.fix_keys):
                finding.fix = (
                    "fix the template: `rlhf export RUN --to DIRECTORY` writes it to DIRECTORY/chat_template.jinja"
                )
                if finding.option == KEY:
                    finding.option, finding.value, finding.where = "", None, "the model's chat template"
        error.rename(moved(KEY, OPTION))
        raise
