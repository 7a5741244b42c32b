"""Tokens -> text as it grows: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


class TextStream:
    """Tokens in, text out: what each step adds to the text, whole characters only.

    A token's text depends on those before it (a leading space, the bytes of one character), so a window of them is
    decoded along and only what is new is returned.
    """

    def __init__(self, tokenizer: Any, prompt: list[int]) -> None:
        """Starts behind a prompt, which is not returned."""
        self._tokenizer = tokenizer
        self._ids = list(prompt)
        self._start = 0
        self._done = len(prompt)

    def add(self, tokens: Sequence[int]) -> str:
        """The text that these tokens add; empty while a character is incomplete."""
        self._ids += tokens
        return self._new(final=False)

    def flush(self) -> str:
        """What was held back."""
        return self._new(final=True)

    def _new(self, *, final: bool) -> str:
        before, now = self._decode(self._ids[self._start : self._done]), self._decode(self._ids[self._start :])
        if len(now) <= len(before) or (now.endswith("\N{REPLACEMENT CHARACTER}") and not final):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return now[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class StopStrings:
    """Text in pieces, up to the first of some strings. What may be the beginning of one is held back.

    >>> stops = StopStrings(["END"])
    >>> [stops.add("one E"), stops.add("ND two"), stops.found]
    ['one ', '', True]
    """

    def __init__(self, strings: Sequence[str]) -> None:
        """Looks for these, none empty."""
        self._strings = tuple(strings)
        self._held = ""
        self.found = False
        """the text is at its end"""

    def add(self, piece: str) -> str:
        """The text that is sure to come before any stop string."""
        if self.found:
            return ""
        text = self._held + piece
        # What ends first was found first: how the text is cut into pieces must not matter.
        ends = [(place + len(stop), place) for stop in self._strings if (place := text.find(stop)) >= 0]
        if ends:
            self.found, self._held = True, ""
            return text[: min(ends)[1]]
        longest = min(len(text), max(map(len, self._strings), default=1) - 1)
        sizes = (size for size in range(longest, 0, -1) if self._may_begin(text[-size:]))
        keep = len(text) - next(sizes, 0)
        self._held = text[keep:]
        return text[:keep]

    def flush(self) -> str:
        """What was held back: the text ended without a stop string."""
        held, self._held = self._held, ""
        return held

    def _may_begin(self, tail: str) -> bool:
        return any(stop.startswith(tail) for stop in self._strings)


class GrowingText:
    """A request's text, cut before its first stop string. `stop` goes into the `Request`; `take` gives what is new."""

    def __init__(self, tokenizer: Any, prompt: list[int], stops: Sequence[str] = ()) -> None:
        """Starts behind a prompt.

        Args:
            tokenizer: of the checkpoint.
            prompt: token ids.
            stops: strings that end the text, none empty.
        """
        self._stream = TextStream(tokenizer, prompt)
        self._stops = StopStrings(stops)
        self._one_by_one = bool(stops)
        self._read = 0
        self._new = ""

    def stop(self, tokens: list[int]) -> int | None:
        """Reads on in the new tokens, of which all are given; how many are the whole text, where a string ends it."""
        size = 1 if self._one_by_one else max(len(tokens) - self._read, 1)
        while self._read < len(tokens):
            piece = self._stream.add(tokens[self._read : self._read + size])
            self._read += size
            self._new += self._stops.add(piece)
            if self._stops.found:
                return self._read
        return None

    def take(self, *, final: bool = False) -> str:
        """The text since the last call; with `final`, to its end."""
        if final:
            self._new += self._stops.add(self._stream.flush()) + self._stops.flush()
        new, self._new = self._new, ""
        return new
