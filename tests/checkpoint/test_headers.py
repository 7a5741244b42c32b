"""Headers are read right where they are right, and refused with one clear error where they are not."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from zconvert.checkpoint.headers import DTYPE_BITS, read_header, read_headers
from zconvert.errors import UserError

TWO = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def write(path: Path, header: Any, data: bytes = bytes(32), *, length: int | None = None) -> Path:
    """A safetensors file made by hand; `header` is JSON text, or what becomes it."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def changed(**changes: Any) -> dict[str, Any]:
    """The header `TWO` with tensor b changed."""
    return {"a": TWO["a"], "b": {**TWO["b"], **changes}}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def refusal(path: Path) -> str:
    """The whole text of the error that reading the file ends in."""
    with pytest.raises(UserError) as caught:
        read_header(path)
    assert caught.value.found is not None
    assert caught.value.expected is not None
    assert caught.value.fix is not None
    return str(caught.value)


@pytest.mark.parametrize("model_type", ["zaya", "qwen3_moe", "mixtral"])
@pytest.mark.parametrize("shards", [1, 3])
def test_offsets_point_at_the_bytes_that_safetensors_reads(
    tiny_checkpoint: Callable[..., Path], model_type: str, shards: int
) -> None:
    import torch
    from safetensors import safe_open

    folder = tiny_checkpoint(model_type, shards=shards)
    headers = read_headers(folder)
    assert headers.indexed == (shards > 1)
    assert len(headers.shards) >= shards
    assert headers.metadata == {"format": "pt"}
    seen = set()
    for shard in headers.shards:
        content = (folder / shard.name).read_bytes()
        assert shard.bytes == len(content)
        with safe_open(folder / shard.name, "pt") as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                tensor, info = file.get_tensor(name), headers.tensors[name]
                assert info.shard == shard.name
                assert info.shape == tuple(tensor.shape)
                assert content[info.start : info.end] == tensor.view(torch.uint8).numpy().tobytes()
                seen.add(name)
    assert seen == headers.tensors.keys()


def test_a_single_file_is_preferred_to_an_index_as_in_transformers(tiny_checkpoint: Callable[..., Path]) -> None:
    folder = tiny_checkpoint("mixtral", shards=3)
    write(folder / "model.safetensors", TWO)
    assert read_headers(folder).tensors.keys() == {"a", "b"}


def test_empty_tensors_scalars_padding_and_any_order_are_fine(path: Path) -> None:
    header = {
        "last": {"dtype": "F16", "shape": [], "data_offsets": [4, 6]},
        "empty": {"dtype": "I64", "shape": [0, 7], "data_offsets": [4, 4]},
        "first": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]},
        "__metadata__": {"format": "pt"},
    }
    write(path, json.dumps(header).encode() + b"     ", bytes(6))
    tensors, metadata = read_header(path)
    assert list(tensors) == ["first", "empty", "last"]
    assert [t.items for t in tensors.values()] == [8, 0, 1]
    assert tensors["last"].end == path.stat().st_size
    assert metadata == {"format": "pt"}


def test_every_type_that_safetensors_writes_has_the_size_it_writes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    kinds = [torch.bool, torch.uint8, torch.int16, torch.float16, torch.bfloat16, torch.int32, torch.float32]
    kinds += [torch.int64, torch.float64, torch.complex64, torch.float8_e4m3fn, torch.float8_e5m2, torch.uint32]
    save_file({str(kind): torch.zeros(3, dtype=kind) for kind in kinds}, tmp_path / "all.safetensors")
    tensors, _ = read_header(tmp_path / "all.safetensors")
    assert len(tensors) == len(kinds)
    assert all(t.bytes * 8 == 3 * DTYPE_BITS[t.dtype] for t in tensors.values())


@pytest.mark.parametrize("keep", [0, 7])
def test_a_file_shorter_than_the_length_field_is_refused(path: Path, keep: int) -> None:
    path.write_bytes(bytes(keep))
    assert "too short" in refusal(path)


def test_a_header_longer_than_the_file_is_refused_before_it_is_read(path: Path) -> None:
    assert "longer than can be" in refusal(write(path, TWO, length=10_000))
    assert "longer than can be" in refusal(write(path, TWO, length=2**63))


def test_a_header_above_the_limit_is_refused_though_the_file_is_long_enough(path: Path) -> None:
    write(path, TWO, length=100_000_001)
    with path.open("r+b") as file:
        file.truncate(100_100_000)  # sparse: takes no space
    assert "at most 100000000" in refusal(path)


@pytest.mark.parametrize("cut", [1, 9, 32])
def test_a_truncated_file_says_how_many_bytes_there_should_be(path: Path, cut: int) -> None:
    write(path, TWO)
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-cut])
    text = refusal(path)
    assert "truncated" in text
    assert f"found: {whole - cut} bytes" in text
    assert f"expected: {whole} bytes" in text


