"""What is verified after a conversion: that it finds every kind of fault, and what it says it looked at."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import MODEL_TYPES
from zconvert.checkpoint import parity, verify
from zconvert.checkpoint.compare import first_difference
from zconvert.checkpoint.graft import carry_out, convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.plan import Choices, Plan, plan_conversion
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError

Checkpoint = Callable[..., Path]
EMBEDDING = "model.embed_tokens.weight"


def flip(path: Path, offset: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)
        file.seek(offset)
        file.write(bytes([byte[0] ^ 1]))


def change(path: Path, **members: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}, indent=2))


@pytest.fixture
def written(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., tuple[Plan, Path]]:
    """Converts without a look at it: to be damaged."""

    def make(**options: Any) -> tuple[Plan, Path]:
        source = tiny_checkpoint("mixtral", shards=3, **options)
        (source / "LICENSE").write_text("free as can be")
        report = carry_out(plan_conversion(resolve(source), tmp_path / "out"), level="none")
        return report.plan, tmp_path / "out"

    return make


def look(plan: Plan, folder: Path) -> verify.Verified:
    return verify.verify(plan, folder, plan.rows.edits(plan.choices.mask_init, plan.choices.seed), "bytes")


@pytest.mark.parametrize("spare_rows", [4, 0])
def test_what_was_written_right_passes_and_every_byte_is_accounted_for(
    written: Callable[..., Any], spare_rows: int
) -> None:
    plan, folder = written(spare_rows=spare_rows)
    found = look(plan, folder)
    assert found.files_linked == len(plan.headers.shards) - len({t.shard for t in plan.rows.edited})
    shards = [s for s in plan.headers.shards if plan.edited(s)]
    rows = sum(t.bytes // t.shape[0] for t in plan.rows.edited) * (spare_rows > 0)
    weights = sum(s.bytes if spare_rows else s.bytes - s.data_start for s in shards) - rows
    assert found.bytes_compared == weights + (plan.source.folder / "LICENSE").stat().st_size


@pytest.mark.parametrize("spare_rows", [4, 0])
@pytest.mark.parametrize("place", ["first", "before the row", "mask row", "after the row", "last"])
def test_one_wrong_bit_in_an_edited_file_is_found(written: Callable[..., Any], spare_rows: int, place: str) -> None:
    plan, folder = written(spare_rows=spare_rows)
    tensor = read_headers(folder).tensors[EMBEDDING]
    path, row = folder / tensor.shard, tensor.bytes // tensor.shape[0]
    mask = tensor.start + plan.mask.id * row
    first = min(t.start for t in read_headers(folder).tensors.values() if t.shard == tensor.shard)
    offsets = {"first": first, "before the row": mask - 1, "mask row": mask, "after the row": mask + row}
    flip(path, offsets.get(place, path.stat().st_size - 1))
    with pytest.raises(UserError, match="was not written as planned") as caught:
        look(plan, folder)
    assert tensor.shard in caught.value.what
    if "row" in place:
        assert EMBEDDING in str(caught.value.found)


def lose_the_settings(plan: Plan, folder: Path) -> None:
    change(folder / "config.json", tidar={**plan.settings.to_dict(), "block_size": 3})


def change_the_model(plan: Plan, folder: Path) -> None:
    change(folder / "config.json", rms_norm_eps=0.1)


def let_the_mask_be_sampled(plan: Plan, folder: Path) -> None:
    change(folder / "generation_config.json", suppress_tokens=[3])


def unname_the_mask(plan: Plan, folder: Path) -> None:
    change(folder / "tokenizer_config.json", mask_token="<unk>")


def rename_the_mask(plan: Plan, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"<mask>"', '"<other>"'))


def leave_a_gap_in_the_ids(plan: Plan, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace('"id": 60', '"id": 61'))


def copy_a_linked_file(plan: Plan, folder: Path) -> None:
    path = folder / next(step.name for step in plan.steps if step.action == "link")
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content)


def edit_the_licence(plan: Plan, folder: Path) -> None:
    flip(folder / "LICENSE", 0)


def cut_the_licence(plan: Plan, folder: Path) -> None:
    (folder / "LICENSE").write_text("free")


def lengthen_the_licence(plan: Plan, folder: Path) -> None:
    (folder / "LICENSE").write_text("free as can be, or not")


@pytest.mark.parametrize(
    "damage",
    [
        *(lose_the_settings, change_the_model, let_the_mask_be_sampled, unname_the_mask, rename_the_mask),
        *(leave_a_gap_in_the_ids, copy_a_linked_file, edit_the_licence, cut_the_licence, lengthen_the_licence),
    ],
)
def test_every_kind_of_fault_in_what_was_written_is_found(
    written: Callable[..., Any], damage: Callable[[Plan, Path], None]
) -> None:
    plan, folder = written()
    if damage is copy_a_linked_file and "link" not in {step.action for step in plan.steps}:
        pytest.skip("this disk has reflinks")
    damage(plan, folder)
    with pytest.raises(UserError):
        look(plan, folder)


def test_a_fault_while_writing_leaves_no_folder_and_the_source_as_it_was(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral", shards=3)
    before = {path.name: path.read_bytes() for path in source.iterdir()}

    def spoil(step: str) -> None:
        if step == "Verifying":
            (partial,) = tmp_path.glob(".out.partial-*")
            flip(partial / read_headers(source).tensors[EMBEDDING].shard, 3000)

    with pytest.raises(UserError, match="was not written as planned"):
        carry_out(plan_conversion(resolve(source), tmp_path / "out"), on_step=spoil)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    assert {path.name: path.read_bytes() for path in source.iterdir()} == before


@pytest.mark.parametrize("size", [1, 1_048_576, 5_000_001])
def test_two_files_are_compared_to_the_last_byte(tmp_path: Path, size: int) -> None:
    content = os.urandom(size)
    (tmp_path / "a").write_bytes(content)
    (tmp_path / "b").write_bytes(b"xyz" + content)
    span = [(0, 3, size)]
    assert first_difference(tmp_path / "a", tmp_path / "b", span) is None
    flip(tmp_path / "b", size + 2)
    assert first_difference(tmp_path / "a", tmp_path / "b", span) == size + 2
    flip(tmp_path / "b", size + 2)
    (tmp_path / "a").write_bytes(content[:-1])
    assert first_difference(tmp_path / "a", tmp_path / "b", span) is not None  # too short is different


@pytest.mark.parametrize(("spare_rows", "tied"), [(4, True), (0, False)])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_logits_of_a_small_model_are_compared_by_default_of_the_command(
    tiny_checkpoint: Checkpoint, tmp_path: Path, model_type: str, spare_rows: int, tied: bool
) -> None:
    source = tiny_checkpoint(model_type, spare_rows=spare_rows, tied=tied, shards=3)
    found = carry_out(plan_conversion(resolve(source), tmp_path / "out"), level="auto").verified
    assert found.level == "logits"
    assert found.logits_compared > 32
    assert found.logits_difference is not None
    assert found.logits_difference < 1e-5


@pytest.mark.parametrize("mask_token", ["<mask>", "z"])
def test_an_existing_entry_as_mask_token_passes_too(
    tiny_checkpoint: Checkpoint, tmp_path: Path, mask_token: str
) -> None:
    source = tiny_checkpoint("zaya", mask_token=True)
    plan = plan_conversion(resolve(source), tmp_path / "out", Choices(mask_token=mask_token, mask_init="random"))
    assert plan.mask.source == "existing"
    assert carry_out(plan, level="logits").verified.level == "logits"


def test_a_conversion_that_computes_something_else_is_told_by_its_logits(written: Callable[..., Any]) -> None:
    plan, folder = written()
    assert parity.compare_logits(plan, folder)[1] < 1e-5
    change(folder / "config.json", rms_norm_eps=0.1)
    with pytest.raises(UserError, match="does not compute the source's logits"):
        parity.compare_logits(plan, folder)


def test_another_tokenizer_is_told_by_the_probe_text(written: Callable[..., Any]) -> None:
    plan, folder = written()
    path = folder / "tokenizer.json"
    document = json.loads(path.read_text())
    document["model"]["merges"] = []
    path.write_text(json.dumps(document))
    with pytest.raises(UserError, match="tokenizer is not the source's"):
        parity.compare_logits(plan, folder)


def test_auto_says_why_it_leaves_the_logits_of_a_large_model_out(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "AUTO_LOGITS_BYTES", 1000)
    plan = plan_conversion(resolve(tiny_checkpoint("mixtral")), tmp_path / "out")
    found = carry_out(plan, level="auto").verified
    assert (found.level, found.logits_difference) == ("bytes", None)
    assert "large" in str(found.logits_skipped)


def test_logits_that_cannot_fit_are_refused_before_anything_is_written(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "free_memory", lambda: 1000)
    plan = plan_conversion(resolve(tiny_checkpoint("mixtral")), tmp_path / "out")
    with pytest.raises(UserError, match="does not fit into the memory"):
        carry_out(plan, level="logits", on_step=lambda step: pytest.fail(step))
    assert not (tmp_path / "out").exists()


def test_a_source_that_transformers_cannot_load_is_converted_by_auto_and_refused_by_logits(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral")
    change(source / "config.json", num_hidden_layers=3)  # the third one's weights are missing
    found = carry_out(plan_conversion(resolve(source), tmp_path / "out"), level="auto").verified
    assert found.level == "bytes"
    assert "do not fit its config.json" in str(found.logits_skipped)
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(UserError, match=r"do not fit its config\.json"):
        carry_out(plan_conversion(resolve(source), tmp_path / "out"), level="logits")
    assert not (tmp_path / "out").exists()


def test_converting_and_verifying_bytes_needs_no_torch(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from zconvert.checkpoint.graft import convert_init; "
        "from zconvert.checkpoint.source import resolve; "
        f"convert_init(resolve({str(tiny_checkpoint('zaya'))!r}), Path({str(tmp_path / 'out')!r})); "
        "print('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False\n", done.stderr
    assert (tmp_path / "out" / "config.json").exists()


def test_the_library_verifies_bytes_where_nothing_is_said(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    report = carry_out(plan_conversion(resolve(tiny_checkpoint("zaya")), tmp_path / "out"))
    assert report.verified.level == "bytes"
    assert convert_init(resolve(tiny_checkpoint("zaya")), tmp_path / "other") == report.plan.settings
