"""Finding the final answer in a response, and saying without a sub-process whether it equals the verified one.

Pure functions over strings: linear in the text, no imports of ours, so that the reward workers load them in no time.
Numbers are compared as rationals (0.5 = 1/2 exactly, 0.333 != 1/3); what isn't a number or a word is left to math-verify.
"""

import re
from collections import deque
from fractions import Fraction
from typing import Literal

Extraction = Literal["last-number", "box", "tag", "text"]
"""Where a response's answer stands: the last number anywhere (lenient), the last \\boxed{}, the last <answer> tag (or the
last box in it), or the whole response."""

MAX_DIGITS = 1000
"""A longer numeral is not read as a number: no verified answer is that long, and big integers cost quadratic time."""

# Grammar of one number. The sign counts only where no operand stands before it: "5-3" ends in 3, "x = -3" in -3.
_SIGN = r"(?:(?<![\w)\]}])[-+\u2212])?"
_CURRENCY = r"(?:\\?\$)?"
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_DECIMAL = rf"(?:(?<![A-Za-z0-9_])(?<![0-9]\.){_DIGITS}(?:\.[0-9]+)?|(?<![\w.])\.[0-9]+)"
_EXPONENT = r"(?:[eE][-+]?[0-9]+)?"
_FRACTION_ARGUMENTS = r"\{\s*(?P<top>[-+]?[0-9]+)\s*\}\{\s*(?P<bottom>[0-9]+)\s*\}|(?P<top1>[0-9])(?P<bottom1>[0-9])"
_LATEX_FRACTION = rf"\\[dtc]?frac(?:{_FRACTION_ARGUMENTS})"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN}){_CURRENCY}(?:{_LATEX_FRACTION}|(?P<value>{_DECIMAL})(?P<exponent>{_EXPONENT})(?:/(?P<over>[0-9]+))?)"
)
_AFTER_NUMBER = re.compile(r"[\s.*$)\]}]*")
_LATEX_SPACE = re.compile(r"\\[!,;: ]")
# On an answer whose numbers were replaced by "#": an operation that was left undone.
_COMPUTATION = re.compile(
    r"[+*×÷!]|\\(?:times|cdot|div|sqrt|binom|sum|prod)|\^(?!\s*\{?\s*\\circ)|[#)\]}]\s*/|/\s*[#(]|[-\u2212]\s*[#(\\]"
)
_BOX = re.compile(r"\\boxed\s*\{")
_WORDS = re.compile(r"[^\W\d_][^\W\d_]+(?:[ '\-][^\W\d_]+)*")
_TEXT_MACRO = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\s*\{([^{}]*)\}")


def last_boxed(text: str) -> str | None:
    """Content of the last \\boxed{...}, braces balanced (\\{ is a literal brace); None if absent or never closed."""
    opening = _last_match(_BOX, text)
    if opening is None:
        return None
    depth, position = 1, opening.end()
    while position < len(text):
        character = text[position]
        if character == "\\":
            position += 1
        elif character in "{}":
            depth += 1 if character == "{" else -1
            if depth == 0:
                return text[opening.end() : position].strip()
        position += 1
    return None


def last_tag(text: str, tag: str = "answer") -> str | None:
    """Content of the last complete <tag>...</tag>; None if there is none."""
    end = text.rfind(f"</{tag}>")
    start = text.rfind(f"<{tag}>", 0, max(end, 0))
    return None if start < 0 else text[start + len(tag) + 2 : end].strip()


def last_number(text: str) -> str | None:
    """The last number written in `text`, as it stands there ("1,234", "-3/4", "\\frac{1}{2}"); None if there is none.

    Lenient: it may stand in the middle of a sentence and carry a unit ("5km"), but not continue a word ("x2", "v1.5").
    """
    last = _last_match(_NUMBER, text)
    return last.group() if last else None


def ends_with_number(text: str) -> bool:
    """Whether the last thing in `text` is a number; after it only space and closing marks (. * $ ) ] }) may follow."""
    last = _last_match(_NUMBER, text)
    return last is not None and _AFTER_NUMBER.fullmatch(text, last.end()) is not None


