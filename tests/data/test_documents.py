"""Documents: what is read from files, and that a bad line is named by file and number."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from zconvert.data.documents import Document, Documents, read_documents, write_documents
from zconvert.data.loading import load_documents
from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe

BOS, EOS = 2, 1


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<bos>", "<unk>", *"abcdefgh"]
    words_to_ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words_to_ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def jsonl(path: Path, *rows: Any) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def load(tokenizer: Any, *paths: Path, **settings: Any) -> list[Document]:
    documents = load_documents([DatasetRecipe(path=str(path), **settings) for path in paths], tokenizer)
    parts = [documents.tokens(number) for number in range(len(documents))]
    return [Document(ids.tolist(), scored.tolist()) for ids, scored in parts]


def test_documents_come_in_the_order_of_datasets_and_lines(tokenizer: Any, tmp_path: Path) -> None:
    first = jsonl(tmp_path / "1.jsonl", {"text": "a b"}, {"text": "c"})
    second = tmp_path / "2.txt"
    second.write_text("d\n\ne", encoding="utf-8")
    assert [d.ids for d in load(tokenizer, second, first)] == [[BOS, 7, 8, EOS], [BOS, 4, 5, EOS], [BOS, 6, EOS]]


def test_bos_is_not_scored_and_everything_else_is(tokenizer: Any, tmp_path: Path) -> None:
    (document,) = load(tokenizer, jsonl(tmp_path / "x.jsonl", {"text": "a b"}))
    assert document == Document([BOS, 4, 5, EOS], [False, True, True, True])


def test_bos_and_eos_are_as_the_recipe_says_and_never_doubled(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "a"}, {"text": "<bos> a <eos>"})
    assert [d.ids for d in load(tokenizer, path)] == [[BOS, 4, EOS]] * 2
    assert load(tokenizer, path, add_bos=False, add_eos=False)[0] == Document([4], [True])


def test_a_folder_is_read_in_the_order_of_names(tokenizer: Any, tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", {"body": "b c"})
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    found = load(tokenizer, tmp_path, field="body")
    assert [tokenizer.decode(d.ids[1:-1]) for d in found] == ["a", "b c"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"text": " "}', "line 3 of .*x.jsonl is empty"),
        (b'{"text": "' + b"a " * 100 + b'"}', "line 3 of .*x.jsonl is absurdly long"),
        (b"{'text': 1}", "line 3 of .*x.jsonl is not JSON"),
        (b'{"text": "a"', "line 3 of .*x.jsonl is not JSON"),
        (b"[" * 100_000, "line 3 of .*x.jsonl is not JSON"),
        (b'["a"]', "line 3 of .* is not a JSON object"),
        (b'{"body": "a"}', "line 3 of .* lacks 'text'"),
        (b'{"text": 5}', "line 3 of .*'text' is no text"),
        (b'{"text": "\xff"}', "line 3 of .* is not UTF-8"),
        (b'{"text": "\\ud800"}', "line 3 of .* half a character"),
    ],
)
def test_a_bad_line_is_named_by_file_and_number_and_is_fatal_or_left_out(
    tokenizer: Any, tmp_path: Path, line: bytes, message: str
) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b'\n{"text": "b"}\n')
    with pytest.raises(UserError, match=message):
        load(tokenizer, path, max_row_bytes=100 if b"a a" in line else 10_000_000)
    told: list[str] = []
    dataset = DatasetRecipe(path=str(path), on_bad_row="skip", max_row_bytes=100 if b"a a" in line else 10_000_000)
    kept = load_documents([dataset], tokenizer, on_message=told.append)
    assert [kept.tokens(n)[0].tolist() for n in range(len(kept))] == [[BOS, 4, EOS], [BOS, 5, EOS]]
    (text,) = told
    assert re.match(f"left out: {message}", text)


def test_many_bad_rows_are_counted_instead_of_listed(tokenizer: Any, tmp_path: Path) -> None:
    path, told = jsonl(tmp_path / "x.jsonl", {"text": "a"}, *[{}] * 20), []
    load_documents([DatasetRecipe(path=str(path), on_bad_row="skip")], tokenizer, on_message=told.append)
    assert len(told) == 6
    assert "20 bad rows" in told[-1]


def test_files_that_cannot_be_read_are_clear_errors(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.csv").write_bytes(b"a")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "none.jsonl").write_bytes(b"\n")
    for name, message in {
        "missing.jsonl": "there is no dataset",
        "x.parquet": "x.parquet cannot be read",
        "x.csv": "of no kind that can be read",
        "folder": "of no kind that can be read",
        "x.txt": "x.txt is not UTF-8",
        "none.jsonl": "hold no documents",
    }.items():
        with pytest.raises(UserError, match=message):
            load_documents([DatasetRecipe(path=str(tmp_path / name))], tokenizer)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": "h"})
    load_documents([DatasetRecipe(path=str(path))], tokenizer, vocabulary_rows=12)
    with pytest.raises(UserError, match="does not belong to the model"):
        load_documents([DatasetRecipe(path=str(path))], tokenizer, vocabulary_rows=11)


def test_the_fingerprint_tells_contents_and_boundaries_apart() -> None:
    def fingerprint(*documents: list[int]) -> str:
        return Documents.of(Document(ids, [True] * len(ids)) for ids in documents).fingerprint()

    assert fingerprint([1, 2], [3]) == fingerprint([1, 2], [3])
    assert len({fingerprint([1, 2], [3]), fingerprint([1], [2, 3]), fingerprint([1, 2], [4])}) == 3


def test_documents_on_disk_are_those_in_memory(tmp_path: Path) -> None:
    documents = [Document([1, 2, 3], [False, True, True]), Document([70_000], [True]), Document([5, 6], [True, False])]
    write_documents(tmp_path / "there", documents, {"from": "a test"})
    read, facts = read_documents(tmp_path / "there")
    kept = Documents.of(documents)
    for name in ("ids", "loss_mask", "ends"):
        assert torch.equal(getattr(read, name), getattr(kept, name))
    assert read.fingerprint() == kept.fingerprint()
    assert (facts["highest_id"], facts["from"]) == (70_000, "a test")


def test_documents_on_disk_that_lost_bytes_are_said_to_be_damaged(tmp_path: Path) -> None:
    write_documents(tmp_path / "there", [Document([1, 2, 3], [True] * 3)])
    (tmp_path / "there" / "ids.bin").write_bytes(b"12345678")
    with pytest.raises(UserError, match="are damaged"):
        read_documents(tmp_path / "there")


def test_a_write_that_fails_in_the_middle_leaves_nothing(tmp_path: Path) -> None:
    def documents() -> Iterator[Document]:
        yield Document([1], [True])
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_documents(tmp_path / "there", documents())
    assert list(tmp_path.iterdir()) == []


def test_long_texts_are_cut_at_paragraphs_where_asked(tokenizer: Any, tmp_path: Path) -> None:
    text = "a b c d\n\ne f g\nh a b c d e f g h"
    path = jsonl(tmp_path / "x.jsonl", {"text": text})
    dataset = DatasetRecipe(path=str(path), split_long="paragraph", add_bos=False, add_eos=False)
    cut = load_documents([dataset], tokenizer, sequence_len=6)
    pieces = [tokenizer.decode(cut.tokens(n)[0]) for n in range(len(cut))]
    assert pieces == ["a b c d", "e f g", "h a b c d e", "f g h"]
    (whole,) = load(tokenizer, path)
    assert len(whole.ids) == 2 + len(text.split())
