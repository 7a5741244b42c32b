"""A plan says beforehand what a conversion does to each file, to the byte, and touches nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.disk import small_disk
from tests.checkpoint.loopback_hub import LoopbackHub, serve
from tests.commands import run_command
from zconvert.checkpoint.graft import carry_out
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.plan import Choices, Plan, plan_conversion
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError

Checkpoint = Callable[..., Path]


def actions(plan: Plan) -> dict[str, str]:
    return {step.name: step.action for step in plan.steps}


@pytest.mark.parametrize("copy", [False, True])
@pytest.mark.parametrize(("spare_rows", "shards"), [(4, 1), (4, 3), (0, 1), (0, 3)])
def test_a_plan_foretells_every_file_its_size_and_what_happens_to_it(
    tiny_checkpoint: Checkpoint, tmp_path: Path, spare_rows: int, shards: int, copy: bool
) -> None:
    source, out = tiny_checkpoint("mixtral", spare_rows=spare_rows, shards=shards), tmp_path / "out"
    (source / "LICENSE").write_text("free")
    (source / "README.md").write_text("card")
    plan = plan_conversion(resolve(source), out, copy=copy)
    assert not out.exists()
    report = carry_out(plan)
    assert {s.name: s.bytes for s in plan.steps} == {p.name: p.stat().st_size for p in out.iterdir()}
    linked = {p.name for p in out.iterdir() if p.stat().st_nlink > 1}
    if "reflink" not in actions(report.plan).values():
        assert report.plan.steps == plan.steps
        assert {name for name, action in actions(plan).items() if action == "link"} == linked
    assert (linked == set()) == (copy or shards == 1)
    assert [s.written for s in plan.steps] == [0 if s.action == "link" else s.bytes for s in plan.steps]
    edited = read_headers(source).tensors["model.embed_tokens.weight"].shard
    assert actions(plan)[edited] == ("copy + patch" if spare_rows else "rewrite")
    assert actions(plan)["provenance.json"] == "new"
    assert actions(plan)["config.json"] == actions(plan)["tokenizer.json"] == "patch JSON"
    assert actions(plan)["LICENSE"] == actions(plan)["BASE_MODEL_CARD.md"] == "copy"


def test_a_plan_for_another_disk_copies_and_so_does_its_conversion(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", shards=3)
    with small_disk(tmp_path / "disk", "10m") as disk:
        plan = plan_conversion(resolve(source), disk / "a" / "out")
        assert "link" not in actions(plan).values()
        assert carry_out(plan).plan.steps == plan.steps
        assert all(path.stat().st_nlink == 1 for path in (disk / "a" / "out").iterdir())


def test_a_link_that_cannot_be_made_after_all_is_reported_as_the_copy_it_became(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral", shards=3)
    plan = plan_conversion(resolve(source), tmp_path / "disk" / "out")
    assert "link" in actions(plan).values()
    with small_disk(tmp_path / "disk", "10m"):
        report = carry_out(plan)
    assert not {"link", "reflink"} & set(actions(report.plan).values())
    assert sum(s.written for s in report.plan.steps) == sum(s.bytes for s in report.plan.steps)


def test_a_file_of_the_hubs_cache_is_linked_and_not_the_link_to_it(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "snapshot"
    snapshot.mkdir()
    shutil.copytree(tiny_checkpoint("mixtral", shards=3), blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    report = carry_out(plan_conversion(resolve(snapshot), tmp_path / "out"))
    linked = [name for name, action in actions(report.plan).items() if action == "link"]
    assert linked or "reflink" in actions(report.plan).values()
    assert all(os.path.samefile(tmp_path / "out" / name, blobs / name) for name in linked)
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("choices", "words"),
    [({"mask_init": "median"}, "start value"), ({"block_size": 1}, "settings"), ({"mask_token": 63}, "id 63")],
)
def test_a_plan_finds_the_mistakes_that_a_conversion_would(
    tiny_checkpoint: Checkpoint, tmp_path: Path, choices: dict[str, Any], words: str
) -> None:
    with pytest.raises(UserError, match=words):
        plan_conversion(resolve(tiny_checkpoint("mixtral")), tmp_path / "out", Choices(**choices))


def test_an_output_that_exists_is_found_before_weights_are_read(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    (source / "model.safetensors").unlink()
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        plan_conversion(resolve(source), tmp_path / "out")


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("ids", [64, [1, 99]])
def test_a_configuration_that_names_a_token_without_a_row_is_refused(
    tiny_checkpoint: Checkpoint, tmp_path: Path, file: str, ids: Any
) -> None:
    source = tiny_checkpoint("mixtral")
    values = json.loads((source / file).read_text())
    (source / file).write_text(json.dumps({**values, "eos_token_id": ids}))
    with pytest.raises(UserError, match="names a token that the embedding has no row for") as caught:
        plan_conversion(resolve(source), tmp_path / "out")
    assert caught.value.what.startswith(file)


run = partial(run_command, "convert-init")


def test_a_dry_run_shows_a_table_at_80_columns_and_writes_nothing(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    source = tiny_checkpoint("mixtral", shards=3)
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()}
    done = run(source, "--out", "out", "--dry-run")
    assert done.exit_code == 0, done.output
    assert max(map(len, done.stdout.splitlines())) <= 80
    shown = {line.split()[0]: line for line in done.stdout.splitlines() if line.strip()}
    for path in source.iterdir():
        assert path.name in shown
    assert "copy + patch" in shown["model-00001-of-00004.safetensors"]
    assert "link" in shown["model-00002-of-00004.safetensors"]
    assert "Would write" in done.stdout
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in source.iterdir()} == before
    assert not Path("out").exists()


def test_a_dry_run_and_a_conversion_print_the_same_files_as_json(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = tiny_checkpoint("zaya", shards=3), tmp_path / "out"
    dry = json.loads(run(source, "--out", out, "--json", "--dry-run", "--block-size", 4).stdout)
    assert not out.exists()
    wet = json.loads(run(source, "--out", out, "--json", "--verify", "bytes", "--block-size", 4).stdout)
    assert (dry["dry_run"], wet["dry_run"]) == (True, False)
    assert wet["verified"]["level"] == "bytes"
    assert (dry["block_size"], dry["mask_token"]["id"], dry["proposals"]) == (4, 60, [1, 2, 3, 4])
    assert dry["bytes_written"] == sum(file["written"] for file in dry["files"])
    assert [f["name"] for f in dry["files"]] == [f["name"] for f in wet["files"]] == sorted(os.listdir(out))


def test_how_it_is_made_may_be_said_beside_a_recipe(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe, out = tmp_path / "convert-init.yaml", tmp_path / "out"
    recipe.write_text(f"base_model: {tiny_checkpoint('zaya', shards=3)}\noutput_dir: {out}\n")
    assert run(recipe, "--dry-run").exit_code == 0
    assert not out.exists()
    done = run(recipe, "--copy", "--verify", "none", "--json")
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["verified"]["level"] == "none"
    assert all(path.stat().st_nlink == 1 for path in out.iterdir())


def test_a_dry_run_of_a_checkpoint_on_the_hub_fetches_no_weights(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", shards=3)
    with serve(LoopbackHub({"org/sharded": source})) as hub:
        done = subprocess.run(
            [sys.executable, "-m", "zconvert", "convert-init", "org/sharded", "--out", "out", "--dry-run", "--json"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(Path.cwd())},
        )
    assert done.returncode == 0, done.stderr
    files = {file["name"]: file["action"] for file in json.loads(done.stdout)["files"]}
    assert files["model-00001-of-00004.safetensors"] == "copy + patch"
    assert files["model-00004-of-00004.safetensors"] == "link"
    assert all(None not in spans for name, spans in hub.ranges.items() if name.endswith(".safetensors"))
    assert not list((tmp_path / "home").rglob("*.safetensors"))
    assert not (tmp_path / "out").exists()
