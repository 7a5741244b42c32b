"""Files of prompts and of their texts as they lie on disk; torch is not needed, so that mistakes are told at once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import from_json

from zconvert.checkpoint.folder import writing
from zconvert.errors import UserError
from zconvert.recipe.data import PROMPT_FIELDS

_EXPECTED = 'one JSON object a line, with "prompt", else "text", or with "messages"; "id", "seed", "max_new_tokens" too'
_BEGINNING = b'{"index": '
"""of every line that `write_texts` writes"""


class Row(BaseModel):
    """A line of the file of prompts; what else it holds is passed over."""

    model_config = ConfigDict(strict=True, frozen=True)

    line: int
    """its number in the file, from 1"""
    id: int | str | None = None
    """is told along with the text"""
    prompt: str | None = None
    messages: list[dict[str, Any]] | None = None
    seed: int | None = None
    max_new_tokens: int | None = None

    @model_validator(mode="after")
    def _has_one_prompt(self) -> Row:
        if self.prompt is not None and self.messages is not None:
            raise ValueError("it has both a prompt and messages")
        roles = [message.get("role") for message in self.messages or []]
        if self.prompt is None and not (roles and all(isinstance(role, str) for role in roles)):
            raise ValueError("expected at least one message, each with its role")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ValueError("max_new_tokens is below 1")
        if self.seed is not None and not 0 <= self.seed < 2**63:
            raise ValueError("seed is below 0, or too large")
        return self

    @property
    def given(self) -> dict[str, Any]:
        """What tells it from other rows."""
        return self.model_dump(include={"id", "prompt", "messages"}, exclude_none=True)


def read_rows(path: Path) -> list[Row]:
    """The rows of a file of prompts.

    Raises:
        UserError: it cannot be read, a line is not what it should be (with its number), or there is none.
    """
    rows = []
    for number, line in enumerate(_read_lines(path), 1):
        if not line.strip():
            continue
        try:
            rows.append(_row(line, number))
        except ValueError as error:
            what, found = f"{path}, line {number} is no row of prompts", _said(error)
            raise UserError(what, found=found, expected=_EXPECTED, fix="correct the line") from None
    if not rows:
        raise UserError(f"{path} has no prompts", found="no lines", expected=_EXPECTED, fix="give a file with some")
    return rows


def _row(line: str, number: int) -> Row:
    """A line as a row; a `ValueError` says why it is none."""
    given = from_json(line)
    if not isinstance(given, dict):
        raise ValueError(f"a JSON {type(given).__name__}, no object")
    texts = [given[name] for name in PROMPT_FIELDS if given.get(name) is not None]
    in_words = given.get("messages") is not None
    if not texts and not in_words:
        raise ValueError(f"no prompt, but {', '.join(map(repr, given))[:200] or 'nothing'}")
    # Beside messages a text is one more column of the data; a prompt beside them leaves open what is asked.
    prompt = given.get("prompt") if in_words else texts[0]
    return Row.model_validate({**given, "prompt": prompt, "line": number})


def _said(error: ValueError) -> str:
    """What is wrong with a line, its key before it."""
    if not isinstance(error, ValidationError):
        return str(error)
    item = error.errors(include_url=False)[0]
    name = ".".join(map(str, item["loc"]))
    found = str(item["ctx"]["error"]) if item["type"] == "value_error" else item["msg"]
    return f"{name}: {found}" if name else found


def rows_done(out: Path, rows: Sequence[Row]) -> set[int]:
    """Which rows a file of texts has already. A half-written last line is cut off it.

    Raises:
        UserError: it is no file of these prompts' texts.
    """
    done: set[int] = set()
    if not out.exists():
        return done
    with writing(out), out.open("r+b") as file:
        whole = 0
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                if not _BEGINNING.startswith(line[: len(_BEGINNING)]):
                    _index_of(line, rows, f"{out}, line {number}")  # refuses it: it is somebody else's, and stays
                break
            whole += len(line)
            done.add(_index_of(line, rows, f"{out}, line {number}"))
        file.truncate(whole)
    return done


def _read_lines(path: Path) -> list[str]:
    """A text file's lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        expected, fix = "a JSONL file of prompts", "check the path and its permissions"
        raise UserError(f"{path} cannot be read", found=error.strerror, expected=expected, fix=fix) from error
    except UnicodeDecodeError as error:
        fix = "convert the file to UTF-8"
        raise UserError(f"{path} is not UTF-8 text", found=error, expected=_EXPECTED, fix=fix) from error
    return text.split("\n")


def _index_of(line: bytes, rows: Sequence[Row], where: str) -> int:
    """Which row a line of the file of texts belongs to."""
    try:
        told = json.loads(line)
        index = told["index"]
        row = rows[index] if type(index) is int and index >= 0 else None
    except (ValueError, KeyError, TypeError, IndexError):
        row = None
    if row is None or any(told.get(name) != row.given.get(name) for name in ("id", "prompt", "messages")):
        raise UserError(
            f"{where} is not the text of one of these prompts",
            found=line[:60].decode(errors="replace").rstrip(),
            expected="texts that an earlier run wrote for the same file of prompts",
            fix="choose another file, or remove this one",
        )
    return index
