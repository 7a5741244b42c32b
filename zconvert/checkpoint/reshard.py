"""The same tensors in other weight files or of another type: what an export writes that is asked for either."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path

from zconvert.checkpoint.headers import INDEX_FILE, SINGLE_FILE, Headers, TensorInfo, read_header
from zconvert.checkpoint.json_patch import read_json
from zconvert.checkpoint.weights import (
    converted_chunks,
    index_patch,
    read_chunks,
    stored_bytes,
    with_types,
    write_shard,
)
from zconvert.errors import UserError


@dataclass(frozen=True)
class Layout:
    """Which tensors are to be in which files, as which types."""

    source: Headers
    tensors: Mapping[str, TensorInfo]
    """without offsets"""

    @property
    def shards(self) -> list[str]:
        """The files, in order."""
        return sorted({t.shard for t in self.tensors.values()})

    @property
    def cast(self) -> bool:
        """Whether a tensor gets another type."""
        return any(t.dtype != self.source.tensors[name].dtype for name, t in self.tensors.items())

    @property
    def moved(self) -> bool:
        """Whether a tensor gets into another file."""
        return any(t.shard != self.source.tensors[name].shard for name, t in self.tensors.items())


def plan_layout(headers: Headers, dtype: str, max_shard_size: int | None) -> Layout:
    """Works out the files of an export.

    Args:
        headers: of the checkpoint.
        dtype: source keeps each tensor's type; float32 and bfloat16 change them as `save_trained` does.
        max_shard_size: bytes of tensors that a file holds at most, but for a larger tensor, which is alone; None keeps
            the files.
    """
    tensors = with_types(headers, dtype)
    if max_shard_size is None:
        return Layout(headers, tensors)
    groups: list[list[TensorInfo]] = []
    left = 0
    for name in headers.tensors:  # as they lie in the files now: a layer's tensors stay together
        size = stored_bytes(tensors[name])
        if not groups or size > left:
            groups.append([])
            left = max_shard_size
        groups[-1].append(tensors[name])
        left -= size
    names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
    if len(groups) == 1:
        names = [SINGLE_FILE]
    moved = {t.name: t._replace(shard=name) for name, group in zip(names, groups, strict=True) for t in group}
    return Layout(headers, moved)


def write_layout(source: Path, folder: Path, layout: Layout, on_shard: Callable[[str, int, int], None]) -> None:
    """Writes the files of a layout, a tensor at a time, and their index where there are several.

    Args:
        source: folder of the checkpoint.
        folder: to write into.
        layout: from `plan_layout`.
        on_shard: told of each file before it is written: its name, its number from 1, and how many there are.

    Raises:
        UserError: a weight is not finite in its new type, or a file did not arrive whole.
    """
    casting = converted_chunks(source, layout.source.tensors, layout.tensors)
    metadata = {shard.name: shard.metadata for shard in layout.source.shards}

    def chunks(name: str) -> Iterator[bytes]:
        tensor = layout.source.tensors[name]
        return (
            read_chunks(source / tensor.shard, tensor) if tensor.dtype == layout.tensors[name].dtype else casting(name)
        )

    for number, name in enumerate(layout.shards, 1):
        on_shard(name, number, len(layout.shards))
        tensors = [t for t in layout.tensors.values() if t.shard == name]
        write_shard(folder / name, tensors, metadata.get(name, layout.source.metadata), chunks)
        _check(folder / name, chunks)
    index = _index(source, layout)
    if index is not None:
        (folder / INDEX_FILE).write_bytes(index.encode())


def _check(path: Path, chunks: Callable[[str], Iterable[bytes]]) -> None:
    """Reads a file back and compares it with what was to be written."""
    for name, tensor in read_header(path)[0].items():
        for written, wanted in zip_longest(read_chunks(path, tensor), chunks(name)):
            if written != wanted:
                raise UserError(
                    f"{path.name} did not arrive whole",
                    found=f"other bytes in {name}",
                    expected="the checkpoint's values",
                    fix="export again; if it happens again, check the disk, and that nothing writes to the checkpoint",
                )


def _index(source: Path, layout: Layout) -> str | None:
    if not layout.moved:
        return index_patch(source, layout.source, layout.tensors.values())
    if layout.shards == [SINGLE_FILE]:
        return None
    metadata = read_json(source / INDEX_FILE).get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    document = {
        "metadata": {**metadata, "total_size": sum(map(stored_bytes, layout.tensors.values()))},
        "weight_map": {name: t.shard for name, t in layout.tensors.items()},
    }
    return json.dumps(document, indent=2) + "\n"
