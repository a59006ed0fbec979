"""Control tokens spelled in the data, such as `<|im_end|>` in a response, encoded as text and never as the token."""

import re
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer
else:
    Tokenizer = Any

# Breaks a spelled token while a template writes the dialogue. Unicode keeps this code point out of all text.
GUARD = "\ufdd0"

_GUARDS = re.compile(f"{GUARD}+")
_LONE_GUARD = re.compile(f"(?<!{GUARD}){GUARD}(?!{GUARD})")


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """Return the ids of all special tokens: those with a role, such as padding, and added ones that are special."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    return set(tokenizer.all_special_ids) | {index for index, token in added if token.special}


class ControlTokens:
    """Encoder that separates the control tokens written by a template from those spelled in its content.

    `guard` marks the spelled ones in content before it is rendered; `tokenize` encodes rendered text with such marks.
    Text without marks is tokenized as the tokenizer does it.

    Args:
        tokenizer: Tokenizer whose special tokens are control tokens.
        written: Text that the chat template writes around a dialogue; added tokens in it are control tokens too.

    Attributes:
        written: Control tokens in ``written``.
    """

    def __init__(self, tokenizer: Tokenizer, written: str = "") -> None:
        self._tokenizer = tokenizer
        special = set(tokenizer.all_special_tokens)
        added = {token.content: token for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
        found = special | {text for text, token in added.items() if token.special or text in written}
        # A token of one character cannot be broken, and equals that character.
        names = sorted((text for text in found if len(text) > 1), key=len, reverse=True)
        self._ids = set(tokenizer.convert_tokens_to_ids(names)) - {tokenizer.unk_token_id}
        self._spelled = re.compile("|".join(map(re.escape, names))) if names else None
        # Some tokens absorb the space around them.
        sides = {text: (added[text].lstrip, added[text].rstrip) if text in added else (False, False) for text in names}
        own = (rf"\s*{re.escape(text)}" if sides[text][0] else re.escape(text) for text in names)
        self._own = re.compile(
            "(" + "|".join(one + r"\s*" * sides[text][1] for one, text in zip(own, names, strict=True)) + ")"
        )
        self.written = [text for text in names if text in written]
        self._example = names[0] if names else ""

    def first(self, text: str) -> str | None:
        """Return the first control token spelled in a text, or None."""
        found = self._spelled.search(text) if self._spelled else None
        return found[0] if found else None

    def guard(self, text: str) -> str:
        """Return content with a mark inside every control token spelled in it."""
        if GUARD in text:
            text = text.replace(GUARD, GUARD * 2)
        found = self._spelled.search(text) if self._spelled else None
        if self._spelled is None or found is None:
            return text
        cuts = [0]
        while found is not None:
            cuts.append(found.start() + 1)
            found = self._spelled.search(text, found.start() + 1)  # a token may begin inside another
        return GUARD.join(text[start:end] for start, end in zip(cuts, [*cuts[1:], len(text)], strict=True))

    def tokenize(self, text: str) -> list[int]:
        """Return the ids of rendered text; pieces between control tokens that contain a mark are encoded as text."""
        if GUARD not in text:
            return self._read(text)
        ids: list[int] = []
        clean = ""
        for part in self._own.split(text):
            if GUARD not in part:
                clean += part
                continue
            ids += self._read(clean)
            ids += self._plain(part, follows=bool(ids))
            clean = ""
        return ids + self._read(clean)

    def tokenize_texts(self, texts: Sequence[str]) -> list[list[int]]:
        """Return ``tokenize(guard(text))`` for each of several texts."""
        return self.tokenize_batch([self.guard(text) for text in texts])

    def tokenize_batch(self, rendered: Sequence[str]) -> list[list[int]]:
        """Return ``tokenize(text)`` for each of several rendered texts.

        It costs less than half of encoding them one by one.
        """
        backend: Any = getattr(self._tokenizer, "backend_tokenizer", None)
        if not hasattr(backend, "encode_batch_fast"):
            return [self.tokenize(text) for text in rendered]
        self._read("a")  # switches padding and truncation of the backend off
        clean = ["" if GUARD in text else text for text in rendered]
        found = backend.encode_batch_fast(clean, add_special_tokens=False)
        return [
            encoding.ids if text else self.tokenize(whole)
            for whole, text, encoding in zip(rendered, clean, found, strict=True)
        ]

    def _read(self, text: str, **options: Any) -> list[int]:
        if not text:
            return []
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False, **options)["input_ids"])

    def _plain(self, part: str, follows: bool) -> list[int]:
        """Return the ids of a piece of content with marks.

        `follows` is True after a control token, False at the start of the text.
        """
        text = _unguarded(part)
        ids = self._continued(text, self._same_after_token) if follows else self._read(text, split_special_tokens=True)
        if self._ids.isdisjoint(ids):
            return ids
        # The vocabulary has the token as a word (Unigram) or as an added token that is not special: encode two pieces.
        ids = []
        for piece in _LONE_GUARD.split(part):
            ids += self._continued(_unguarded(piece), self._same_after_text if ids else not follows)
        return ids

    def _continued(self, text: str, same: bool) -> list[int]:
        """Return the ids of a text that continues another.

        `same` is True where the tokenizer encodes the text as it would alone.
        """
        if not same:
            for before in ("\n", "."):  # drops the space that SentencePiece puts before a first word
                start, whole = self._read(before), self._read(before + text, split_special_tokens=True)
                if whole[: len(start)] == start:
                    return whole[len(start) :]
        return self._read(text, split_special_tokens=True)

    @cached_property
    def _same_after_token(self) -> bool:
        return self._read(f"{self._example}a")[1:] == self._read("a")

    @cached_property
    def _same_after_text(self) -> bool:
        return self._read("\na") == self._read("\n") + self._read("a")


def _unguarded(text: str) -> str:
    return _GUARDS.sub(lambda found: GUARD * (len(found[0]) // 2), text)
