"""The answer in a text, whether it is the right one, and whether the text runs in circles. No torch here."""

from __future__ import annotations

import importlib.util
import re
from fractions import Fraction

from zconvert.errors import UserError
from zconvert.recipe.task import AnswerSection, CheckSection

_NUMBER = re.compile(r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:[eE][-+]?\d+)?|[-+]?\.\d+")
_FENCE = re.compile(r"^[ \t]*```([^\n`]*)$", re.MULTILINE)
_LONGEST_LOOP = 200
_LONGEST_EXPONENT = 5
"""characters; all digits of a number are written out, and those of 1e999999999 fill the memory"""


def extract(text: str, section: AnswerSection) -> str | None:
    """The answer in a text; None where there is none.

    >>> extract("It is 3, no, 1,204.", AnswerSection(take="last_number"))
    '1,204'
    >>> extract("so \\\\boxed{\\\\frac{1}{2}} it is", AnswerSection(take="boxed"))
    '\\\\frac{1}{2}'
    """
    if section.take == "regex":
        assert section.pattern is not None, "the recipe's checks let no regex without a pattern pass"
        return _last(re.findall(section.pattern, text))
    if section.take == "last_number":
        return _last(_NUMBER.findall(text))
    if section.take == "boxed":
        return _boxed(text)
    if section.take == "code_block":
        return _code(text).strip("\n") or None
    if section.take == "choice":
        return _choice(text, section.choices)
    return text if text.strip() else None


def _last(found: list[str]) -> str | None:
    return found[-1] if found else None


def _code(text: str) -> str:
    """Within the last fences. One that closes what the prompt opened is bare, stands behind something, and is odd."""
    fences = list(_FENCE.finditer(text))
    if not fences:
        return text
    if len(fences) % 2 and not fences[0][1].strip() and text[: fences[0].start()].strip():
        return text[: fences[0].start()]
    opening = fences[(len(fences) - 1) // 2 * 2]
    closing = next((fence for fence in fences if fence.start() > opening.start()), None)
    return text[opening.end() : closing.start() if closing else len(text)]


def _boxed(text: str) -> str | None:
    """Within the braces of the last `\\boxed{…}` that is closed."""
    starts = {match.end() for match in re.finditer(r"\\f?boxed\s*\{", text)}
    opened: list[int] = []
    last: tuple[int, int] | None = None
    for brace in re.finditer(r"[{}]", text):  # once: texts that open thousands are of models that run in circles
        if brace[0] == "{":
            opened.append(brace.end())
        elif opened and (start := opened.pop()) in starts:
            last = max(last or (0, 0), (start, brace.start()))
    return None if last is None else text[last[0] : last[1]].strip()


def _choice(text: str, letters: str) -> str | None:
    """The last letter said to be the answer, else the last that stands alone; "A" is also a word, "(A)" is not."""
    one = f"([{re.escape(letters)}])"
    said = re.findall(rf"(?i:answer|option|choice)(?i:\s+is)?[\s:*\"'(\[]*{one}\b", text)
    alone = re.findall(rf"\(\s*{one}\s*\)|^\s*{one}\s*[.):]?\s*$", text, re.MULTILINE)
    return _last(said) or _last([first or second for first, second in alone])


def is_right(answer: str | None, target: str, check: CheckSection) -> bool:
    """Whether an answer is the right one.

    Raises:
        UserError: what the check needs is not installed.
    """
    if answer is None:
        return False
    if check.method == "exact":
        return _plain(answer) == _plain(target)
    if check.method == "set":
        return _entries(answer) == _entries(target)
    if check.method == "math":
        return _plain(answer) == _plain(target) or _same_by_maths(answer, target)
    found, right = _number(answer), _number(target)
    if found is None or right is None:
        return False
    allowed = Fraction(check.tolerance)
    return abs(found - right) <= (allowed * abs(right) if abs(right) > 1 else allowed)


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()


def _entries(text: str) -> frozenset[str]:
    inner = text.strip().strip("{}[]()")
    return frozenset(_plain(entry.strip().strip("'\"")) for entry in inner.split(",") if entry.strip())


def _number(text: str) -> Fraction | None:
    """A number as people write it: with thousands' commas, a currency, a per cent sign, or as a fraction.

    >>> _number("$1,250.50"), _number("3/4"), _number("4 apples")
    (Fraction(2501, 2), Fraction(3, 4), None)
    """
    plain = text.strip().strip("$€£%").rstrip(".").replace(",", "").replace(" ", "").replace("\\!", "")
    if len(plain.lower().partition("e")[2]) > _LONGEST_EXPONENT:
        return None
    try:
        return Fraction(plain)
    except (ValueError, ZeroDivisionError):
        return None


def require_maths() -> None:
    """Raises a `UserError` where the library for `check.method: math` is not installed."""
    if importlib.util.find_spec("math_verify") is None:
        raise UserError(
            "symbolic maths needs math-verify", found="it is not installed", fix="pip install 'zconvert[math]'"
        )


def _same_by_maths(answer: str, target: str) -> bool:
    require_maths()
    from math_verify import parse, verify

    return bool(verify(parse(f"${target}$"), parse(f"${answer}$")))


def loops(text: str) -> bool:
    """Whether a text ends in circles: its last piece stands there so often that it fills 100 characters or more, and
    at least four times.

    >>> loops("So 2+3=5. " + "The answer is 5. " * 12), loops("The answer is 5. The answer is 5.")
    (True, False)
    """
    end = text.rstrip()
    for length in range(1, min(_LONGEST_LOOP, len(end) // 4) + 1):
        times = max(4, -(-100 // length))
        if len(end) >= length * times and end.endswith(end[-length:] * times):
            return True
    return False