@pytest.mark.parametrize(
    ("header", "reason"),
    [
        (b"{", "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"[]", "not a JSON object"),
        (b'{"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32], "dtype": "I8"}}', "a name twice"),
        (
            b'{"a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]},'
            b' "a": {"dtype": "U8", "shape": [32], "data_offsets": [0, 32]}}',
            "found: a",
        ),
        ({**TWO, "__metadata__": {"step": 3}}, "__metadata__ is malformed"),
        ({"a": [0, 32]}, "tensor a is malformed"),
        (changed(dtype="BF17"), "type that is not known"),
        (changed(dtype=None), "type that is not known"),
        (changed(dtype=["F32"]), "type that is not known"),
        (changed(shape=[4.0]), "malformed shape"),
        (changed(shape=[-4]), "malformed shape"),
        (changed(shape=[True]), "malformed shape"),
        (changed(data_offsets=[24]), "malformed data_offsets"),
        (changed(data_offsets=[32, 24]), "malformed data_offsets"),
        (changed(data_offsets=[-8, 0]), "malformed data_offsets"),
        (changed(shape=[3]), "8 bytes\n  expected: 6 bytes"),
        (changed(dtype="F4", shape=[17]), "whole bytes"),
        (changed(data_offsets=[26, 34]), "truncated"),
        (changed(data_offsets=[16, 24]), "overlap"),
        ({"b": TWO["b"]}, "hole between the header and b"),
        ({"a": TWO["a"]}, "bytes of no tensor at the end"),
        ({}, "bytes of no tensor at the end"),
    ],
)
def test_a_header_that_cannot_be_trusted_is_refused(path: Path, header: Any, reason: str) -> None:
    text = refusal(write(path, header))
    assert reason in text
    assert str(path) in text


def test_a_git_lfs_pointer_is_named_as_such(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n")
    assert "git lfs pull" in refusal(path)


def index(folder: Path, weight_map: Any) -> Path:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """Two shards of one tensor each, with their index."""
    for name in "ab":
        header = {name: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}
        write(tmp_path / f"model-{name}.safetensors", header, bytes(4))
    return index(tmp_path, {"a": "model-a.safetensors", "b": "model-b.safetensors"})


def test_an_index_naming_a_missing_shard_is_refused(sharded: Path) -> None:
    (sharded / "model-b.safetensors").unlink()
    with pytest.raises(UserError, match="names a shard that is not there") as caught:
        read_headers(sharded)
    assert "model-b.safetensors" in str(caught.value)


def test_a_shard_that_is_a_broken_link_is_refused(sharded: Path) -> None:
    (sharded / "model-b.safetensors").unlink()
    (sharded / "model-b.safetensors").symlink_to("gone")
    with pytest.raises(UserError, match="cannot be read"):
        read_headers(sharded)


def test_an_index_naming_a_missing_tensor_is_refused(sharded: Path) -> None:
    index(sharded, {"a": "model-a.safetensors", "b": "model-b.safetensors", "c": "model-b.safetensors"})
    with pytest.raises(UserError, match="index and shards disagree") as caught:
        read_headers(sharded)
    assert "such as c (model-b.safetensors)" in str(caught.value)


def test_a_tensor_that_the_index_puts_into_another_shard_is_refused(sharded: Path) -> None:
    index(sharded, {"a": "model-b.safetensors", "b": "model-a.safetensors"})
    with pytest.raises(UserError, match="index and shards disagree"):
        read_headers(sharded)


def test_a_tensor_that_the_index_lacks_is_refused(sharded: Path) -> None:
    header = {n: {"dtype": "U8", "shape": [2], "data_offsets": [i, i + 2]} for n, i in (("b", 0), ("z", 2))}
    write(sharded / "model-b.safetensors", header, bytes(4))
    with pytest.raises(UserError, match="index and shards disagree") as caught:
        read_headers(sharded)
    assert "such as z" in str(caught.value)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    header = {n: {"dtype": "U8", "shape": [2], "data_offsets": [i, i + 2]} for n, i in (("b", 0), ("a", 2))}
    write(sharded / "model-b.safetensors", header, bytes(4))
    with pytest.raises(UserError, match="two shards hold a tensor of the same name"):
        read_headers(sharded)


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "sub/a.safetensors", "..", "", "..\\a", 3, None])
def test_a_shard_outside_of_the_folder_is_refused(sharded: Path, name: Any) -> None:
    with pytest.raises(UserError, match="outside of the folder"):
        read_headers(index(sharded, {"a": name}))


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "\x80"])
def test_a_malformed_index_is_refused(sharded: Path, text: str) -> None:
    (sharded / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=r"model\.safetensors\.index\.json"):
        read_headers(sharded)


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        (["pytorch_model.bin"], "pickled weights only"),
        (["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"], "save_pretrained"),
        (["model-00001-of-00002.safetensors"], r"copy model.safetensors.index.json too"),
        (["consolidated.safetensors"], "Hugging Face layout"),
        (["config.json"], "has no weights"),
    ],
)
def test_a_folder_without_readable_weights_says_what_to_do(tmp_path: Path, files: list[str], reason: str) -> None:
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(UserError) as caught:
        read_headers(tmp_path)
    assert reason in str(caught.value)


def test_reading_headers_needs_no_torch() -> None:
    import subprocess
    import sys

    code = "import sys, zconvert.checkpoint.source, zconvert.checkpoint.describe; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
