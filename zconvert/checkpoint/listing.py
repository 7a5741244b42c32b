"""The tensors of a checkpoint as far as they are there: `inspect` describes an incomplete one too, and says so."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from zconvert.checkpoint.headers import (
    INDEX_FILE,
    PICKLES,
    FolderFiles,
    Headers,
    Shard,
    TensorInfo,
    read_header,
    read_weight_map,
)
from zconvert.checkpoint.source import Source, headers_of
from zconvert.checkpoint.verdict import sentence
from zconvert.errors import UserError

_EXAMPLES = 5


@dataclass(frozen=True)
class IndexReport:
    """How the shards differ from their index.

    `missing` tensors are in no shard, or in another one than the index says; `extra` ones are not in the index.
    """

    missing: int = 0
    extra: int = 0
    examples: tuple[str, ...] = ()
    missing_shards: tuple[str, ...] = ()


@dataclass(frozen=True)
class Listing:
    """The tensors that were found, how they differ from the index (None without one), and what is wrong, if any."""

    headers: Headers
    index: IndexReport | None = None
    problem: str | None = None


def list_tensors(source: Source) -> Listing:
    """Reads the headers of a checkpoint.

    Missing shards, an index that lies, and weights in pickles alone are told as the listing's `problem`.

    Raises:
        UserError: a file is damaged, or there are no weights at all.
    """
    try:
        headers = headers_of(source)
    except UserError as error:
        listing = _pickled(source, error) or _incomplete(source.folder, error)
        if listing is None:
            raise
        return listing
    return Listing(headers, IndexReport() if headers.indexed else None)


def _pickled(source: Source, error: UserError) -> Listing | None:
    names = (source.files or FolderFiles(source.folder)).names()
    if any(name.endswith(".safetensors") for name in names) or not any(name.endswith(PICKLES) for name in names):
        return None
    return Listing(Headers({}, ()), None, sentence(error))


def _incomplete(folder: Path, error: UserError) -> Listing | None:
    """What the shards of a folder hold that do not agree with their index; None where something else is wrong."""
    try:
        weight_map = read_weight_map(folder / INDEX_FILE)
    except UserError:  # what is wrong with it was told already
        return None
    tensors: dict[str, TensorInfo] = {}
    shards, missing_shards = [], []
    present = FolderFiles(folder).names()
    for name in sorted(set(weight_map.values())):
        path = folder / name
        if name not in present:
            missing_shards.append(name)
            continue
        found, metadata = read_header(path)
        if tensors.keys() & found.keys():
            return None
        tensors |= found
        size = path.stat().st_size
        shards.append(Shard(name, size, min((t.start for t in found.values()), default=size), metadata))
    missing = sorted(name for name, shard in weight_map.items() if name not in tensors or tensors[name].shard != shard)
    extra = sorted(tensors.keys() - weight_map.keys())
    if not missing and not extra:
        return None
    report = IndexReport(len(missing), len(extra), (*missing, *extra)[:_EXAMPLES], tuple(missing_shards))
    return Listing(Headers(tensors, tuple(shards), indexed=True), report, sentence(error))
