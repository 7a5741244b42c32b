"""Rows -> documents: in this process or in others in the background, always in the rows' order.

A row that cannot be used comes out as the error that says where it stands and what is wrong with it.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import re
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

from zconvert.data.chat import conversation, template_of
from zconvert.data.documents import Document
from zconvert.data.reading import RawRow
from zconvert.data.templates import Unending
from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe

ROWS_AT_ONCE = 1000
_SURROGATES = re.compile("[\ud800-\udfff]")
_SHOWN = 5
"""bad rows of a dataset that are told of one by one"""

OnMessage = Callable[[str], None]
Outcome = list[Document] | UserError
"""what a row became: its documents, or what is wrong with it"""


@dataclass(frozen=True)
class Rules:
    """How the rows of one dataset become documents.

    Args:
        dataset: its entry in the recipe.
        tokenizer: a transformers tokenizer.
        sequence_len: tokens per training row: longer texts are cut where `split_long` says, longer conversations are
            bad rows. None: no limit.
        chat_template: Jinja text; the tokenizer's own where None.
    """

    dataset: DatasetRecipe
    tokenizer: Any
    sequence_len: int | None = None
    chat_template: str | None = None

    def __post_init__(self) -> None:
        """Refuses a tokenizer that cannot tell where its tokens lie, where that is needed."""
        needed = self.dataset.type == "chat" or self.dataset.split_long == "paragraph"
        if needed and not self.tokenizer.is_fast:
            raise UserError(
                "the tokenizer cannot tell where in the text its tokens lie",
                found=f"the slow {type(self.tokenizer).__name__}",
                expected="a fast tokenizer, for conversations and split_long: paragraph",
                fix="put a tokenizer.json into the checkpoint",
            )

    def identity(self) -> str:
        """A hash of all that decides the tokens of a row."""
        reading = {"path", "self_generated", "name", "split", "revision", "weight", "streaming", "shuffle_buffer_size"}
        chat = self.dataset.type == "chat"
        cut = chat or self.dataset.split_long != "tokens"
        parts = [
            self.dataset.model_dump(mode="json", exclude=reading),
            _tokenizer_text(self.tokenizer),
            template_of(self.tokenizer, self.chat_template) if chat else None,
            self.sequence_len if cut else None,
        ]
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _tokenizer_text(tokenizer: Any) -> list[Any]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    return [text, tokenizer.bos_token_id, tokenizer.eos_token_id]


def tokenise(rules: Rules, rows: Sequence[RawRow]) -> list[Outcome]:
    """What each of some rows becomes; raises for no row's fault, but for a chat template's that does not end."""
    values: list[Any] = []
    for row in rows:
        try:
            value = parse(row, rules.dataset)
            if rules.dataset.type == "chat":
                document = conversation(value, rules.dataset, rules.tokenizer, rules.chat_template)
                if rules.sequence_len is not None and len(document.ids) > rules.sequence_len:
                    raise UserError(
                        "the conversation is longer than a row",
                        found=f"{len(document.ids):,} tokens",
                        expected=f"at most sequence_len, {rules.sequence_len:,}",
                        fix="raise sequence_len, or leave such rows out: datasets[].on_bad_row: skip",
                    )
                values.append([document])
            else:
                values.append(text_of(value, rules.dataset.field))
        except Unending as error:  # and so it would be with the next million rows
            raise at_row(row, error) from None
        except UserError as error:
            values.append(at_row(row, error))
    texts = [value for value in values if isinstance(value, str)]
    if not texts:
        return values
    cutting = rules.sequence_len is not None and rules.dataset.split_long == "paragraph"
    encoded = rules.tokenizer(texts, add_special_tokens=False, return_offsets_mapping=cutting)
    offsets = encoded["offset_mapping"] if cutting else [None] * len(texts)
    tokens = iter(zip(encoded["input_ids"], offsets, strict=True))
    for number, value in enumerate(values):
        if isinstance(value, str):
            ids, where = next(tokens)
            values[number] = _documents(ids, where, value, rules) if ids else at_row(rows[number], _empty())
    return values


def parse(row: RawRow, dataset: DatasetRecipe) -> Any:
    """A row's contents: a dict, or the text of a whole file.

    Raises:
        UserError: it is too long, not UTF-8, no JSON or no JSON object.
    """
    if row.too_long is not None:
        raise UserError(
            "it is absurdly long",
            found=f"{row.too_long:,} bytes",
            expected=f"at most max_row_bytes, {dataset.max_row_bytes:,}",
            fix="raise datasets[].max_row_bytes if this is meant",
        )
    if isinstance(row.value, dict):
        return row.value
    try:
        text = row.value.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            "it is not UTF-8",
            found=f"byte {error.object[error.start]:#04x} at {error.start:,}",
            fix="convert the file to UTF-8",
        ) from None
    if not row.is_json:
        return text
    fix = "each line must be a JSON object"
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError("it is not JSON", found=error, fix=fix) from None
    if not isinstance(value, dict):
        raise UserError("it is not a JSON object", found=type(value).__name__, fix=fix)
    return value


def text_of(value: Any, *fields: str) -> str:
    """The text of a plain document or prompt.

    Args:
        value: a row, or the text of a whole file.
        fields: keys of the text; the first one that the row has a value for counts.

    Raises:
        UserError: there is none.
    """
    if isinstance(value, dict):
        fix = f"each row must have a text under {' or '.join(map(repr, fields))} (datasets[].field in the recipe)"
        there = sorted((field for field in fields if field in value), key=lambda field: value[field] is None)
        if not there:
            wanted = " and ".join(map(repr, fields))
            raise UserError(f"it lacks {wanted}", found="keys " + ", ".join(map(repr, value)), fix=fix)
        field, value = there[0], value[there[0]]
        if not isinstance(value, str):
            raise UserError(f"{field!r} is no text", found=type(value).__name__, fix=fix)
        if _SURROGATES.search(value):
            raise UserError(f"{field!r} holds half a character (a lone surrogate)", fix="mend the text")
    if not value.strip():
        raise _empty()
    return str(value)


def _empty() -> UserError:
    return UserError("it is empty", expected="some text", fix="leave such rows out: datasets[].on_bad_row: skip")


def at_row(row: RawRow, error: UserError) -> UserError:
    """What is wrong with a row, with where it stands before it."""
    what = error.what.removeprefix("it ")
    joint = " " if what != error.what else ": "
    return UserError(row.where + joint + what, found=error.found, expected=error.expected, fix=error.fix)


def _documents(ids: list[int], offsets: Any, text: str, rules: Rules) -> list[Document]:
    tokenizer, dataset = rules.tokenizer, rules.dataset
    bos = tokenizer.bos_token_id if dataset.add_bos else None
    eos = tokenizer.eos_token_id if dataset.add_eos else None
    # A text that already carries the marks keeps them single.
    before = [bos] if bos is not None and ids[0] != bos else []
    after = [eos] if eos is not None and ids[-1] != eos else []
    whole = [*before, *ids, *after]
    scored = [not (position == 0 and token == bos) for position, token in enumerate(whole)]
    if offsets is None or rules.sequence_len is None or len(whole) <= rules.sequence_len:
        return [Document(whole, scored)]
    # Where a token begins in the text; the marks around it have no place to cut before them.
    begins = [0] * len(before) + [start for start, _ in offsets]
    cuts = [0, *paragraph_cuts(text, begins, len(whole), rules.sequence_len), len(whole)]
    return [Document(whole[a:b], scored[a:b]) for a, b in pairwise(cuts)]


def paragraph_cuts(text: str, begins: Sequence[int], count: int, sequence_len: int) -> list[int]:
    """Before which tokens a long text is cut, so that each piece has at most `sequence_len` of them.

    A piece ends after the last empty line in its second half, else after the last line there, else where it is full.

    Args:
        text: all of it.
        begins: where tokens begin in it, in characters.
        count: tokens in all, perhaps some more than have a place in the text.
        sequence_len: of a piece, at most.

    >>> paragraph_cuts("a b\\n\\nc d e\\nf g", [0, 2, 5, 7, 9, 11, 13], 7, 4)
    [2, 5]
    """
    cuts: list[int] = []
    start = 0
    while count - start > sequence_len:
        full = start + sequence_len
        window = [n for n in range(full, start + sequence_len // 2 - 1, -1) if n < len(begins)]
        cut = full
        for separator in ("\n\n", "\n"):
            found = next((n for n in window if _before(text, begins[n]).endswith(separator)), None)
            if found is not None:
                cut = found
                break
        cuts.append(cut)
        start = cut
    return cuts


def _before(text: str, place: int) -> str:
    """A few characters before a place, without blanks at their end."""
    return text[max(0, place - 16) : place].rstrip(" ")


class Workers:
    """Applies rules to rows: in `processes` others, or in this one where that is 0."""

    def __init__(self, rules: Sequence[Rules], processes: int) -> None:
        """Starts the processes, each with a copy of all rules.

        Args:
            rules: of every dataset.
            processes: how many.
        """
        self._rules = list(rules)
        self.processes = processes
        self._pool: ProcessPoolExecutor | None = None
        if processes:
            self._pool = ProcessPoolExecutor(
                processes, multiprocessing.get_context("spawn"), initializer=_begin, initargs=(self._rules,)
            )

    def submit(self, dataset: int, rows: Sequence[RawRow]) -> Future[list[Outcome]]:
        """Has some rows of one dataset tokenised."""
        if self._pool is not None:
            return self._pool.submit(_work, dataset, rows)
        done: Future[list[Outcome]] = Future()
        done.set_result(tokenise(self._rules[dataset], rows))
        return done

    def outcomes(self, dataset: int, rows: Iterable[RawRow]) -> Iterator[Outcome]:
        """What each row became, in order; at most a few batches are ahead."""
        waiting: deque[Future[list[Outcome]]] = deque()
        rows = iter(rows)
        while batch := list(islice(rows, ROWS_AT_ONCE)):
            waiting.append(self.submit(dataset, batch))
            if len(waiting) > 2 * self.processes:
                yield from result_of(waiting.popleft())
        while waiting:
            yield from result_of(waiting.popleft())

    def close(self) -> None:
        """Ends the processes; what they were doing is dropped."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)


