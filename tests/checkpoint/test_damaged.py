"""Damaged input and hostile disks: one clear error each, the source as it was, and no folder left."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.disk import small_disk
from tests.checkpoint.tiny import ROWS
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError

Checkpoint = Callable[..., Path]
Damage = Callable[[Path], None]
EMBEDDING = "model.embed_tokens.weight"
INDEX = "model.safetensors.index.json"


def state(folder: Path) -> dict[str, Any]:
    """Every file by hash, every link by its target."""
    return {
        path.name: os.readlink(path) if path.is_symlink() else hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
    }


def shard(folder: Path, number: int) -> Path:
    return sorted(folder.glob("*.safetensors"))[number]


def edit_header(path: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    """Changes the header of a safetensors file; the tensors' bytes stay as they are."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    edit(header)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def tensors_of(header: dict[str, Any]) -> list[str]:
    """Names in the order of the file."""
    names = [name for name in header if name != "__metadata__"]
    return sorted(names, key=lambda name: header[name]["data_offsets"])


def edit_index(folder: Path, edit: Callable[[dict[str, str]], object]) -> None:
    document = json.loads((folder / INDEX).read_text())
    edit(document["weight_map"])
    (folder / INDEX).write_text(json.dumps(document))


def edit_json(path: Path, **members: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **members}))


def a_shard_is_missing(folder: Path) -> None:
    shard(folder, -1).unlink()


def the_index_names_a_tensor_that_its_shard_lacks(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({"model.more.weight": shard(folder, 0).name}))


def the_index_names_the_wrong_shard(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({EMBEDDING: shard(folder, -1).name}))


def the_index_leaves_a_tensor_out(folder: Path) -> None:
    edit_index(folder, lambda m: m.pop("model.norm.weight"))


def the_index_leads_out_of_the_folder(folder: Path) -> None:
    edit_index(folder, lambda m: m.update({EMBEDDING: "../model.safetensors"}))


def the_index_is_cut_off(folder: Path) -> None:
    (folder / INDEX).write_text((folder / INDEX).read_text()[:-200])


def two_shards_have_a_tensor_of_one_name(folder: Path) -> None:
    replaced = list(read_headers(folder).tensors)[-1]
    edit_header(shard(folder, -1), lambda h: h.update({EMBEDDING: h.pop(replaced)}))
    edit_index(folder, lambda m: m.pop(replaced))


def a_header_has_a_name_twice(folder: Path) -> None:
    path = shard(folder, 0)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    text = content[8 : 8 + length].rstrip()
    text = text[:-1] + b',"' + EMBEDDING.encode() + b'":' + text[text.index(EMBEDDING.encode()) + len(EMBEDDING) + 2 :]
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


def two_tensors_overlap(folder: Path) -> None:
    def overlap(header: dict[str, Any]) -> None:
        first, second = tensors_of(header)[:2]
        span = header[second]["data_offsets"]
        start = header[first]["data_offsets"][0] + 2
        header[second]["data_offsets"] = [start, start + span[1] - span[0]]

    edit_header(shard(folder, 1), overlap)


def a_tensor_lies_beyond_the_file(folder: Path) -> None:
    def move(header: dict[str, Any]) -> None:
        last = tensors_of(header)[-1]
        header[last]["data_offsets"] = [offset + 10**9 for offset in header[last]["data_offsets"]]

    edit_header(shard(folder, 1), move)


def a_file_is_cut_off(folder: Path) -> None:
    shard(folder, 0).write_bytes(shard(folder, 0).read_bytes()[:-100])


def a_header_is_longer_than_its_file(folder: Path) -> None:
    path = shard(folder, 2)
    path.write_bytes(struct.pack("<Q", path.stat().st_size) + path.read_bytes()[8:])


def a_header_is_no_json(folder: Path) -> None:
    path = shard(folder, 0)
    path.write_bytes(path.read_bytes()[:8] + bytes(50) + path.read_bytes()[58:])


