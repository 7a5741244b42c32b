"""What the user types is resolved to a checkpoint on disk, or refused with one clear error."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zconvert.checkpoint.source import Source, headers_of, read_config, require_converted, resolve, tidar_settings
from zconvert.errors import UserError

TIDAR = {"format_version": 1, "block_size": 4, "mask_token_id": 9}


def bare(folder: Path, config: object = None) -> Path:
    """A folder with nothing but a config.json."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config or {}))
    return folder


def error_of(name: str | Path, **options: Any) -> UserError:
    """The error that resolving ends in."""
    with pytest.raises(UserError) as caught:
        resolve(name, **options)
    assert caught.value.fix is not None
    return caught.value


def test_a_local_folder_is_named_after_itself(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral")
    source = resolve(str(folder))
    assert source == Source(folder, "mixtral", None)
    assert "lm_head.weight" in headers_of(source).tensors
    assert resolve(folder, weights=False) == source


def test_a_relative_folder_comes_before_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare(tmp_path / "org" / "name")
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Source(Path("org/name"), "name", None)
    monkeypatch.chdir(tmp_path / "org" / "name")
    assert resolve(".").name == "name"


def test_a_training_run_means_its_checkpoint_and_gives_it_its_name(tmp_path: Path) -> None:
    bare(tmp_path / "my-run" / "checkpoint")
    (tmp_path / "my-run" / "metrics.jsonl").touch()
    source = resolve(tmp_path / "my-run")
    assert source.folder == tmp_path / "my-run" / "checkpoint"
    assert source.name == "my-run"
    assert source.argument == str(tmp_path / "my-run" / "checkpoint")


@pytest.mark.parametrize("trace", ["train_state/step-00000100", "metrics.jsonl/"])
def test_an_unfinished_run_says_how_to_finish_it(tmp_path: Path, trace: str) -> None:
    (tmp_path / "run" / trace).mkdir(parents=True)
    error = error_of(tmp_path / "run")
    assert "training run without a checkpoint yet" in error.what
    assert "zconvert midtrain" in str(error.fix)


def test_a_snapshot_in_the_hubs_cache_keeps_its_id_and_commit(tmp_path: Path) -> None:
    folder = bare(tmp_path / "models--org--a-name" / "snapshots" / ("a" * 40))
    source = resolve(folder)
    assert (source.name, source.revision, source.argument) == ("org/a-name", "a" * 40, "org/a-name")


def test_a_home_folder_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    bare(tmp_path / "model")
    assert resolve("~/model").folder == tmp_path / "model"


def test_an_argument_with_spaces_is_quoted() -> None:
    assert Source(Path("my model"), "my model").argument == "'my model'"


@pytest.mark.parametrize("name", ["missing", "./org/name", "/no/such/folder", "a/b/c", "", "org/..", "x" * 5000])
def test_a_missing_folder_is_refused_without_asking_the_hub(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    assert "Hub" not in error_of(name).what


def test_a_hub_id_that_cannot_be_reached_says_both_meanings(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    error = error_of("org/name")  # offline here
    assert "no folder here has that name" in error.what
    assert "network" in str(error.fix)


def test_a_revision_of_a_local_folder_is_refused(tmp_path: Path) -> None:
    assert "revision" in error_of(bare(tmp_path / "model"), revision="main").what


def test_a_file_is_refused_with_its_folder_named(tmp_path: Path) -> None:
    path = bare(tmp_path / "model") / "config.json"
    assert str(tmp_path / "model") in str(error_of(path).fix)


@pytest.mark.parametrize(
    ("file", "found"),
    [
        (None, "an empty folder"),
        ("model.safetensors", "no config.json"),
        ("adapter_config.json", "LoRA adapter"),
        ("model_index.json", "diffusers pipeline"),
        ("model.gguf", "GGUF"),
    ],
)
def test_a_folder_that_is_no_checkpoint_says_what_it_is(tmp_path: Path, file: str | None, found: str) -> None:
    if file:
        (tmp_path / file).touch()
    error = error_of(tmp_path)
    assert "is not a checkpoint" in error.what
    assert found in str(error.found)


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, '{"a": 1}}', "\x80", "[]", "3", "null"])
def test_a_malformed_config_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    assert str(tmp_path / "config.json") in error_of(tmp_path).what


def test_a_config_that_is_a_folder_or_unreadable_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").mkdir()
    with pytest.raises(UserError, match="is no file"):
        read_config(tmp_path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_entered_is_refused(tmp_path: Path) -> None:
    folder = bare(tmp_path / "closed" / "model")
    folder.parent.chmod(0)
    try:
        assert "cannot be opened" in error_of(folder).what
    finally:
        folder.parent.chmod(0o700)


def test_settings_are_none_before_conversion_and_whole_after_it() -> None:
    assert tidar_settings({}) is None
    assert tidar_settings({"tidar": None}) is None
    settings = tidar_settings({"vocab_size": 10, "tidar": {**TIDAR, "proposals": [1, 3], "later_key": 1}})
    assert settings is not None
    assert (settings.block_size, settings.mask_token_id, settings.proposals) == (4, 9, (1, 3))


@pytest.mark.parametrize(
    "section",
    [
        "yes",
        [],
        {},
        {"block_size": 4},
        {**TIDAR, "block_size": 0},
        {**TIDAR, "block_size": "4"},
        {**TIDAR, "mask_token_id": -1},
        {**TIDAR, "mask_token_id": None},
        {**TIDAR, "mask_token_id": 10},
        {**TIDAR, "proposals": [1, 9]},
        {**TIDAR, "format_version": 99},
    ],
)
def test_a_tidar_section_that_cannot_be_used_is_refused(section: Any) -> None:
    with pytest.raises(UserError, match="tidar section"):
        tidar_settings({"vocab_size": 10, "tidar": section})


def test_what_is_not_converted_is_refused_with_the_command_that_converts_it(tmp_path: Path) -> None:
    source = resolve(bare(tmp_path / "my model"))
    with pytest.raises(UserError, match="my model is not converted") as caught:
        require_converted(source)
    assert f"convert-init '{tmp_path / 'my model'}' --out" in str(caught.value)


def test_the_settings_of_a_converted_checkpoint_are_returned(tmp_path: Path) -> None:
    assert require_converted(resolve(bare(tmp_path / "model", {"tidar": TIDAR}))).block_size == 4
