"""Checkable answers: parse numbers as people and models write them, and decide whether two answers are equal.

Plain numbers (digits, grouping, signs, fractions, percent, powers of ten, a unit behind them) are parsed here, exactly.
Other mathematics (roots, symbols, sets, intervals) is left to math-verify, and only where both answers are nothing but
mathematics.
"""

import re
import unicodedata
from fractions import Fraction
from functools import lru_cache

from rlhf.data.time_limit import time_limit
from rlhf.errors import UserError

LONGEST = 100  # characters of an answer that is parsed as mathematics; a policy can generate anything
SECONDS = 2.0  # CPU time limit of one comparison by math-verify, far above what answers of this length need

_SIGN = r"[-+]"
_CURRENCY = "[$€£¥]"
_GROUPED = r"\d{1,3}(?:,\d{3})+(?!\d)|\d{1,3}(?:[ ]\d{3})+(?!\d)|\d+"
_EXPONENT = r"(?:[eE][-+]?\d{1,3}(?!\w)|\s?[x*]\s?10\^[-+]?\d{1,3})?"
_UNSIGNED = rf"(?:\d+[ ]\d{{1,4}}/\d{{1,4}}|(?:{_GROUPED})(?:\.\d*|\s?/\s?\d+)?{_EXPONENT}|\.\d+{_EXPONENT})"
_SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_TAIL = rf"(?:\s?%|\s?percent\b|\s(?:{'|'.join(_SCALES)})\b)?"
_PLAIN = re.compile(rf"{_CURRENCY}?\s?{_SIGN}?\s?{_CURRENCY}?\s?{_UNSIGNED}{_TAIL}\.?", re.IGNORECASE)
# In running text a full stop ends the sentence, and a sign belongs to a number only if no number precedes it.
_RUNNING = _UNSIGNED.replace(r"\.\d*", r"\.\d+")
_NUMBER = re.compile(rf"(?<![\w.)])(?:{_SIGN}{_CURRENCY}?|{_CURRENCY}{_SIGN}?)?{_RUNNING}{_TAIL}", re.IGNORECASE)
_BARE = re.compile(rf"(?<![\w.]){_RUNNING}{_TAIL}", re.IGNORECASE)
# A unit is words without digits; words that are numbers or operations change the value, so they are no unit.
_UNIT = re.compile(r"\s?[^\W\d_][^\d=+*^\\]*(?:\^[23])?")
_NO_UNIT = re.compile(
    r"\b(?:pi|[a-fi-kn-rt-z]|sqrt|root|log|ln|sin|cos|tan|times|plus|minus|over|divided|dozen|half|halves|or|and|to|"
    rf"thirds?|quarters?|squared|cubed|infinity|{'|'.join(_SCALES)})\b|π|√|∞",
    re.IGNORECASE,
)
_GLUED = re.compile(r"[a-zµ°]{2,3}(?:\^[23])?[,.)]?", re.IGNORECASE)  # 72kg, 3cm²; a single letter is a variable
_LETTERS_OF_MATHEMATICS = re.compile(r"\\[a-zA-Z]+|\b(?:sqrt|sin|cos|tan|log|ln|exp|pi|cup|cap|infty)\b")
_MINUS = dict.fromkeys(map(ord, "−‒–—﹣-⁻"), "-")
_SPACES = dict.fromkeys(map(ord, "\u00a0\u2007\u2009\u200a\u202f\t"), " ")


