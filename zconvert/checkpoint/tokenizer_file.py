"""`tokenizer.json` without its merges, which are most of it and say nothing of entries and ids.

The file of a vocabulary of 262,144 is 33 MB: parsed whole it takes 300 MB and a second, without merges a third.
"""

from __future__ import annotations

import re
from pathlib import Path

from zconvert.checkpoint.small_files import read_small
from zconvert.errors import UserError

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
    try:
        return _MERGES.sub(b'"merges":[]', read_small(path)).decode("utf-8")
    except OSError as error:
        raise UserError(f"{path} cannot be read", found=error.strerror) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a JSON file", found=str(error), expected="UTF-8 text") from error
