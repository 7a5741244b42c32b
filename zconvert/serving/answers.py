"""Texts -> the JSON that OpenAI's API answers with, whole or in a stream of events."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

DONE = b"data: [DONE]\n\n"
"""ends a stream"""

_FINISH = {"eos": "stop", "stop": "stop", "length": "length"}


@dataclass(frozen=True)
class Usage:
    """What a request took."""

    prompt_tokens: int
    completion_tokens: int
    forwards: int
    """after the prefills, of all texts together: tokens over forwards is what a forward yielded"""

    def to_dict(self) -> dict[str, Any]:
        """As the API tells it, and the forwards."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "forwards": self.forwards,
        }


@dataclass(frozen=True)
class Answer:
    """Writes the answer to one request.

    Args:
        model: its name.
        chat: of which endpoint.
        usage_at_end: the stream closes with the usage.
    """

    model: str
    chat: bool
    usage_at_end: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, texts: Sequence[tuple[str, str]], usage: Usage) -> dict[str, Any]:
        """All of it.

        Args:
            texts: of each choice its text, and why the engine ended it.
            usage: of all.
        """
        choices = []
        for index, (text, finish) in enumerate(texts):
            said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
            choices.append({"index": index, **said, "logprobs": None, "finish_reason": _FINISH[finish]})
        return {**self._head("chat.completion"), "choices": choices, "usage": usage.to_dict()}

    def opening(self, index: int) -> bytes:
        """The event before the text of a chat's choice."""
        return self._event(index, {"delta": {"role": "assistant", "content": ""}}, None)

    def piece(self, index: int, text: str) -> bytes:
        """The event of some more text."""
        return self._event(index, {"delta": {"content": text}} if self.chat else {"text": text}, None)

    def closing(self, index: int, finish: str) -> bytes:
        """The event that a choice's text has ended."""
        return self._event(index, {"delta": {}} if self.chat else {"text": ""}, _FINISH[finish])

    def end(self, usage: Usage) -> bytes:
        """The events after all texts."""
        if not self.usage_at_end:
            return DONE
        return event({**self._head("chat.completion.chunk"), "choices": [], "usage": usage.to_dict()}) + DONE

    def _event(self, index: int, said: dict[str, Any], finish: str | None) -> bytes:
        choice = {"index": index, **said, "logprobs": None, "finish_reason": finish}
        usage = {"usage": None} if self.usage_at_end else {}
        return event({**self._head("chat.completion.chunk"), "choices": [choice], **usage})

    def _head(self, chat_kind: str) -> dict[str, Any]:
        prefix, kind = ("chatcmpl", chat_kind) if self.chat else ("cmpl", "text_completion")
        return {"id": f"{prefix}-{self.id}", "object": kind, "created": self.created, "model": self.model}


def event(document: dict[str, Any]) -> bytes:
    """A server-sent event.

    >>> event({"a": 1})
    b'data: {"a": 1}\\n\\n'
    """
    return f"data: {json.dumps(document)}\n\n".encode()
