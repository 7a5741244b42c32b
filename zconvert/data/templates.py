"""Chat templates, which are programs of strangers: Jinja's sandbox keeps them from files, this from time and memory.

They are run by a process of its own (template_cell.py), which ends itself when one takes too long: nothing can end a
loop over a hundred thousand times a hundred thousand numbers from within. It starts with the first conversation, in
about a second, and stays for the next ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.errors import UserError

_SCRIPT = Path(__file__).with_name("template_cell.py")
_SECRETS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
_FIX = (
    "mend the template (chat_template.jinja of the checkpoint, or chat_template of the recipe) or the row; or leave "
    "such rows out: datasets[].on_bad_row: skip"
)


@dataclass(frozen=True)
class Limits:
    """What a template may use for one conversation; real ones take milliseconds."""

    seconds: float = 10.0
    memory: int = 2**30
    """bytes"""
    characters: int = 2**25
    """that it writes"""


class Unending(UserError):
    """A template took more time or memory than it may: a fault of its own, not of a row that is to be left out."""


class Renderer:
    """Writes conversations in a process that is started when it is needed, and again after it ended."""

    def __init__(self, limits: Limits | None = None) -> None:
        """Starts nothing yet.

        Args:
            limits: None: the defaults.
        """
        self._limits = limits or Limits()
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[dict[str, Any]],
        template: str,
        *,
        tools: list[dict[str, Any]] | None = None,
        ask: bool = False,
        marks: bool = False,
        names: dict[str, str] | None = None,
    ) -> tuple[str, list[tuple[int, int]]]:
        """A conversation's text, as transformers writes it.

        Args:
            messages: each with its role.
            template: Jinja text.
            tools: that the template is told of.
            ask: end with what asks the assistant to speak.
            marks: tell where the template's `{% generation %}` stretches lie.
            names: what else the template can read, such as `bos_token`.

        Returns:
            the text, and with `marks` the (start, end) of each stretch, in characters.

        Raises:
            UserError: the template is malformed, refuses the conversation, or takes more than it may.
        """
        asked = {
            **(names or {}),
            "conversations": [list(messages)],
            "tools": tools,
            "chat_template": template,
            "return_assistant_tokens_mask": marks,
            "add_generation_prompt": ask,
        }
        try:
            # What is no JSON, such as a table's dates, templates see as the name of its type; so does transformers.
            line = json.dumps(asked, default=lambda value: f"<{type(value).__name__}>")
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError("the conversation is not what JSON can hold", found=str(error)[:200], fix=_FIX) from None
        answer = self._answer(line.encode() + b"\n")
        if "wrong" in answer:
            kind = UserError if answer["ended"] else Unending
            raise kind("the chat template refuses the conversation", found=answer["wrong"], fix=_FIX)
        return answer["text"], [(start, end) for start, end in answer["spans"]]

    @property
    def process_id(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def close(self) -> None:
        """Ends the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def forget(self) -> None:
        """In a fork: the process is the parent's."""
        self._lock, self._process = threading.Lock(), None

    def _answer(self, line: bytes) -> dict[str, Any]:
        with self._lock:
            if self._process is None:
                self._process = self._started()
            process, answer = self._process, b""
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(line)
                process.stdin.flush()
                answer = process.stdout.readline()
            except BrokenPipeError:
                pass
            finally:
                if not answer.endswith(b"\n"):  # it ended; or this was interrupted, and what comes next is no answer
                    self.close()
            if answer:
                found: dict[str, Any] = json.loads(answer)
                return found
            wrong = f"the process that runs it ends with {process.returncode}: {sys.executable} {_SCRIPT}"
            if hasattr(signal, "SIGALRM") and process.returncode == -signal.SIGALRM:
                wrong = f"it takes over {self._limits.seconds:g} seconds"
            return {"wrong": wrong, "ended": False}

    def _started(self) -> subprocess.Popen[bytes]:
        limits = self._limits
        return subprocess.Popen(
            # -P: the folder of the script is no place to import from
            [sys.executable, "-P", str(_SCRIPT), str(limits.seconds), str(limits.memory), str(limits.characters)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if not any(word in name for word in _SECRETS)},
            start_new_session=True,  # Ctrl-C is not its business
        )


shared = Renderer()
"""of this process"""
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=shared.forget)
