"""`tokenizer.json` without its merges, which are most of it and say nothing of entries and ids.

The file of a vocabulary of 262,144 is 33 MB: parsed whole it takes 300 MB and a second, without merges a third.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zconvert.checkpoint.json_patch import read_json_text
from zconvert.errors import UserError

_MOST_GROWTH = 1000
# A member called merges with a list of texts or of pairs of texts. Inside of a text the quotes around its name would be
# escaped, so it is not mistaken for one. The quantifiers are possessive: nothing is kept to go back to.
_TEXT = rb'"(?:[^"\\]|\\.)*+"'
_MERGES = re.compile(
    rb'"merges"\s*+:\s*+\[\s*+(?:(?:' + _TEXT + rb"|\[\s*+" + _TEXT + rb"\s*+,\s*+" + _TEXT + rb"\s*+\])\s*+,?\s*+)*+\]"
)


def read_without_merges(path: Path) -> str:
    """The text of a `tokenizer.json` whose merges are left out; a malformed file comes back as it is.

    Raises:
        UserError: the file cannot be read, or is not UTF-8.
    """
    return read_json_text(path, lambda content: _MERGES.sub(b'"merges":[]', content))


def check_growth(document: dict[str, Any], path: Path) -> None:
    """Refuses a tokenizer that would write a text out as one far longer, replacement after replacement.

    Forty replacements of a letter by two make a word into a terabyte, in a library that nothing interrupts.

    Args:
        document: contents of a `tokenizer.json`.
        path: its file, for messages.

    Raises:
        UserError: it would.
    """
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for content, pattern in _replacements(document.get(part)):
            growth = min(growth * max(1.0, len(content) / _shortest(pattern)), 1e300)
        if growth > _MOST_GROWTH:
            raise UserError(
                f"the {part} of {path} makes texts longer and longer",
                found=f"replacements that make a letter into {growth:.3g}",
                expected=f"at most {_MOST_GROWTH:,}",
                fix="download or copy the tokenizer again, from where you trust it",
            )


def _replacements(part: Any) -> Iterator[tuple[str, dict[str, Any]]]:
    """What is put in, and the pattern it is put in for, of all steps within a part."""
    waiting = [part]
    while waiting:
        step = waiting.pop()
        if isinstance(step, list):
            waiting += step
        elif isinstance(step, dict):
            waiting += [inner for inner in step.values() if isinstance(inner, list | dict)]
            content, pattern = step.get("content"), step.get("pattern")
            if step.get("type") == "Replace" and isinstance(content, str) and isinstance(pattern, dict):
                yield content, pattern


def _shortest(pattern: dict[str, Any]) -> float:
    """Characters that a match has at least; less than one where it matches between letters too."""
    if isinstance(text := pattern.get("String"), str) and text:
        return len(text)
    try:
        return 0.5 if re.search(str(pattern.get("Regex", "")), "") else 1
    except re.error:  # of another dialect
        return 0.5