def result_of(future: Future[list[Outcome]]) -> list[Outcome]:
    """Waits for a batch.

    Raises:
        UserError: the process died.
    """
    try:
        return future.result()
    except BrokenProcessPool as error:
        raise UserError(
            "a process that tokenises died", found=error, fix="free some memory, or lower dataset_num_proc"
        ) from error


_worker_rules: list[Rules] = []


def _begin(rules: list[Rules]) -> None:
    """In a worker: Ctrl-C reaches it too, but ending it is its parent's business."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker_rules[:] = rules


def _end_with_parent() -> None:
    """A parent that is killed tells nobody, and its workers would wait for rows for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker was started by another process"
    parent.join()
    os._exit(1)


def _work(dataset: int, rows: Sequence[RawRow]) -> list[Outcome]:
    return tokenise(_worker_rules[dataset], rows)


class BadRows:
    """What happens to the bad rows of one dataset: the first ends it all, or all are told of and left out."""

    def __init__(self, dataset: DatasetRecipe, on_message: OnMessage | None) -> None:
        """Starts the count.

        Args:
            dataset: says which of the two.
            on_message: is told of the first few.
        """
        self.dataset = dataset
        self.count = 0
        self._on_message = on_message

    def good(self, outcomes: Iterable[Outcome]) -> Iterator[list[Document]]:
        """The documents of each good row.

        Raises:
            UserError: a row is bad, and `on_bad_row` is error.
        """
        for outcome in outcomes:
            if not isinstance(outcome, UserError):
                yield outcome
                continue
            if self.dataset.on_bad_row == "error":
                raise outcome
            self.count += 1
            if self.count <= _SHOWN:
                found = f" ({outcome.found})" if outcome.found else ""
                self._tell(f"left out: {outcome.what}{found}")

    def summary(self) -> None:
        """Tells how many there were, where more were left out than told of."""
        if self.count > _SHOWN:
            self._tell(f"left out: {self.count:,} bad rows of {self.dataset.label} in all")

    def _tell(self, text: str) -> None:
        if self._on_message is not None:
            self._on_message(text)