def clean(text: str) -> str:
    """Return a text with uniform minus signs, spaces and fractions, without Markdown emphasis and LaTeX markup."""
    text = re.sub(r"(?<=\d)(?=[¼½¾⅐-⅞])", " ", text)
    text = text.translate(_MINUS | _SPACES)
    text = unicodedata.normalize("NFKC", re.sub(r"([²³])", lambda m: "^" + str("²³".index(m[1]) + 2), text))
    text = text.replace("⁄", "/").replace("×", "x").replace("\\times", "x").replace("\\cdot", "*")
    text = re.sub(r"\*\*|__|`", "", text)
    text = re.sub(r"\\[,;!: ]|\{,\}", lambda m: "," if m[0] == "{,}" else "", text)
    text = re.sub(r"\\(?:left|right|displaystyle|boldsymbol)\b\s?", "", text)
    text = text.replace("\\%", "%").replace("\\$", "$")
    text = re.sub(r"10\^\{([-+]?\d+)\}", r"10^\1", text)
    for _ in range(3):  # nested commands, innermost first
        text = re.sub(r"\\(?:boxed|text|textbf|mathbf|mathrm|mbox)\s?\{([^{}]*)\}", r"\1", text)
        text = re.sub(r"\\[dt]?frac\s?\{\s?(-?\d+)\s?\}\s?\{\s?(\d+)\s?\}", _fraction, text)
    return re.sub(r"\\[dt]?frac\s?(\d)\s?(\d)", _fraction, text)


def _fraction(match: re.Match[str]) -> str:
    r"""Return a/b, with a leading space after a whole number: 3\frac{1}{2} becomes 3 1/2."""
    after_digit = match.start() and match.string[match.start() - 1].isdigit()
    return f"{' ' if after_digit else ''}{match[1]}/{match[2]}"


def strip_markup(text: str) -> str:
    """Return a cleaned answer without enclosing spaces, LaTeX dollar signs, asterisks and final full stop."""
    text = clean(text).strip()
    inner = re.fullmatch(r"(\$\$?|\\\(|\\\[)\s*(.*?)\s*(\$\$?|\\\)|\\\])\.?", text, re.DOTALL)
    if inner:
        text = inner[2]
    return text.strip(" *_").removesuffix(".").strip(" *_")


def number(text: str) -> Fraction | None:
    """Parse a text as a number, or return None: `1,000`, `1 000.0`, `$1000`, `1e3` and `2000/2` are equal.

    A percentage keeps its number: `50%` is 50. Only a sign, a currency or a scale word may accompany the number.
    """
    text = strip_markup(text)
    if len(text) > LONGEST or not _PLAIN.fullmatch(text):
        return None
    body = re.sub(rf"\s?(?:%|percent\b)|{_CURRENCY}|,", "", text, flags=re.IGNORECASE).strip().removesuffix(".")
    scale = next((word for word in _SCALES if body.lower().endswith(word)), None)
    body = body[: -len(scale)].strip() if scale else body
    body = re.sub(r"\s?[x*]\s?10\^", "e", body)
    sign = -1 if body.startswith("-") else 1
    body = body.lstrip("-+ ")
    mixed = re.fullmatch(r"(\d+) (\d+)/(\d+)", body)
    try:
        if mixed:
            value = Fraction(int(mixed[1])) + Fraction(int(mixed[2]), int(mixed[3]))
        else:
            value = _value(re.sub(r"\s", "", body))
    except (ZeroDivisionError, ValueError):
        return None
    return sign * value * (_SCALES[scale] if scale else 1)


def _value(body: str) -> Fraction:
    """Parse a decimal or a fraction, optionally followed by an exponent."""
    body, _, power = body.lower().partition("e")
    upper, _, lower = body.partition("/")
    return Fraction(upper) / Fraction(lower or 1) * Fraction(10) ** int(power or 0)


_ASIDE = re.compile(
    r"(?<!\\)\((?:see|cf\.?|page|p\.|pp\.|eqs?\.?|equation|step|line|section|figure|fig\.|table|chapter|example)"
    r"[^()a-z][^()]*\)",
    re.IGNORECASE,
)
_IN_WORDS = re.compile(r"\s\([a-z][a-z -]+\)$", re.IGNORECASE)  # the number repeated in words: 72 (seventy-two)


def last_number(text: str) -> str | None:
    """Return the last number in running text as it is written there, or None.

    A minus between two numbers is not a sign. A reference in parentheses (`see page 12`) is used only where there is no
    other number.
    """
    text = clean(text)
    return _last(_ASIDE.sub(" ", text)) or _last(text)


def _last(text: str) -> str | None:
    found, start = None, 0
    while match := _first(text, start):
        found, start = match[0], match.end()
    return found


