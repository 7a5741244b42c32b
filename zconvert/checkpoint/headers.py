"""Safetensors headers: which tensors a checkpoint holds and at which bytes, checked before they are trusted.

A safetensors file is 8 bytes (the header's length, little-endian), the header (JSON) and the tensors' bytes:

    | 8 bytes: N | N bytes: {"name": {"dtype", "shape", "data_offsets": [begin, end]}, …} | tensor bytes |

Offsets in the file count from the end of the header; `TensorInfo` has them from the start of the file, so that rows
can be read and patched in place. Nothing is loaded, and torch is not needed.
"""

from __future__ import annotations

import json
import math
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeGuard

from zconvert.checkpoint.small_files import read_small, require_file
from zconvert.errors import UserError

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""the limit of the safetensors library; a longer header is damage or an attack"""
MOST_DIMENSIONS = 64
"""of a tensor, as torch has it; with millions of them their product alone would take hours"""
_MOST_SIZE = 2**63

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
"""bits of one item, by the name that safetensors gives the type"""

_DAMAGED = "the file is damaged or incomplete: download or copy it again"
_LFS_POINTER = b"version https://git-lfs"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
"""how the names of weight files end that could run any code when they are read"""


class TensorInfo(NamedTuple):
    """One tensor of a checkpoint: bytes `start` to `end` (exclusive, from the start of the file) of file `shard`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int

    @property
    def bytes(self) -> int:
        """Its size in the file."""
        return self.end - self.start

    @property
    def items(self) -> int:
        """Number of items: the product of its shape."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """One safetensors file: its name in the folder, its size, where its tensors begin and its `__metadata__`."""

    name: str
    bytes: int
    data_start: int
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Headers:
    """All tensors of a checkpoint, in the order of their files and offsets, and the files themselves.

    `metadata` joins the `__metadata__` of all files; `indexed` tells a checkpoint with an index of shards from one
    single file.
    """

    tensors: dict[str, TensorInfo]
    shards: tuple[Shard, ...]
    metadata: dict[str, str] = field(default_factory=dict)
    indexed: bool = False


class ShardFiles(Protocol):
    """Where shards are read from: a folder, or the Hub."""

    def names(self) -> set[str]:
        """Names of all files there."""

    def size(self, name: str) -> int:
        """Size of a file in bytes."""

    def open(self, name: str) -> BinaryIO:
        """Opens a file to read."""


@dataclass(frozen=True)
class FolderFiles:
    """Shards in a local folder."""

    folder: Path

    def names(self) -> set[str]:
        """Names of all files in the folder."""
        return {entry.name for entry in self.folder.iterdir()}

    def size(self, name: str) -> int:
        """Size of a file in bytes; the one a link points to."""
        return require_file(self.folder / name)

    def open(self, name: str) -> BinaryIO:
        """Opens a file to read."""
        return (self.folder / name).open("rb")


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Reads the header of one safetensors file.

    Returns:
        its tensors by name, in the order of their offsets, and its `__metadata__`.

    Raises:
        UserError: the file is not there, or its header cannot be trusted.
    """
    tensors, shard = _read_shard(FolderFiles(path.parent), path.parent, path.name)
    return tensors, shard.metadata


def read_headers(folder: Path, files: ShardFiles | None = None) -> Headers:
    """Reads and checks the headers of all weight files of a checkpoint.

    Args:
        folder: the checkpoint's folder, with the index where there are several shards.
        files: where the shards are, if not in the folder.

    Raises:
        UserError: there are no safetensors weights, a file is damaged, or index and shards disagree.
    """
    files = files or FolderFiles(folder)
    names = files.names()
    if SINGLE_FILE in names:  # as transformers does, which looks for the single file first
        tensors, shard = _read_shard(files, folder, SINGLE_FILE)
        return Headers(tensors, (shard,), dict(shard.metadata))
    if INDEX_FILE not in names:
        raise _no_weights(folder, names)
    weight_map = read_weight_map(folder / INDEX_FILE)
    all_tensors: dict[str, TensorInfo] = {}
    shards: list[Shard] = []
    metadata: dict[str, str] = {}
    for name in sorted(set(weight_map.values())):
        if name not in names:
            raise UserError(
                f"{folder / INDEX_FILE} names a shard that is not there",
                found=f"no file {name} in {folder}",
                expected=f"all {len(set(weight_map.values()))} shards beside the index",
                fix="download or copy the missing file",
            )
        tensors, shard = _read_shard(files, folder, name)
        if twice := sorted(tensors.keys() & all_tensors.keys()):
            raise UserError(
                f"{folder}: two shards hold a tensor of the same name",
                found=f"{twice[0]} in {all_tensors[twice[0]].shard} and in {name}",
                expected="each tensor once",
                fix="the shards are of different checkpoints: download them again, all of one revision",
            )
        all_tensors |= tensors
        shards.append(shard)
        metadata |= shard.metadata
    _compare_with_index(folder / INDEX_FILE, weight_map, all_tensors)
    return Headers(all_tensors, tuple(shards), metadata, indexed=True)