def a_row_of_the_embedding_is_nan(folder: Path) -> None:
    tensor = read_headers(folder).tensors[EMBEDDING]
    with (folder / tensor.shard).open("r+b") as file:
        file.seek(tensor.start + 7 * tensor.bytes // ROWS)
        file.write(b"\xff\xff" * 32)  # NaN in bfloat16


def the_tokenizer_is_larger_than_the_embedding(folder: Path) -> None:
    document = json.loads((folder / "tokenizer.json").read_text())
    document["model"]["vocab"].update({f"more-{i}": 60 + i for i in range(5)})
    (folder / "tokenizer.json").write_text(json.dumps(document))


def the_configuration_has_another_vocabulary(folder: Path) -> None:
    edit_json(folder / "config.json", vocab_size=96)


def the_configuration_ends_texts_with_a_token_without_a_row(folder: Path) -> None:
    edit_json(folder / "config.json", eos_token_id=ROWS)


def the_tokenizer_is_cut_off(folder: Path) -> None:
    (folder / "tokenizer.json").write_text((folder / "tokenizer.json").read_text()[:-300])


def the_generation_config_is_cut_off(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": 1,')


def loops(name: str) -> Damage:
    """A file becomes a symbolic link to a link to itself."""

    def loop(folder: Path) -> None:
        path = shard(folder, 0) if name == "shard" else folder / name
        path.unlink(missing_ok=True)
        path.symlink_to("loop")
        (folder / "loop").symlink_to(path.name)

    loop.__name__ = f"{name}_is_a_loop_of_links"
    return loop


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (a_shard_is_missing, "names a shard that is not there"),
        (the_index_names_a_tensor_that_its_shard_lacks, "index and shards disagree"),
        (the_index_names_the_wrong_shard, "index and shards disagree"),
        (the_index_leaves_a_tensor_out, "index and shards disagree"),
        (the_index_leads_out_of_the_folder, "outside of the folder"),
        (the_index_is_cut_off, "index is malformed"),
        (two_shards_have_a_tensor_of_one_name, "two shards hold a tensor of the same name"),
        (a_header_has_a_name_twice, "the header has a name twice"),
        (two_tensors_overlap, "overlap"),
        (a_tensor_lies_beyond_the_file, "truncated"),
        (a_file_is_cut_off, "truncated"),
        (a_header_is_longer_than_its_file, "the header is longer than can be"),
        (a_header_is_no_json, "the header is not JSON"),
        (a_row_of_the_embedding_is_nan, "NaN or infinity in row 7"),
        (the_tokenizer_is_larger_than_the_embedding, "does not fit the model"),
        (the_configuration_has_another_vocabulary, "does not agree with config.json"),
        (the_configuration_ends_texts_with_a_token_without_a_row, "no row for"),
        (the_tokenizer_is_cut_off, "malformed"),
        (the_generation_config_is_cut_off, "malformed"),
        (loops("shard"), "cannot be read"),
        (loops("config.json"), "cannot be read"),
        (loops("tokenizer.json"), "cannot be read"),
        (loops(INDEX), "cannot be read"),
        (loops("merges.txt"), "leads to no file"),
        (loops("generation_config.json"), "cannot be read"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_damaged_source_is_one_clear_error_and_nothing_is_left(
    tiny_checkpoint: Checkpoint, tmp_path: Path, damage: Damage, words: str
) -> None:
    source = tiny_checkpoint("mixtral", shards=3, tied=False)
    damage(source)
    before = state(source)
    with pytest.raises(UserError) as caught:
        convert_init(resolve(source), tmp_path / "work" / "out")
    assert words in str(caught.value)
    assert caught.value.found
    assert len(caught.value.what.splitlines()) == 1
    assert not (tmp_path / "work").exists()
    assert state(source) == before


@pytest.mark.parametrize("mask_init", ["mean", "zero", "random", "copy:a"])
@pytest.mark.parametrize("spare_rows", [4, 0])
def test_nan_in_the_embedding_is_told_whatever_the_start_value(
    tiny_checkpoint: Checkpoint, tmp_path: Path, mask_init: str, spare_rows: int
) -> None:
    source = tiny_checkpoint("mixtral", spare_rows=spare_rows)
    a_row_of_the_embedding_is_nan(source)
    with pytest.raises(UserError, match="is damaged") as caught:
        convert_init(resolve(source), tmp_path / "out", mask_init=mask_init)
    assert "row 7, that of" in str(caught.value.found)


def test_nan_in_a_row_that_no_token_has_is_no_harm_unless_it_is_to_be_copied(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral")
    tensor = read_headers(source).tensors[EMBEDDING]
    with (source / tensor.shard).open("r+b") as file:
        file.seek(tensor.start + 62 * tensor.bytes // ROWS)
        file.write(b"\xff\xff" * 32)
    convert_init(resolve(source), tmp_path / "out")
    with pytest.raises(UserError, match="is damaged") as caught:
        convert_init(resolve(source), tmp_path / "other", mask_init="copy:62")
    assert "row 62" in str(caught.value.found)
    assert not (tmp_path / "other").exists()


def test_a_folder_that_is_a_loop_of_links_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    with pytest.raises(UserError):
        resolve(tmp_path / "a")


@pytest.mark.parametrize("spare_rows", [4, 0])
@pytest.mark.parametrize("size", ["40k", "72k"])
def test_a_full_disk_is_told_with_what_is_free_and_leaves_nothing(
    tiny_checkpoint: Checkpoint, tmp_path: Path, spare_rows: int, size: str
) -> None:
    source = tiny_checkpoint("zaya", spare_rows=spare_rows)
    before = state(source)
    with small_disk(tmp_path / "disk", size) as disk:
        with pytest.raises(UserError, match="disk is full") as caught:
            convert_init(resolve(source), disk / "a" / "out")
        assert "free" in str(caught.value.found)
        assert os.listdir(disk) == []
    assert state(source) == before


def test_another_disk_gets_copies_which_are_verified(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", shards=3)
    before = state(source)
    with small_disk(tmp_path / "disk", "10m") as disk:
        convert_init(resolve(source), disk / "out")
        after = state(disk / "out")
        assert os.listdir(disk) == ["out"]
        assert all(path.stat().st_nlink == 1 for path in (disk / "out").iterdir())
    edited = read_headers(source).tensors[EMBEDDING].shard
    shards = {name for name in before if name.endswith(".safetensors")}
    assert {name for name in shards if after[name] != before[name]} == {edited}
    assert state(source) == before


@contextlib.contextmanager
def read_only(disk: Path) -> Iterator[None]:
    """Mounts a disk anew so that nothing can be written to it; for an administrator permissions alone do not do it."""
    done = subprocess.run(["mount", "-o", "remount,ro", str(disk)], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a disk cannot be made read-only here: {done.stderr.strip()}")
    yield


def test_a_read_only_output_is_a_users_error(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    before = state(source)
    with small_disk(tmp_path / "disk", "10m") as disk:
        with read_only(disk), pytest.raises(UserError) as caught:
            convert_init(resolve(source), disk / "out")
        assert "Read-only" in str(caught.value.found)
        assert "elsewhere" in str(caught.value.fix)
        assert os.listdir(disk) == []
    assert state(source) == before


def test_a_read_only_source_is_no_hindrance(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    made = tiny_checkpoint("mixtral", shards=3)
    with small_disk(tmp_path / "disk", "10m") as disk:
        for path in made.iterdir():
            (disk / path.name).write_bytes(path.read_bytes())
        with read_only(disk):
            convert_init(resolve(disk), tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()
