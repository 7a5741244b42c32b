"""A pipeline runs what is missing, skips what is complete and unchanged, and tells what changed."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.commands import run_command
from tests.training.runs import make_run
from zconvert.errors import UserError
from zconvert.recipe import load_pipeline
from zconvert.training.pipeline import digest, fingerprint


def write(path: Path, document: Any) -> Path:
    path.write_text(yaml.safe_dump(document, sort_keys=False))
    return path


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    """convert-init, midtrain and export of a tiny model, two steps each."""
    settings = make_run(tmp_path, max_steps=2, warmup_steps=0)
    settings["base_model"] = str(tmp_path / "converted")
    write(tmp_path / "midtrain.yaml", settings)
    convert = {"base_model": str(tmp_path / "source"), "output_dir": str(tmp_path / "converted")}
    write(tmp_path / "convert-init.yaml", {**convert, "diffusion": {"block_size": 4}})
    export = {"output_dir": str(tmp_path / "exported")}
    names = {"convert-init": "convert-init.yaml", "midtrain": "midtrain.yaml", "export": export}
    return write(tmp_path / "pipeline.yaml", names)


def run(pipeline: Path, *options: str) -> tuple[int, str]:
    result = run_command("run", pipeline, *options)
    return result.exit_code, " ".join(result.output.split())


def edit(path: Path, **changes: Any) -> None:
    write(path, {**yaml.safe_load(path.read_text()), **changes})


def test_all_stages_run_and_then_are_skipped(pipeline: Path) -> None:
    folder = pipeline.parent
    code, text = run(pipeline)
    assert code == 0, text
    assert (folder / "run" / "checkpoint" / "config.json").exists()
    assert (folder / "exported" / "custom_generate").is_dir()
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}
    code, text = run(pipeline)
    assert code == 0, text
    assert text.count("complete and unchanged, skipped") == 3
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")} == times
    # Settings that change nothing of the result may change.
    edit(folder / "midtrain.yaml", logging_steps=2)
    assert run(pipeline)[0] == 0

    # A setting that matters is told with both values, before anything is run.
    edit(folder / "midtrain.yaml", learning_rate=0.5)
    code, text = run(pipeline)
    assert code == 1
    assert "learning_rate: 0.01 then, 0.5 now" in text
    edit(folder / "midtrain.yaml", learning_rate=0.01)

    # So is data that changed, though its size did not.
    data = folder / "data.jsonl"
    before = data.read_text()
    data.write_text(before.replace("cat", "dog"))
    code, text = run(pipeline)
    assert code == 1
    assert "data.jsonl has changed" in text
    data.write_text(before)
    os.utime(data)
    assert run(pipeline)[0] == 0

    # And a base checkpoint that is another one.
    config = folder / "converted" / "config.json"
    config.write_text(config.read_text().replace('"proposals": null', '"proposals": [1]'))
    code, text = run(pipeline)
    assert code == 1
    assert "the base checkpoint has changed" in text


def test_a_dry_run_tells_and_writes_nothing(pipeline: Path) -> None:
    before = sorted(pipeline.parent.rglob("*"))
    code, text = run(pipeline, "--dry-run")
    assert (code, "converted: runs" in text, "exported: after it" in text) == (0, True, True)
    assert sorted(pipeline.parent.rglob("*")) == before


def test_an_output_of_unknown_origin_is_taken_only_when_asked_for(pipeline: Path) -> None:
    convert = str(pipeline.parent / "convert-init.yaml")
    assert run_command("convert-init", convert).exit_code == 0
    code, text = run(pipeline)
    assert code == 1
    assert "it is not known what" in text
    code, text = run(pipeline, "--adopt")
    assert code == 0, text
    assert run(pipeline)[0] == 0


def test_a_training_run_that_was_begun_goes_on(pipeline: Path) -> None:
    assert run(pipeline)[0] == 0
    checkpoint = pipeline.parent / "run" / "checkpoint"
    checkpoint.rename(pipeline.parent / "away")
    (pipeline.parent / "exported").rename(pipeline.parent / "exported-away")
    code, text = run(pipeline)
    assert code == 0
    assert "continuing after step 2" in text
    assert checkpoint.exists()


def test_a_source_that_is_not_there_is_told_with_the_stage_that_wants_it(pipeline: Path) -> None:
    shutil.rmtree(pipeline.parent / "source")
    code, text = run(pipeline)
    assert code == 1
    assert "base_model of the recipe of convert-init: " in text


def test_what_comes_after_convert_init_is_the_recipe_beside_its_own(pipeline: Path) -> None:
    convert, trained = pipeline.parent / "convert-init.yaml", pipeline.parent / "midtrain.yaml"
    said = run_command("convert-init", convert, "--verify", "none").stdout
    assert said.splitlines()[-1] == f"Next: zconvert midtrain {trained}"
    done = run_command(*shlex.split(said.splitlines()[-1])[2:])
    assert done.exit_code == 0, done.output
    assert done.stderr.splitlines()[-1] == f"Next: zconvert bench {pipeline.parent / 'run'}"


def test_a_stage_must_start_from_what_the_one_before_writes(pipeline: Path) -> None:
    edit(pipeline.parent / "midtrain.yaml", base_model="elsewhere")
    with pytest.raises(UserError, match="does not start from what convert-init writes"):
        load_pipeline(pipeline)


def test_all_recipes_are_checked_before_any_stage_runs(pipeline: Path) -> None:
    edit(pipeline.parent / "midtrain.yaml", max_stepz=1)
    code, text = run(pipeline)
    assert code == 1
    assert "max_stepz" in text
    assert not (pipeline.parent / "converted").exists()


@pytest.mark.parametrize("text", ["{}", "export: {output_dir: x}", "midtrian: x.yaml", "midtrain: missing.yaml"])
def test_a_pipeline_that_cannot_be_is_one_clear_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "pipeline.yaml").write_text(text)
    with pytest.raises(UserError):
        load_pipeline(tmp_path / "pipeline.yaml")


def test_a_large_files_digest_sees_a_change_of_all_its_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zconvert.training.pipeline._WHOLE", 1000)
    one, same, other = (tmp_path / name for name in "abc")
    one.write_bytes(bytes(range(250)) * 2000)
    same.write_bytes(one.read_bytes())
    other.write_bytes(bytes(255 - value for value in one.read_bytes()))
    longer = tmp_path / "d"
    longer.write_bytes(one.read_bytes() + b"x")
    assert digest(one) == digest(same)
    assert len({digest(path) for path in (one, other, longer)}) == 3


def test_a_checkpoints_fingerprint_does_not_depend_on_its_name(tmp_path: Path) -> None:
    make_run(tmp_path)
    before = fingerprint(str(tmp_path / "init"))
    (tmp_path / "init").rename(tmp_path / "other")
    assert fingerprint(str(tmp_path / "other")) == before
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "rope_theta": 1}))
    assert fingerprint(str(tmp_path / "other")) != before
