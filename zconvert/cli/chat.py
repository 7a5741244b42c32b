"""`zconvert generate --chat`: a conversation in the terminal."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

from rich.text import Text

from zconvert.cli.streaming import Show, Tally, write
from zconvert.cli.ui import err, out, plural, print_error
from zconvert.data.chat import asking_ids, template_of
from zconvert.errors import UserError
from zconvert.serving.text import GrowingText
from zconvert.tidar.decoding import Request
from zconvert.tidar.engine import Engine

_RESET = "/reset and begin anew"


def require_template(tokenizer: Any) -> None:
    """Refuses a checkpoint that no conversation can be written for.

    Raises:
        UserError: its tokenizer has no chat template.
    """
    try:
        template_of(tokenizer, None)
    except UserError as error:
        raise UserError(
            "this checkpoint cannot chat: it has no chat template",
            expected="chat_template.jinja beside its tokenizer",
            fix="generate from a plain prompt, or take a checkpoint that was trained on conversations",
        ) from error


@dataclass
class Chat:
    """A conversation with a checkpoint.

    Args:
        engine: of the checkpoint, with nothing to do.
        tokenizer: its own, with a chat template.
        max_new_tokens: of an answer, at most.
        stops: strings that end an answer.
        seed: of the first answer; each later one has the next.
        show: shows the answers.
        context: tokens of the conversation and an answer, at most; None: no limit.
    """

    engine: Engine
    tokenizer: Any
    max_new_tokens: int
    stops: list[str]
    seed: int | None
    show: Show
    context: int | None = None
    messages: list[dict[str, Any]] = field(default_factory=list)
    answers: int = 0
    tokens: int = 0
    forwards: int = 0

    def talk(self) -> None:
        """Answers what is read from stdin, line by line, until its end or /quit."""
        asks = sys.stdin.isatty()
        if asks:
            with suppress(ImportError):  # where there is none, lines are typed without it
                import readline  # noqa: F401  # lets `input` edit lines and bring back earlier ones
            err.print("/reset forgets the conversation, /quit ends it, Ctrl-C stops an answer.", style="dim")
        while (line := _read_line(asks)) is not None:
            if line == "/quit":
                return
            if line == "/reset":
                self.messages.clear()
                err.print("Forgotten.", style="dim")
            elif line.startswith("/"):
                err.print(Text(f"There is no {line}: /reset or /quit."))
            elif line:
                self._answer(line)

    def _answer(self, line: str) -> None:
        """Shows an answer, and what it took; one that was stopped stays as far as it got."""
        said = [*self.messages, {"role": "user", "content": line}]
        try:
            prompt = asking_ids(said, self.tokenizer)
            if self.context is not None and len(prompt) + self.max_new_tokens > self.context:
                raise UserError("the conversation is too long", found=plural(len(prompt), "token"), fix=_RESET)
        except UserError as error:  # such as a template that wants the roles to take turns
            print_error(UserError(error.what, found=error.found, fix=_RESET))
            return
        seed = None if self.seed is None else self.seed + self.answers
        text, tally = GrowingText(self.tokenizer, prompt, self.stops), Tally()
        with _interrupts() as interrupted:
            written, result = write(
                self.engine,
                Request(prompt, self.max_new_tokens, seed=seed),
                text,
                self.show,
                tally,
                wanted=lambda: not interrupted.is_set(),
            )
        out.print()
        self.messages = [*said, {"role": "assistant", "content": written}]
        self.answers += 1
        self.tokens += sum(result.accepted)
        self.forwards += result.forwards
        if tally.tokens:
            err.print(Text(f"{tally}{self._so_far()}", style="dim"), soft_wrap=True)

    def _so_far(self) -> str:
        if self.answers < 2 or not self.forwards:
            return ""
        return f"; {self.tokens / self.forwards:.2f} tokens a forward in {plural(self.answers, 'answer')}"


def _read_line(asks: bool) -> str | None:
    """The next line; None at the end. Ctrl-C throws away what was typed."""
    while True:
        try:
            return (input("> ") if asks else input()).strip()
        except EOFError:
            if asks:
                err.print()  # the shell's prompt gets a line of its own
            return None
        except KeyboardInterrupt:
            if not asks:
                raise
            err.print()


@contextmanager
def _interrupts() -> Iterator[threading.Event]:
    """Ctrl-C sets the event, so that it stops an answer between two forwards and never within one."""
    interrupted = threading.Event()
    before = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
