"""`zconvert bench`: the table at 80 columns, one JSON document, and clear refusals."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from tests.checkpoint.tiny import make_checkpoint
from tests.commands import run_command
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.cli import bench


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    convert_init(resolve(make_checkpoint(folder / "zaya", "zaya")), folder / "converted", block_size=4)
    return folder / "converted"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "ten tall"}\n\n{"text": "seven men"}\n{"prompt": "the old stone"}\n')
    return path


run = partial(run_command, "bench")


def test_json_is_one_document_and_nothing_else(converted: Path, prompts: Path) -> None:
    options = (
        "--num-prompts",
        2,
        "--max-new-tokens",
        6,
        "--mix-weight",
        0.5,
        "--mix-weight",
        0.3,
        "--proposals",
        "1,3",
    )
    result = run(converted, "--prompts", prompts, *options, "--threads", 1, "--device", "cpu", "--json")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    names = [entry["name"] for entry in document["results"]]
    assert names == ["AR", "stock generate", "lossless 1,3", "mixed 0.5 1,3", "mixed 0.3 1,3"]
    assert document["results"][2]["identical_prompts"] == document["prompts"] == 2
    assert (document["checkpoint"], document["results"][2]["proposals"]) == ("converted", [1, 3])
    assert document["dtype"] == "float32"


def test_the_table_fits_80_columns_and_names_every_point(converted: Path, prompts: Path, tmp_path: Path) -> None:
    picture = tmp_path / "speed.png"
    options = ["--batch-size", 1, "--batch-size", 2, "--mode", "single", "--mode", "two", "--mode", "auto", "--tune"]
    result = run(converted, "--prompts", prompts, "--max-new-tokens", 6, *options, "--plot", picture, "--device", "cpu")
    assert result.exit_code == 0, result.stderr
    lines = [line for line in result.stdout.split("\n") if not line.startswith("Forwards on")]
    assert max(map(len, lines)) <= 80, result.stdout
    assert "3/3" in result.stdout
    for name in (
        "AR",
        "stock generate",
        "lossless",
        "mixed 0.5",
        "two forwards",
        "auto",
        "2 texts at a time",
        "best of",
    ):
        assert name in result.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert (converted / "tuning.json").exists()


def test_it_says_plainly_when_plain_ar_is_faster() -> None:
    place = {"batch_size": 1, "max_new_tokens": 5, "prompt_tokens": None}
    results = [
        {**place, "name": "AR", "sampler": "ar"},
        {**place, "name": "lossless", "sampler": "lossless", "speedup": 0.5},
        {**place, "name": "mixed 0.5", "sampler": "mixed", "speedup": 1.5},
    ]
    said = [str(line) for line in bench._verdicts(results)]
    assert said == ["plain AR decoding is faster here than lossless.", "mixed 0.5 1.50× as fast as plain AR."]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "has no prompts"),
        ("{", "line 1 is no row of prompts"),
        ('{"prompt": "a"}\n{"question": 1}', "line 2 is no row of prompts found: no prompt, but 'question'"),
    ],
)
def test_a_bad_prompts_file_is_refused_with_its_line(converted: Path, tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text(text)
    result = run(converted, "--prompts", path, "--json")
    assert (result.exit_code, result.stdout) == (1, "")
    assert said in " ".join(result.stderr.split())


@pytest.mark.parametrize(
    ("options", "said"),
    [(("--block-size", 8), "at most 4"), (("--proposals", "1,9"), "at most 4"), (("--dtype", "int8"), "'int8'")],
)
def test_settings_that_the_checkpoint_was_not_trained_for_are_refused(
    converted: Path, options: tuple[object, ...], said: str
) -> None:
    result = run(converted, *options)
    assert result.exit_code == (2 if "--dtype" in options else 1)
    assert said in " ".join(result.stderr.split())
