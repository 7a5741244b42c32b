"""Documents: what is read from files, and that a bad line is named by file and number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zconvert.data.documents import Document, Documents, load_documents, read_texts
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


def test_a_folder_is_read_in_the_order_of_names(tmp_path: Path) -> None:
    jsonl(tmp_path / "b.jsonl", {"body": "second"})
    (tmp_path / "a.txt").write_text("first", encoding="utf-8")
    (tmp_path / "notes.md").write_text("not read", encoding="utf-8")
    assert list(read_texts(DatasetRecipe(path=str(tmp_path), field="body"))) == ["first", "second"]


def test_empty_texts_are_left_out_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    path = jsonl(tmp_path / "x.jsonl", {"text": ""}, {"text": "a"}, {"text": " "})
    documents = load_documents([DatasetRecipe(path=str(path))], tokenizer)
    assert (len(documents), documents.empty) == (1, 2)


def test_progress_counts_documents(tokenizer: Any, tmp_path: Path) -> None:
    path, seen = jsonl(tmp_path / "x.jsonl", *[{"text": "a"}] * 1500), []
    load_documents([DatasetRecipe(path=str(path))], tokenizer, on_progress=seen.append)
    assert seen == [1000, 1500]


@pytest.mark.parametrize(
    ("line", "message"),
    [
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
def test_a_bad_line_is_named_by_file_and_number(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "a"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        list(read_texts(DatasetRecipe(path=str(path))))


def test_files_that_cannot_be_read_are_clear_errors(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    (tmp_path / "x.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "none.jsonl").write_bytes(b"\n")
    for name, message in {
        "missing.jsonl": "there is no dataset",
        "x.parquet": "of no kind that can be read",
        "folder": "of no kind that can be read",
        "x.txt": "cannot be read as text",
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
