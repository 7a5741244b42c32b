"""A tokenizer's entries are read without its merges, which are most of a large file."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.sparse import write_large_tokenizer
from tests.checkpoint.tiny import make_tokenizer
from zconvert.checkpoint.tokenizer_file import read_without_merges
from zconvert.errors import UserError

NASTY = ['"', "\\", '\\"', "]", "[", '"merges": [', "}", ",", "\n", "\u2581", "\U0001f680", ""]


def written(folder: Path, document: Any, **style: Any) -> str:
    path = folder / "tokenizer.json"
    path.write_text(json.dumps(document, **style), encoding="utf-8")
    return read_without_merges(path)


@pytest.mark.parametrize("style", [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}])
@pytest.mark.parametrize(
    "merges", [[], ["a b"], NASTY, [["a", "b"]], [[left, right] for left in NASTY for right in NASTY]]
)
def test_all_but_the_merges_is_kept_whatever_the_texts_hold(tmp_path: Path, merges: list[Any], style: Any) -> None:
    vocabulary = {**{text: place for place, text in enumerate(NASTY)}, "merges": 99}
    document = {"model": {"merges": merges, "vocab": vocabulary}, "added_tokens": [{"content": '"merges":["x"]'}]}
    document["model"]["merges"] = []
    expected = json.loads(json.dumps(document))
    document["model"]["merges"] = merges
    text = written(tmp_path, document, **style)
    assert json.loads(text) == expected
    # with the merges last, as the tokenizers library writes them
    document["model"] = {"vocab": vocabulary, "merges": merges}
    assert json.loads(written(tmp_path, document, **style)) == expected


def test_the_tokenizers_librarys_own_file_is_read(tmp_path: Path) -> None:
    make_tokenizer(60).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    assert whole["model"]["merges"]
    short = json.loads(read_without_merges(tmp_path / "tokenizer.json"))
    assert short["model"].pop("merges") == []
    whole["model"].pop("merges")
    assert short == whole


@pytest.mark.parametrize("text", ["", "{", '{"merges": [1, 2]}', '{"merges": ["a', '{"merges": [["a"]]}', "[]"])
def test_a_malformed_file_comes_back_as_it_is(tmp_path: Path, text: str) -> None:
    (tmp_path / "tokenizer.json").write_text(text)
    assert read_without_merges(tmp_path / "tokenizer.json") == text


def test_an_unreadable_file_is_one_error(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(b"\xff\xfe")
    for path in (tmp_path / "tokenizer.json", tmp_path, tmp_path / "missing.json"):
        with pytest.raises(UserError, match=path.name):
            read_without_merges(path)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the peak is read from /proc")
def test_a_vocabulary_of_262144_entries_takes_little_memory(tmp_path: Path) -> None:
    write_large_tokenizer(tmp_path, 262_144, 514_906)
    script = (
        "import json, re, sys; from pathlib import Path;"
        "from zconvert.checkpoint.tokenizer_file import read_without_merges;"
        "document = json.loads(read_without_merges(Path(sys.argv[1])));"
        "status = Path('/proc/self/status').read_text();"
        "print(len(document['model']['vocab']), re.search(r'VmHWM:\\s*(\\d+)', status)[1])"
    )
    arguments = [sys.executable, "-c", script, str(tmp_path / "tokenizer.json")]
    entries, kilobytes = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout.split()
    assert entries == "262144"
    assert int(kilobytes) < 180_000  # whole, it takes over 300,000
