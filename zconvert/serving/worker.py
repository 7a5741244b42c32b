"""The one thread that holds the engine. Others hand it jobs and are told of text; they never touch the engine."""

from __future__ import annotations

import logging
import queue
import threading
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from zconvert.serving.text import GrowingText
from zconvert.tidar.decoding import Request, Result
from zconvert.tidar.engine import Counters, Engine

_MOST_FAILURES = 3  # forwards that fail in a row, until the engine is given up
_CLOSE_SECONDS = 30
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """What a job's text has gained."""

    text: str
    tokens: int
    """new ones so far, in total"""
    forwards: int
    """after the prefill, so far"""
    finish: str | None = None
    """None: the text goes on. Else why it ended, see `Result`, or `failed`: the engine broke"""


@dataclass(eq=False)
class Job:
    """A text to write. A job ends with the one piece that has a `finish`."""

    request: Request
    text: GrowingText
    on_piece: Callable[[Piece], None]
    """called in the worker's thread, which waits for it"""


@dataclass(frozen=True)
class State:
    """What the worker is at, as of its last forward."""

    running: int = 0
    """texts in the batch"""
    waiting: int = 0
    counters: Counters = field(default_factory=Counters)
    """a copy"""
    alive: bool = True
    """it takes jobs"""


class Worker:
    """Runs an engine in a thread of its own."""

    def __init__(self, make_engine: Callable[[], Engine]) -> None:
        """Starts nothing yet.

        Args:
            make_engine: called in the thread; again when a forward failed, which may have left an engine half-way.
        """
        self._make_engine = make_engine
        self._inbox: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="zconvert-engine", daemon=True)
        self.state = State()
        """replaced by the thread, whole; anyone may read it"""

        # The thread's own.
        self._engine: Engine
        self._waiting: deque[Job] = deque()
        self._running: dict[Job, Result] = {}
        self._failures = 0

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Hands over a job."""
        self._inbox.put(("add", job))

    def cancel(self, job: Job) -> None:
        """Ends a job before its time; nothing happens where it has ended."""
        self._inbox.put(("cancel", job))

    def cancel_all(self) -> None:
        """Ends all jobs that were handed over so far."""
        self._inbox.put(("cancel all", None))

    def close(self) -> None:
        """Ends all jobs and the thread, and waits for it, unless a forward of it hangs."""
        self._inbox.put(("close", None))
        self._thread.join(_CLOSE_SECONDS)

    def _run(self) -> None:
        try:
            self._engine = self._make_engine()
            while self._hear():
                self._tell_state()
                if not self._engine.idle:
                    self._step()
        except Exception:
            _log.exception("the engine is given up")
        finally:
            self.state = replace(self.state, running=0, waiting=0, alive=False)
            while not self._inbox.empty():
                what, job = self._inbox.get()
                if what == "add" and job is not None:
                    self._waiting.append(job)
            self._lose([*self._running, *self._waiting])

    def _hear(self) -> bool:
        """Does what others asked for, waiting for it where there is nothing else to do; False: to close."""
        while not self._inbox.empty() or (self._engine.idle and not self._waiting):
            self._tell_state()
            what, job = self._inbox.get()
            if job is None:
                for one in [*self._waiting, *self._running]:
                    self._cancel(one)
                if what == "close":
                    return False
            elif what == "cancel":
                self._cancel(job)
            else:
                self._waiting.append(job)
        # Those that wait stay out of the engine, so that one who leaves leaves nothing behind.
        while self._waiting and self._engine.room > 0:
            job = self._waiting.popleft()
            self._running[job] = self._engine.add(replace(job.request, stop=job.text.stop, key=job))
        return True

    def _step(self) -> None:
        try:
            events = self._engine.step()
        except Exception:  # whatever it is, each client is to have an answer
            self._failures += 1
            if self._failures == _MOST_FAILURES:
                raise
            _log.exception("a forward failed: %d texts are lost", len(self._running))
            self._lose([*self._running])
            self._running.clear()
            # Nobody knows what the forward left behind.
            counters = self._engine.counters
            self._engine = self._make_engine()
            self._engine.counters = counters
            return
        self._failures = 0
        for result, step in events:
            job: Job = result.request.key
            if step.finish is not None:
                del self._running[job]
            self._tell(job, result, step.finish)

    def _cancel(self, job: Job) -> None:
        if job in self._running:
            result = self._running.pop(job)
            self._engine.cancel(result)
            self._tell(job, result, "cancelled")
        elif job in self._waiting:
            self._waiting.remove(job)
            job.on_piece(Piece("", 0, 0, "cancelled"))

    @staticmethod
    def _lose(jobs: list[Job]) -> None:
        for job in jobs:
            job.on_piece(Piece("", 0, 0, "failed"))

    def _tell(self, job: Job, result: Result, finish: str | None = None) -> None:
        text = job.text.take(final=finish is not None)
        job.on_piece(Piece(text, len(result.tokens), result.forwards, finish))

    def _tell_state(self) -> None:
        counters = self._engine.counters
        copied = replace(counters, verified=Counter(counters.verified))
        self.state = State(len(self._running), len(self._waiting), counters=copied)