def _first(text: str, start: int) -> re.Match[str] | None:
    """Return the first number from ``start`` on, with its sign if it has one."""
    signed, bare = _NUMBER.search(text, start), _BARE.search(text, start)
    if signed is None or bare is None:
        return signed or bare
    return signed if signed.start() <= bare.start() else bare


def readings(answer: str) -> tuple[set[Fraction], bool]:
    """Return the numbers that an answer may mean, and whether it is a percentage: `50%` means 50 or 0.5."""
    answer = strip_markup(answer)
    value = number(answer)
    if value is None:
        value = _with_unit(answer)
    if value is None:
        return set(), False
    percent = bool(re.search(r"%|percent\b", answer, re.IGNORECASE))
    return ({value, value / 100} if percent else {value}), percent


def _with_unit(answer: str) -> Fraction | None:
    """Parse the number of `72 dollars` or `72kg`, as in GSM8K; return None where more than a unit follows."""
    match = re.match(rf"{_CURRENCY}?{_SIGN}?{_CURRENCY}?{_RUNNING}{_TAIL}", answer, re.IGNORECASE)
    if match is None or len(answer) > LONGEST:
        return None
    unit = _IN_WORDS.sub("", answer[match.end() :])
    if not unit:
        return number(match[0])
    glued = not unit.startswith(" ")
    if not _UNIT.fullmatch(unit) or _NO_UNIT.search(unit) or (glued and not _GLUED.fullmatch(unit.split(" ")[0])):
        return None
    return number(match[0])


def same(answer: str, reference: str, numbers: bool = True) -> bool:
    """Return whether two answers are equal: as numbers, as mathematics, or as text.

    Text is compared without regard to case and spaces. A percentage on one side means the number or its hundredth:
    `50%` equals `50` and `0.5`; two percentages are compared as they are. With ``numbers`` false only text is compared.
    """
    if " ".join(answer.split()).casefold() == " ".join(reference.split()).casefold():
        return True
    if not numbers:
        return False
    (given, one), (wanted, other) = readings(answer), readings(reference)
    if given and wanted:
        return max(given) == max(wanted) if one and other else bool(given & wanted)
    left, right = strip_markup(answer), strip_markup(reference)
    if " ".join(left.split()).casefold() == " ".join(right.split()).casefold():
        return True
    if not (_is_mathematics(left) and _is_mathematics(right)):
        return False
    return _equal(left, right)


def _is_mathematics(text: str) -> bool:
    """Return whether a text is nothing but an expression, and one that is fast to evaluate."""
    if not 0 < len(text) <= LONGEST or re.search(r"\d\s+\d|\d!|\^\s?\{?\s?-?\d{3}|\^[^^]*\^", text):
        return False
    words = re.findall(r"[^\W\d_]{2,}", _LETTERS_OF_MATHEMATICS.sub(" ", text))
    return not any(len(word) > 2 for word in words) and not re.search(r"[?!;]", text)


@lru_cache(maxsize=4096)
def _equal(answer: str, reference: str) -> bool:
    """Return whether math-verify finds two expressions equal; False where it fails or exceeds its time limit."""
    import logging

    from math_verify import LatexExtractionConfig, parse, verify  # imported here, because sympy takes a second

    # Silences the warning, at each call, that math-verify's own time limit is off.
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)
    given, wanted = (re.sub(r"(?<!\\)\bsqrt\s?\(([^()]*)\)", r"\\sqrt{\1}", text) for text in (answer, reference))
    given, wanted = (re.sub(r"(?<!\\)\bpi\b|π", r"\\pi ", text) for text in (given, wanted))
    try:
        with time_limit(SECONDS, UserError("the comparison takes too long")):
            how = [LatexExtractionConfig()]
            one, two = (
                parse(f"${text}$", how, fallback_mode="no_fallback", parsing_timeout=None) for text in (given, wanted)
            )
            return bool(one and two) and bool(verify(two, one, timeout_seconds=None))
    except Exception:  # sympy raises errors of any type on what a policy generates
        return False