def extract(text: str, how: Extraction) -> str | None:
    """The response's final answer, or None where it gives none (an empty one counts as none)."""
    if how == "last-number":
        return last_number(text)
    if how == "box":
        return last_boxed(text) or None
    if how == "tag":
        content = last_tag(text) or None
        return content and (last_boxed(content) or content)
    return text.strip() or None


def parse_number(text: str) -> Fraction | None:
    """The exact value of a string that is one number and nothing else, or None.

    Takes signs, thousands separators (1,234 or 1{,}234), decimals, exponents up to 99 in size, a/b, \\frac{a}{b}, and math or
    currency signs around it.
    """
    plain = _LATEX_SPACE.sub("", text.replace("{,}", ",")).strip()
    if plain.startswith("$") and plain.endswith("$"):
        plain = plain.strip("$").strip()
    plain = re.sub(r"(?<=[0-9])\s*/\s*(?=[0-9])", "/", plain).removesuffix(".")
    match = _NUMBER.fullmatch(plain)
    return _value(match) if match else None


def equivalent(answer: str, gold: str) -> bool | None:
    """Whether `answer` is the verified answer `gold`; None where only a symbolic comparison can tell.

    A computation that wasn't carried out ("3 + 4", "14/2", "\\sqrt{49}" for 7) is not the number: paying for it teaches the
    policy to restate the question. Words are compared as words, because math-verify reads "stop" as s*t*o*p = "pots".
    """
    expected, given = parse_number(gold), parse_number(answer)
    if expected is not None:
        whole = expected.denominator == 1
        if given is not None:
            return given == expected and not (whole and ("/" in answer or "frac" in answer))
        return False if _is_computation(answer, one_number=whole) else None
    words = _words(gold)
    if words is not None:
        return _words(answer) == words
    return True if _squeezed(answer) == _squeezed(gold) else None


def is_plain(gold: str) -> bool:
    """Whether a verified answer is a number or words, which need no symbolic reader."""
    return parse_number(gold) is not None or _words(gold) is not None


def normalized(answer: str) -> str:
    """One spelling for answers that are plainly the same (1.0 and 1, "Yes" and "yes"): the key of a majority vote."""
    number = parse_number(answer)
    return str(number) if number is not None else _words(answer) or _squeezed(answer)


def _last_match(pattern: re.Pattern, text: str) -> re.Match | None:
    newest = deque(pattern.finditer(text), maxlen=1)
    return newest[0] if newest else None


def _value(match: re.Match) -> Fraction | None:
    if len(match.group()) > MAX_DIGITS:
        return None
    top = match["top"] or match["top1"]
    if top is not None:
        numerator, denominator = Fraction(top), Fraction(match["bottom"] or match["bottom1"])
    else:
        exponent = int(match["exponent"][1:] or 0)
        if abs(exponent) > 99:
            return None
        numerator = Fraction(match["value"].replace(",", "")) * Fraction(10) ** exponent
        denominator = Fraction(match["over"] or 1)
    if denominator == 0:
        return None
    return numerator / denominator * (-1 if match["sign"] in ("-", "\u2212") else 1)


def _is_computation(answer: str, one_number: bool) -> bool:
    """Whether an answer that isn't a plain number still has an operation in it (or a second number, where one is due)."""
    marked = _NUMBER.sub("#", _LATEX_SPACE.sub("", answer))
    return _COMPUTATION.search(marked) is not None or (one_number and marked.count("#") > 1)


def _words(text: str) -> str | None:
    """The case-folded words of an answer that is nothing else; None for anything else, and for "x" or "ab" (a product)."""
    plain = _squeezed(_TEXT_MACRO.sub(r"\1", text)).strip("$").removesuffix(".")
    is_text = _WORDS.fullmatch(plain) and (len(plain) > 2 or _TEXT_MACRO.search(text))
    return plain.casefold() if is_text else None


def _squeezed(text: str) -> str:
    return " ".join(text.split())
