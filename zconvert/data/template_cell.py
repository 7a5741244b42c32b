"""Writes conversations by a chat template, in a process of its own: see templates.py. A script: it imports nothing of
zconvert.

A line of JSON for each conversation comes in, and one goes out: the text and its stretches, or what is wrong.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any

from jinja2 import TemplateError
from transformers.utils.chat_template_utils import render_jinja_template


def main(seconds: float, memory: int, characters: int) -> None:
    """Answers until there is no more to read.

    Args:
        seconds: for one text; the process ends at once when they are over.
        memory: bytes that it may take beyond those that it has at the start.
        characters: of one text, at most.
    """
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # whatever is printed is no answer
    _limit_memory(memory)
    for line in sys.stdin:
        _end_in(seconds)
        answer = json.dumps(_answer(json.loads(line), characters))
        _end_in(0)
        answers.write(answer + "\n")
        answers.flush()


def _answer(asked: dict[str, Any], characters: int) -> dict[str, Any]:
    render: Any = render_jinja_template  # its annotation says that it returns one text
    try:
        texts, spans = render(**asked)
    except MemoryError:
        return {"wrong": "it takes too much memory", "ended": False}
    except RecursionError:
        return {"wrong": "it calls itself too often, or nests too deep", "ended": True}
    except (TemplateError, TypeError, LookupError, ValueError, AttributeError, ArithmeticError) as error:
        return {"wrong": str(error)[:1000], "ended": True}
    if len(texts[0]) > characters:
        return {"wrong": f"it writes {len(texts[0]):,} characters, of {characters:,} at most", "ended": True}
    return {"text": texts[0], "spans": spans[0] if asked["return_assistant_tokens_mask"] else []}


def _end_in(seconds: float) -> None:
    """Has the process ended by a signal, also amid a single operation of Python's; 0 calls it off."""
    if hasattr(signal, "setitimer"):  # Windows has none
        signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit_memory(more: int) -> None:
    try:
        import resource

        with open("/proc/self/statm") as file:
            taken = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + more, taken + more))
    except (ImportError, OSError, ValueError):  # a system without such limits
        pass


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
