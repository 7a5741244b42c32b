"""A file of prompts becomes a file of texts, whatever the batch, and however often it was interrupted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.serving.endpoint import Model
from zconvert.checkpoint.load import prompt_ids
from zconvert.data.chat import asking_ids
from zconvert.errors import UserError
from zconvert.serving.batch import Settings, write_texts
from zconvert.serving.prompts import read_rows, rows_done
from zconvert.tidar.engine import Engine

PROMPTS: list[dict[str, Any]] = [
    {"prompt": "ten tall trees"},
    {"messages": [{"role": "user", "content": "seven men"}], "id": "chat"},
    {"prompt": "sing", "max_new_tokens": 3},
    {"prompt": "ten tall trees", "id": 3},
    {"prompt": "then they rest"},
]
SETTINGS = Settings(max_new_tokens=12, seed=5)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in PROMPTS))
    return path


def write(model: Model, prompts: Path, out: Path, settings: Settings = SETTINGS, batch: int = 2) -> list[int]:
    """Runs it once; what it told as it went on."""
    rows, told = read_rows(prompts), []
    engine = Engine(model.layout_model, model.plan, max_batch=batch)
    write_texts(engine, model.tokenizer, rows, rows_done(out, rows), out, settings, told.append)
    return told


def read(out: Path) -> dict[int, dict[str, Any]]:
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({row["index"] for row in rows}) == len(rows)
    return {row["index"]: row for row in rows}


@pytest.mark.parametrize("batch", [1, 3])
def test_each_row_gets_the_decode_loops_text(model: Model, prompts: Path, tmp_path: Path, batch: int) -> None:
    assert write(model, prompts, tmp_path / "new" / "out.jsonl", batch=batch) == [1, 2, 3, 4, 5]
    rows = read(tmp_path / "new" / "out.jsonl")
    for index, given in enumerate(PROMPTS):
        row, count = rows[index], given.get("max_new_tokens", 12)
        in_words = "messages" in given
        ids = (
            asking_ids(given["messages"], model.tokenizer) if in_words else prompt_ids(model.tokenizer, given["prompt"])
        )
        assert row["text"] == model.greedy(ids, count)
        assert (row["finish"], row["tokens"], row.get("id")) == ("length", count, given.get("id"))
        assert 0 < row["forwards"] < count
        assert row.get("prompt", row.get("messages")) == given.get("prompt", given.get("messages"))


def test_an_interrupted_file_is_completed_as_if_nothing_had_happened(
    model: Model, prompts: Path, tmp_path: Path
) -> None:
    sampled = Model(model.layout_model, model.tokenizer, model.plan_at(1.5))
    write(sampled, prompts, tmp_path / "whole.jsonl")
    whole = read(tmp_path / "whole.jsonl")
    assert whole[0]["text"] != whole[3]["text"]  # the same prompt: each row has a seed of its own
    lines = (tmp_path / "whole.jsonl").read_bytes().splitlines(keepends=True)
    out = tmp_path / "out.jsonl"
    out.write_bytes(lines[0] + lines[1] + lines[2][:20])
    assert write(sampled, prompts, out, batch=3) == [3, 4, 5]
    assert out.read_bytes().startswith(lines[0] + lines[1])
    assert read(out) == whole
    assert write(sampled, prompts, out) == []


def test_a_row_may_have_a_seed_of_its_own(model: Model, tmp_path: Path) -> None:
    sampled = Model(model.layout_model, model.tokenizer, model.plan_at(1.5))
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "sing", "seed": 8}\n{"prompt": "sing", "seed": 8}\n{"prompt": "sing"}\n')
    write(sampled, path, tmp_path / "out.jsonl", Settings(12, seed=0))
    rows = read(tmp_path / "out.jsonl")
    assert rows[0]["text"] == rows[1]["text"] != rows[2]["text"]


def test_texts_end_before_stop_strings(model: Model, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ten tall trees"}')
    write(model, path, tmp_path / "whole.jsonl", Settings(30))
    text = read(tmp_path / "whole.jsonl")[0]["text"]
    write(model, path, tmp_path / "out.jsonl", Settings(30, stops=[text[6:9]]))
    row = read(tmp_path / "out.jsonl")[0]
    assert (row["text"], row["finish"]) == (text[: text.index(text[6:9])], "stop")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "EOF"),
        ("[]", "a JSON list, no object"),
        ('{"question": "a", "id": 1}', "no prompt, but 'question', 'id'"),
        ('{"prompt": null}', "no prompt, but 'prompt'"),
        ("{}", "no prompt, but nothing"),
        ('{"prompt": "a", "messages": []}', "both a prompt and messages"),
        ('{"prompt": 3, "text": "a"}', "prompt: Input should be a valid string"),
        ('{"prompt": "\\ud800"}', "unexpected end of hex escape"),
        ('{"prompt": "a", "seed": -1}', "seed is below 0"),
        ('{"prompt": "a", "max_new_tokens": 0}', "max_new_tokens is below 1"),
        ('{"messages": []}', "at least one message"),
        ('{"messages": [{"content": "a"}]}', "each with its role"),
    ],
)
def test_a_bad_row_is_told_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(f'{{"prompt": "a"}}\n{line}\n{{"prompt": "b"}}\n')
    with pytest.raises(UserError, match="line 2 is no row of prompts") as caught:
        read_rows(path)
    assert message in str(caught.value)


def test_a_prompt_is_under_prompt_else_under_text_and_what_else_a_row_has_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    rows: list[dict[str, Any]] = [
        {"prompt": "ten", "text": "ten men", "answer": 4},
        {"text": "seven", "max_tokens": 3, "line": "x"},
        {"messages": [{"role": "user", "content": "sing"}], "text": ["sing"], "prompt": None},
    ]
    path.write_text("\n".join(map(json.dumps, rows)).replace("\n", "\n\n"))
    read = read_rows(path)
    assert [(row.line, row.prompt, row.messages) for row in read] == [
        (1, "ten", None),
        (3, "seven", None),
        (5, None, [{"role": "user", "content": "sing"}]),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": [{"role": "nobody", "content": "a"}]}, "line 1 of the prompts: the chat template refuses"),
        ({"prompt": "a", "max_new_tokens": 256}, "line 1 of the prompts does not fit"),
    ],
)
def test_a_prompt_that_cannot_be_used_is_told_before_anything_is_written(
    model: Model, tmp_path: Path, row: dict[str, Any], message: str
) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(json.dumps(row))
    with pytest.raises(UserError, match=message):
        write(model, path, tmp_path / "out.jsonl", Settings(4, context=256))
    assert not (tmp_path / "out.jsonl").exists()


def test_files_that_cannot_be_read_are_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "empty").write_text("\n")
    (tmp_path / "latin").write_bytes(b'{"prompt": "\xe9"}')
    for name, message in (("none", "cannot be read"), ("empty", "has no prompts"), ("latin", "is not UTF-8")):
        with pytest.raises(UserError, match=message):
            read_rows(tmp_path / name)


@pytest.mark.parametrize("line", ['{"index": 9}', '{"index": 0, "prompt": "other"}', "text", '{"index": true}', "[]"])
def test_texts_of_other_prompts_are_not_added_to(prompts: Path, tmp_path: Path, line: str) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text(f"{line}\n")
    with pytest.raises(UserError, match="line 1 is not the text of one of these prompts"):
        rows_done(out, read_rows(prompts))
    assert out.read_text() == f"{line}\n"
