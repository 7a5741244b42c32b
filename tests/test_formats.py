"""What an older zconvert wrote is read as it was meant; what a newer one wrote is refused, with both versions named."""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.training.runs import make_run, metrics_of
from zconvert.checkpoint.provenance import PROVENANCE_FILE, history_of, read_provenance
from zconvert.checkpoint.source import tidar_settings
from zconvert.data.documents import Document, read_documents, write_documents
from zconvert.errors import UserError
from zconvert.evaluation.samples import SETTINGS_FILE, read_settings, write_json
from zconvert.formats import up_to_date
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.settings import FORMAT_VERSION, TidarSettings
from zconvert.training import stages

FIXTURES = Path(__file__).parent / "fixtures"


def _train(settings: dict[str, Any]) -> Path:
    return stages.train(MidtrainRecipe(**settings), lambda _progress: None)


def _replace_numbers(state: Path, numbers: bytes) -> None:
    """Puts other bytes into a train state, and their size and checksum into its manifest."""
    (state / "state.pt").write_bytes(numbers)
    manifest = json.loads((state / "manifest.json").read_text())
    manifest["state.pt"] = [len(numbers), zlib.crc32(numbers)]
    (state / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A run of six steps, with its states after three and six: of the recipe that the fixture was written with."""
    settings = make_run(tmp_path_factory.mktemp("run"), max_steps=6, save_steps=3, save_dtype="float32")
    _train({**settings, "save_total_limit": 2})
    return settings


def _back_at_step_3(settings: dict[str, Any], run_dir: Path) -> Path:
    """A copy of the finished run as it was after three steps; the folder of its state."""
    shutil.copytree(settings["output_dir"], run_dir)
    shutil.rmtree(run_dir / "checkpoint")
    shutil.rmtree(run_dir / "train_state" / "step-00000006")
    return run_dir / "train_state" / "step-00000003"


def test_a_train_state_without_tokens_seen_is_resumed_to_the_run_that_never_stopped(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    old = (FIXTURES / "train-state-0.pt").read_bytes()
    _replace_numbers(_back_at_step_3(finished, tmp_path / "run"), old)

    checkpoint = _train({**finished, "output_dir": str(tmp_path / "run")})

    expected = Path(finished["output_dir"])
    assert metrics_of(tmp_path / "run") == metrics_of(expected)
    weights, others = load_file(checkpoint / "model.safetensors"), load_file(expected / "checkpoint/model.safetensors")
    assert all(torch.equal(weights[name], others[name]) for name in others)
    counts = [history_of(folder)[-1]["tokens_seen"] for folder in (checkpoint, expected / "checkpoint")]
    assert counts == [6 * 2 * 2 * 32] * 2  # steps, rows, accumulated, tokens


def test_a_run_may_be_given_an_evaluation_that_it_did_not_begin_with(finished: dict[str, Any], tmp_path: Path) -> None:
    _back_at_step_3(finished, tmp_path / "run")
    evaluation = {"datasets": finished["datasets"], "steps": 1, "rows": 2, "prompts": 0}
    _train({**finished, "output_dir": str(tmp_path / "run"), "evaluation": evaluation})
    assert [row["step"] for row in metrics_of(tmp_path / "run") if "evaluation" in row] == [4, 5, 6]


def test_a_train_state_of_a_newer_version_ends_the_run_instead_of_being_passed_over(
    finished: dict[str, Any], tmp_path: Path
) -> None:
    state = _back_at_step_3(finished, tmp_path / "run")
    numbers = torch.load(state / "state.pt", weights_only=True)
    torch.save({**numbers, "format_version": 99}, tmp_path / "newer.pt")
    _replace_numbers(state, (tmp_path / "newer.pt").read_bytes())
    with pytest.raises(UserError) as raised:
        _train({**finished, "output_dir": str(tmp_path / "run")})
    _names_both_versions(raised.value, "0 to 1")
    assert (state / "manifest.json").exists()


def _tidar(folder: Path, version: int) -> None:
    tidar_settings({"vocab_size": 9, "tidar": {"tokens_per_block": 4, "format_version": version}})


def _provenance(folder: Path, version: int) -> None:
    (folder / PROVENANCE_FILE).write_text(json.dumps({"format_version": version}))
    read_provenance(folder)


def _evaluation(folder: Path, version: int) -> None:
    write_json(folder / SETTINGS_FILE, {"format_version": version})
    read_settings(folder)


def _documents(folder: Path, version: int) -> None:
    write_documents(folder / "new", [Document([1], [True])])
    facts = json.loads((folder / "new/documents.json").read_text())
    (folder / "new/documents.json").write_text(json.dumps({"format_version": version, "arrays": facts}))
    read_documents(folder / "new")


@pytest.mark.parametrize("read", [_tidar, _provenance, _evaluation, _documents])
def test_a_file_of_a_newer_version_is_refused_before_anything_else_is_said_of_it(
    read: Callable[[Path, int], None], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as raised:
        read(tmp_path, 99)
    _names_both_versions(raised.value, "1")


def _names_both_versions(error: UserError, ours: str) -> None:
    assert "a newer zconvert" in error.what
    assert error.found == "format_version 99"
    assert str(error.expected).startswith(f"format_version {ours}, ")
    assert "upgrade" in str(error.fix)


def test_an_export_says_of_a_newer_section_that_it_is_newer_before_it_misses_its_keys() -> None:
    with pytest.raises(ValueError, match=rf"is 99, this version reads up to {FORMAT_VERSION}: upgrade"):
        TidarSettings.from_dict({"tokens_per_block": 4, "format_version": 99})


@pytest.mark.parametrize("version", [-1, "1", 1.0, True, None])
def test_a_version_that_never_was_is_damage(version: object) -> None:
    with pytest.raises(UserError, match="never was"):
        up_to_date({"format_version": version}, "the file", 1)


@pytest.mark.parametrize(("version", "steps"), [(None, "abc"), (0, "abc"), (1, "bc"), (2, "c"), (3, "")])
def test_a_document_goes_through_the_steps_from_its_version_on_in_order(version: int | None, steps: str) -> None:
    document = {"done": ""} if version is None else {"done": "", "format_version": version}
    step: list[Callable[[dict[str, Any]], dict[str, Any]]] = [
        lambda old, letter=letter: {**old, "done": old["done"] + letter} for letter in "abc"
    ]
    assert up_to_date(document, "the file", 3, step) == {"done": steps, "format_version": 3}