def _read_shard(files: ShardFiles, folder: Path, name: str) -> tuple[dict[str, TensorInfo], Shard]:
    path = folder / name
    try:
        size = files.size(name)
        with files.open(name) as file:
            start = file.read(8)
            if len(start) < 8:
                raise _damaged(path, "the file is too short", f"{size} bytes", "at least 8, the header's length")
            if start == _LFS_POINTER[:8] and (start + file.read(15)) == _LFS_POINTER:
                raise UserError(
                    f"{path} is a Git LFS pointer, not the weights",
                    found=f"a text file of {size} bytes",
                    expected="a safetensors file",
                    fix="fetch the weights with `git lfs pull`, or give the Hub id",
                )
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER_BYTES or length > size - 8:
                most = f"at most {min(MAX_HEADER_BYTES, size - 8)}, as the file has {size} bytes"
                raise _damaged(path, "the header is longer than can be", f"a length of {length} bytes", most)
            text = file.read(length)
    except OSError as error:
        raise UserError(
            f"{path} cannot be read",
            found=error.strerror or str(error),
            expected="a readable safetensors file",
            fix="check the file, its link target and its permissions",
        ) from error
    tensors, metadata = _parse(text, path, data_start=8 + length, size=size)
    return tensors, Shard(name, size, 8 + length, metadata)


