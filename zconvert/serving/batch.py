"""A JSONL file of prompts -> a JSONL file of texts, row by row as they end; run again, it goes on where it was."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import writing
from zconvert.checkpoint.load import prompt_ids
from zconvert.data.chat import asking_ids
from zconvert.errors import UserError
from zconvert.serving.prompts import Row
from zconvert.serving.text import GrowingText
from zconvert.tidar.decoding import Request
from zconvert.tidar.engine import Engine, run


@dataclass(frozen=True)
class Settings:
    """What rows share that do not say otherwise."""

    max_new_tokens: int
    seed: int | None = None
    """row i has this seed + i: what is done already does not matter to a text"""
    stops: Sequence[str] = ()
    add_bos: bool = True
    context: int | None = None
    """tokens of a prompt and its text at most"""


def write_texts(
    engine: Engine,
    tokenizer: Any,
    rows: Sequence[Row],
    done: set[int],
    out: Path,
    settings: Settings,
    on_text: Callable[[int], None] | None = None,
) -> int:
    """Decodes the rows that are not done and adds each text to the file when it ends.

    Args:
        engine: with nothing to do.
        tokenizer: of its checkpoint.
        rows: from `read_rows`.
        done: from `rows_done`.
        out: the file; it has a line for each row at the end, in the order in which they ended.
        settings: of all rows.
        on_text: is told how many rows are done.

    Returns:
        new tokens.

    Raises:
        UserError: a row's prompt cannot be used (told before anything is decoded), or the file cannot be written.
    """
    requests = [_request(index, row, tokenizer, settings) for index, row in enumerate(rows) if index not in done]
    count, tokens = len(rows) - len(requests), 0

    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with out.open("a", encoding="utf-8") as file:
            for result in run(engine, requests):
                index, text = result.request.key
                told = {
                    "index": index,
                    **rows[index].given,
                    "text": text.take(final=True),
                    "finish": result.finish,
                    "tokens": len(result.tokens),
                    "forwards": result.forwards,
                }
                file.write(json.dumps(told) + "\n")
                file.flush()
                count, tokens = count + 1, tokens + len(result.tokens)
                if on_text is not None:
                    on_text(count)
    return tokens


def row_ids(row: Row, tokenizer: Any, *, add_bos: bool = True) -> list[int]:
    """A row's prompt as tokens.

    Raises:
        UserError: it cannot be used; the line is told.
    """
    try:
        if row.prompt is not None:
            return prompt_ids(tokenizer, row.prompt, add_bos=add_bos)
        assert row.messages is not None
        return asking_ids(row.messages, tokenizer)
    except UserError as error:
        raise UserError(f"line {row.line} of the prompts: {error.what}", found=error.found, fix=error.fix) from None


def _request(index: int, row: Row, tokenizer: Any, settings: Settings) -> Request:
    prompt = row_ids(row, tokenizer, add_bos=settings.add_bos)
    new_tokens = row.max_new_tokens or settings.max_new_tokens
    if settings.context is not None and len(prompt) + new_tokens > settings.context:
        raise UserError(
            f"line {row.line} of the prompts does not fit the checkpoint's context",
            found=f"{len(prompt)} tokens, and {new_tokens} new ones",
            expected=f"at most {settings.context} together",
            fix="shorten it, or lower --max-new-tokens",
        )
    seed = settings.seed + index if row.seed is None and settings.seed is not None else row.seed
    text = GrowingText(tokenizer, prompt, settings.stops)
    return Request(prompt, new_tokens, seed=seed, stop=text.stop, key=(index, text))
