"""A gated checkpoint gives its source back, every file byte for byte, or says why it cannot."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.commands import run_command
from zconvert.checkpoint.export import export
from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.merge import merge_to_ar
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.checkpoint.weights import save_gated
from zconvert.errors import UserError
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.settings import GATED_FILE, GatedParts

Checkpoint = Callable[..., Path]
PARTS = GatedParts(rank=2, mlp_width=8)


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def source(tiny_checkpoint: Checkpoint) -> Path:
    """A source of several shards, with what else may lie in it; all of its spacing is its own."""
    folder = tiny_checkpoint("mixtral", shards=3)
    for name in ("config.json", "model.safetensors.index.json", "tokenizer_config.json"):
        path = folder / name
        path.write_text(json.dumps(json.loads(path.read_text()), indent=1, sort_keys=True) + "\n\n")
    (folder / "README.md").write_text("# The source\n")
    (folder / "LICENSE").write_text("free\n")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return folder


@pytest.fixture
def gated(source: Path, tmp_path: Path) -> Path:
    """Its gated checkpoint, converted with a mask token that the tokenizer learns, with weights as training saves."""
    convert_init(resolve(source), tmp_path / "init", block_size=4, gated=PARTS, mask_token="<gap>")
    init = resolve(tmp_path / "init")
    model, _ = load_model(init, device="cpu")
    weights = layout_model_of(model).gated
    save_gated(weights, init.folder, tmp_path / "gated", settings=require_converted(init))
    return tmp_path / "gated"


def test_the_source_comes_back_from_every_stage_and_from_an_export(source: Path, gated: Path, tmp_path: Path) -> None:
    export(resolve(gated), tmp_path / "exported")
    assert (gated / "tokenizer.json").read_bytes() != (source / "tokenizer.json").read_bytes()
    expected = hashes(source)
    for name in ("init", "gated", "exported"):
        shutil.rmtree(source, ignore_errors=True)
        merge_to_ar(resolve(tmp_path / name), tmp_path / f"from-{name}")
        assert hashes(tmp_path / f"from-{name}") == expected


def test_weights_are_linked_and_the_rest_is_free_to_be_edited(gated: Path, tmp_path: Path) -> None:
    report = merge_to_ar(resolve(gated), tmp_path / "merged")
    for name, entry in report["files"].items():
        is_weights = name.endswith(".safetensors")
        at = gated / name
        assert (at.exists() and at.samefile(tmp_path / "merged" / name)) == is_weights
        assert (entry["sha256"] is None) == is_weights, "the conversion read no weights, so it knows no hash of them"
    assert report["base_model"] == "mixtral"


def test_hashes_that_the_hubs_cache_knows_are_kept(source: Path, tmp_path: Path) -> None:
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    for path in source.glob("*.safetensors"):
        blob = blobs / sha256(path)
        path.rename(blob)
        path.symlink_to(blob)
    convert_init(resolve(source), tmp_path / "init", block_size=4, gated=PARTS)
    report = merge_to_ar(resolve(tmp_path / "init"), tmp_path / "merged")
    assert {name: entry["sha256"] for name, entry in report["files"].items()} == hashes(source)


def test_a_checkpoint_whose_weights_moved_has_no_source_to_give_back(source: Path, tmp_path: Path) -> None:
    convert_init(resolve(source), tmp_path / "full", block_size=4)
    with pytest.raises(UserError, match="mode full"):
        merge_to_ar(resolve(tmp_path / "full"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    ("options", "claim"),
    [({"max_shard_size": 20_000}, "value for value, in other files"), ({"dtype": "float32"}, "stored as float32")],
)
def test_an_export_with_other_weight_files_claims_no_more_than_it_keeps(
    gated: Path, tmp_path: Path, options: dict[str, Any], claim: str
) -> None:
    export(resolve(gated), tmp_path / "one", **options)
    export(resolve(tmp_path / "one"), tmp_path / "two")
    for name in ("one", "two"):
        folder = tmp_path / name
        assert (folder / GATED_FILE).read_bytes() == (gated / GATED_FILE).read_bytes()
        assert claim in (folder / "README.md").read_text()
        assert not (folder / "tidar" / "source").exists()
        with pytest.raises(UserError, match="other weight files than its source has"):
            merge_to_ar(resolve(folder), tmp_path / "merged")
    wanted, _ = load_model(resolve(gated), dtype="float32", device="cpu")
    found, _ = load_model(resolve(tmp_path / "two"), dtype="float32", device="cpu")
    assert all(torch.equal(found.state_dict()[name], tensor) for name, tensor in wanted.state_dict().items())


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def names_that_lead_outside(folder: Path) -> None:
    path = folder / "provenance.json"
    document = json.loads(path.read_text())
    document["source_files"]["../../config.json"] = {"bytes": 1}
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flip(folder / "LICENSE"), "LICENSE of exported is not the source's any more"),
        (lambda folder: flip(next(folder.glob("*.safetensors"))), "safetensors of exported is not the source's"),
        (lambda folder: (folder / "LICENSE").write_text("more"), "LICENSE of exported is not"),
        (lambda folder: shutil.rmtree(folder / "tidar" / "source"), "lacks files of its source"),
        (lambda folder: (folder / "provenance.json").unlink(), "does not tell the files of the source"),
        (names_that_lead_outside, "does not tell the files of the source"),
    ],
)
def test_what_is_not_the_sources_any_more_is_not_handed_out_as_it(
    gated: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    export(resolve(gated), tmp_path / "exported")
    damage(tmp_path / "exported")
    with pytest.raises(UserError, match=message):
        merge_to_ar(resolve(tmp_path / "exported"), tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


run = partial(run_command, "export")


def test_the_command_tells_what_was_compared(gated: Path, tmp_path: Path) -> None:
    result = run(gated, "--out", tmp_path / "merged", "--merge-to-ar")
    assert result.exit_code == 0, result.output
    assert "which is mixtral again" in result.stdout
    assert "by their sha256" in result.stdout
    document = json.loads(run(gated, "--out", tmp_path / "again", "--merge-to-ar", "--json").stdout)
    assert document["files"]["config.json"]["sha256"] == sha256(tmp_path / "merged" / "config.json")


def test_results_have_no_place_beside_a_merge(gated: Path, tmp_path: Path) -> None:
    (tmp_path / "bench.json").write_text("{}")
    result = run(gated, "--out", tmp_path / "merged", "--merge-to-ar", "--results", tmp_path / "bench.json")
    assert result.exit_code == 2