def _parse(text: bytes, path: Path, *, data_start: int, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    def no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) < len(pairs):
            repeated = next(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
            raise _damaged(path, "the header has a name twice", repeated, "each name once")
        return members

    # Python's parser takes more for a number than that of the safetensors library, which reads the file later.
    def no_constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    def whole(digits: str) -> int:
        return int(digits) if digits != "-0" else no_constant(digits)

    try:
        header = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=no_repeats,
            parse_constant=no_constant,
            parse_int=whole if b"-0" in text else None,  # slower than Python's own, with 100,000 tensors
        )
        if b"\\u" in text:  # an escape can say half a character, which no file can
            json.dumps(header, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise _damaged(path, "the header is not JSON", error, "a JSON object") from error
    if not isinstance(header, dict):
        raise _damaged(path, "the header is not a JSON object", type(header).__name__, "an object")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _damaged(path, "the header's __metadata__ is malformed", metadata, "texts by name")
    shard = path.name
    tensors = [_parse_tensor(path, shard, name, entry, data_start) for name, entry in header.items()]
    tensors.sort(key=lambda t: (t.start, t.end))
    _check_cover(path, tensors, data_start, size)
    return {t.name: t for t in tensors}, metadata


def _parse_tensor(path: Path, shard: str, name: str, entry: Any, data_start: int) -> TensorInfo:
    if not isinstance(entry, dict):
        raise _damaged(path, f"tensor {name} is malformed", entry, "dtype, shape and data_offsets")
    dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise UserError(
            f"{path}: tensor {name} is of a type that is not known",
            found=repr(dtype),
            expected=f"one of {', '.join(DTYPE_BITS)}",
            fix="the file is damaged, or newer than this version: download it again, or upgrade zconvert",
        )
    if not _are_sizes(shape) or len(shape) > MOST_DIMENSIONS:
        expected = f"at most {MOST_DIMENSIONS} whole numbers from 0, below 2^63"
        raise _damaged(path, f"tensor {name} has a malformed shape", shape, expected)
    if not _are_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise _damaged(path, f"tensor {name} has malformed data_offsets", offsets, "[begin, end], begin ≤ end")
    bits = math.prod(shape) * DTYPE_BITS[dtype]
    span = offsets[1] - offsets[0]
    if bits != 8 * span:
        needs = f"{bits // 8} bytes for {dtype} {shape}" if bits % 8 == 0 else f"whole bytes, not {bits} bits"
        raise _damaged(path, f"tensor {name} does not fill its bytes", f"{span} bytes", needs)
    return TensorInfo(name, dtype, tuple(shape), shard, data_start + offsets[0], data_start + offsets[1])


def _check_cover(path: Path, tensors: list[TensorInfo], data_start: int, size: int) -> None:
    """The tensors, sorted, must cover the file from `data_start` to `size` once: no overlap, no hole, no rest."""
    last = max((t.end for t in tensors), default=data_start)
    if last > size:
        raise _damaged(path, "the file is truncated", f"{size} bytes", f"{last} bytes, by its header")
    position, before = data_start, "the header"
    for t in tensors:
        if t.start < position:
            raise _damaged(path, f"tensors {before} and {t.name} overlap", f"{t.name} at {t.start}", f"at {position}")
        if t.start > position:
            what = f"there is a hole between {before} and {t.name}"
            raise _damaged(path, what, f"{t.start - position} bytes of no tensor", "tensors without gaps")
        position, before = t.end, t.name
    if position < size:
        raise _damaged(path, "there are bytes of no tensor at the end", f"{size} bytes", f"{position} bytes")


def read_weight_map(index: Path) -> dict[str, str]:
    """Tensor -> file beside the index, as an index of shards has it; whether they are there is not looked at.

    Raises:
        UserError: it cannot be read, is malformed, or names what is no file beside it.
    """
    try:
        weight_map = json.loads(read_small(index).decode("utf-8"))["weight_map"]
    except OSError as error:
        raise _damaged(index, "the index cannot be read", error.strerror, "a JSON file") from error
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise _damaged(index, "the index is malformed", repr(error), 'JSON with a "weight_map"') from error
    if not isinstance(weight_map, dict) or not weight_map:
        raise _damaged(index, "the index has no weight_map", type(weight_map).__name__, "file names by tensor")
    for tensor, name in weight_map.items():
        # A bare file name only: anything else could make a later copy read or write outside of the folder.
        if not isinstance(name, str) or name in ("", ".", "..") or set(name) & set("/\\\0"):
            raise UserError(
                f"{index}: tensor {tensor} is said to be in a file outside of the folder",
                found=repr(name),
                expected="the name of a file beside the index",
                fix="put all shards beside the index, and their bare names into it",
            )
    return weight_map


def _compare_with_index(index: Path, weight_map: dict[str, str], tensors: dict[str, TensorInfo]) -> None:
    absent = sorted(name for name, shard in weight_map.items() if name not in tensors or tensors[name].shard != shard)
    if absent:
        found = f"{len(absent)} tensors not in the shard it names, such as {absent[0]} ({weight_map[absent[0]]})"
        raise _damaged(index, "index and shards disagree", found, "each tensor in its shard")
    unlisted = sorted(tensors.keys() - weight_map.keys())
    if unlisted:
        found = f"{len(unlisted)} tensors not in the index, such as {unlisted[0]} ({tensors[unlisted[0]].shard})"
        raise _damaged(index, "index and shards disagree", found, "all tensors of the shards in the index")


def _no_weights(folder: Path, names: Iterable[str]) -> UserError:
    expected = f"{SINGLE_FILE}, or {INDEX_FILE} and its shards"
    pickles = sorted(name for name in names if name.endswith(PICKLES) and not name.startswith("training_args"))
    others = sorted(name for name in names if name.endswith((".safetensors", ".gguf")))
    if others:
        fix = "convert to the Hugging Face layout: load with transformers and save with `save_pretrained`"
        if any(name.startswith("model-") for name in others):
            fix = f"download or copy {INDEX_FILE} too"
        found = f"only {', '.join(others[:3])}{' …' if len(others) > 3 else ''}"
        return UserError(f"{folder} has no weights that can be read", found=found, expected=expected, fix=fix)
    if pickles:
        return UserError(
            f"{folder} has pickled weights only, which could run any code when they are read",
            found=", ".join(pickles[:3]) + (" …" if len(pickles) > 3 else ""),
            expected=expected,
            fix="if you trust them, convert them once: "
            "`AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)`, and copy the tokenizer files",
        )
    return UserError(
        f"{folder} has no weights", found="no *.safetensors file", expected=expected, fix="download the weights too"
    )


def _are_sizes(value: Any) -> TypeGuard[list[int]]:
    if not isinstance(value, list):
        return False
    for n in value:  # noqa: SIM110  a loop takes half the time of `all`, and there may be 100,000 tensors
        if type(n) is not int or not 0 <= n < _MOST_SIZE:
            return False
    return True


def _damaged(path: Path, what: str, found: object, expected: object) -> UserError:
    text = str(found)
    return UserError(f"{path}: {what}", found=text[:200], expected=expected, fix=_DAMAGED)
