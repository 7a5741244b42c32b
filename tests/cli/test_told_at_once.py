"""Mistakes that can be seen without torch are told before it is loaded, which takes seconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from tests.checkpoint.tiny import make_checkpoint
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve

RUNNER = """
import json, sys
from zconvert.cli.main import app

for words in json.loads(sys.argv[1]):
    code = app(words, standalone_mode=False)
    sys.stderr.write(f"exit {code}\\n")
    assert "torch" not in sys.modules, words
"""


def told(*commands: list[str]) -> list[str]:
    """What each of these commands says on stderr, one after another in an interpreter without torch."""
    runner = [sys.executable, "-c", RUNNER, json.dumps(commands)]
    done = subprocess.run(runner, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    return [" ".join(said.split()) for said in done.stderr.split("exit 1\n")[:-1]]


def test_a_stage_that_cannot_start_says_so_before_torch_is_loaded(tmp_path: Path) -> None:
    source = resolve(make_checkpoint(tmp_path / "source", "qwen3_moe", dtype="float32"))
    convert_init(source, tmp_path / "init", block_size=4)
    (tmp_path / "data.jsonl").write_text('{"text": "ten tall trees"}\n')
    (tmp_path / "complete" / "checkpoint").mkdir(parents=True)

    def recipe(name: str, *, base: str = "init", output: str = "new", data: str = "data.jsonl") -> Path:
        settings = {"base_model": str(tmp_path / base), "output_dir": str(tmp_path / output), "max_steps": 1}
        file = tmp_path / f"{name}.yaml"
        file.write_text(json.dumps({**settings, "warmup_steps": 0, "datasets": [{"path": str(tmp_path / data)}]}))
        return file

    said = told(
        ["midtrain", str(recipe("complete", output="complete"))],
        ["midtrain", str(recipe("no-base", base="missing")), "--", "--nproc_per_node=2"],
        ["midtrain", str(recipe("no-data", data="missing.jsonl"))],
        ["midtrain", str(recipe("source", base="source"))],
    )
    expected = ("this run is complete", "base_model of the recipe", "there is no dataset", "source is not converted")
    for text, part in zip(said, expected, strict=True):
        assert text.startswith("Error: ")
        assert part in text
    assert not (tmp_path / "new").exists()


def test_decoding_that_cannot_start_says_so_before_torch_is_loaded(tmp_path: Path) -> None:
    source = resolve(make_checkpoint(tmp_path / "source", "qwen3_moe", dtype="float32"))
    convert_init(source, init := tmp_path / "init", block_size=4)
    prompts, texts = tmp_path / "prompts.jsonl", tmp_path / "texts.jsonl"
    prompts.write_text('{"prompt": "ten"}\n')
    texts.write_text("mine\n")
    missing = str(tmp_path / "missing.jsonl")
    said = told(
        ["generate", str(init), "--prompts", missing, "--out", str(tmp_path / "new.jsonl")],
        ["generate", str(init), "--prompts", str(prompts), "--out", str(texts)],
        ["bench", str(init), "--prompts", missing],
        ["bench", str(source.folder)],
        ["serve", str(source.folder)],
    )
    for text in (said[0], said[2]):
        assert f"{missing} cannot be read" in text
    assert "is not the text of one of these prompts" in said[1]
    assert "source is not converted" in said[3]
    assert "source is not converted" in said[4]
    assert texts.read_text() == "mine\n"
    assert not (tmp_path / "new.jsonl").exists()
