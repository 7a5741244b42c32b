"""The one exception that a user sees: what is wrong, what was found, what was expected, and the fix."""

from __future__ import annotations

import re

_OUT_OF_MEMORY = re.compile(r"out of memory|DefaultCPUAllocator: (?:can't|not enough)|[Cc]annot allocate memory")


class UserError(Exception):
    """A mistake or a circumstance that the user can mend; commands print it and exit 1, without a traceback.

    Args:
        what: the item and what is wrong with it, one sentence.
        found: what was found there.
        expected: what was expected instead.
        fix: what the user can do about it.

    >>> print(UserError("out is not empty", found="3 files", fix="choose another folder"))
    out is not empty
      found: 3 files
      fix: choose another folder
    """

    def __init__(self, what: str, *, found: object = None, expected: object = None, fix: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.found = None if found is None else str(found)
        self.expected = None if expected is None else str(expected)
        self.fix = fix

    def __str__(self) -> str:
        parts = (("found", self.found), ("expected", self.expected), ("fix", self.fix))
        return "\n".join([self.what, *(f"  {name}: {text}" for name, text in parts if text is not None)])


def out_of_memory(error: BaseException) -> str | None:
    """What an error says of memory that was not to be had, in short; None: it is about something else.

    >>> out_of_memory(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 80 GiB."))
    'CUDA out of memory. Tried to allocate 2.00 GiB'
    >>> out_of_memory(ValueError("no"))
    """
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError):
        return text or "no memory was left"
    if isinstance(error, RuntimeError | OSError) and _OUT_OF_MEMORY.search(text):
        text = text[text.find("DefaultCPUAllocator:") :] if "DefaultCPUAllocator:" in text else text
        return ". ".join(text.split(". ")[:2]).rstrip(".")
    return None
