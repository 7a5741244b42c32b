"""`provenance.json`: what a checkpoint was made of, with which choices, by which versions."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import zconvert
from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.headers import Shard
from zconvert.checkpoint.json_patch import patch_json, read_json, read_json_text
from zconvert.formats import PROVENANCE, up_to_date
from zconvert.tidar.settings import TidarSettings

PROVENANCE_FILE = "provenance.json"
TOOL = "zconvert"
SOURCE_FILES = "source_files"
"""the key of a gated checkpoint's document under which the files of its source are (see merge.py)"""
HISTORY = "history"
"""the key under which the stages are that a checkpoint went through, in order: each with its `recipe`, and training
stages with `steps` and `tokens_seen` (padding included)"""
_HUB_HASH = 64  # hexadecimal digits of a sha256, by which the Hub's cache names large files
REWRITTEN = "rewritten"
"""the key under which an export tells how its weight files differ from the checkpoint's: `dtype`, `shards`"""
_OF_THE_WEIGHTS = ("rows", "weights", "results")
"""what a document says of weights that training moves, or of a measurement of them"""
_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "huggingface-hub")


def provenance(settings: TidarSettings, **more: Any) -> dict[str, Any]:
    """The document: source and commit, stages, tool and libraries, then what the command at hand has to say."""
    return {
        "format_version": PROVENANCE,
        "base_model": settings.base_model,
        "base_revision": settings.base_revision,
        "mode": settings.mode,
        "stages": list(settings.stages),
        "tool": _tool(),
        "libraries": {name: _version(name) for name in _LIBRARIES},
        **more,
    }


def read_provenance(folder: Path) -> dict[str, Any]:
    """The document of a checkpoint; of one without, an empty one.

    Raises:
        UserError: it is malformed, or was written by a newer zconvert.
    """
    path = folder / PROVENANCE_FILE
    return up_to_date(read_json(path), path, PROVENANCE)


def carried_on(base: Path, settings: TidarSettings, entry: Mapping[str, Any] | None) -> str | None:
    """The base's document for a checkpoint trained from it: another stage, and no word of weights that it had.

    Args:
        base: folder of the checkpoint that was trained.
        settings: of the new one.
        entry: of the stage, for the history; None adds none.

    Raises:
        UserError: the base's document is malformed, or was written by a newer zconvert.
    """
    read_provenance(base)
    path = base / PROVENANCE_FILE
    if not path.exists():
        return None
    changes: dict[str, Any] = {"stages": list(settings.stages)}
    if entry is not None:
        changes[HISTORY] = [*history_of(base), {**entry, "tool": _tool()}]
    frozen = settings.mode == "gated"  # then the source's files stay as they were before the training
    remove = _OF_THE_WEIGHTS if frozen else (*_OF_THE_WEIGHTS, REWRITTEN)
    return patch_json(read_json_text(path), changes, remove=remove, name=PROVENANCE_FILE)


def history_of(folder: Path) -> list[dict[str, Any]]:
    """The stages that a checkpoint went through, as far as it tells them.

    Raises:
        UserError: its document is malformed.
    """
    entries = read_provenance(folder).get(HISTORY)
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def source_files(folder: Path, shards: Iterable[Shard], carried: Mapping[str, Path]) -> dict[str, dict[str, Any]]:
    """What `provenance.json` keeps of a gated checkpoint's source: name -> `bytes`, `sha256` and `at`.

    Weights have a hash only where the Hub's cache tells it: reading all of them would take longer than the conversion.

    Args:
        folder: of the source.
        shards: its weight files.
        carried: the files that go along unchanged, by their name in the checkpoint, which is `at` where it is another.
    """
    files: dict[str, dict[str, Any]] = {}
    for shard in shards:
        files[shard.name] = {"bytes": shard.bytes}
        real = (folder / shard.name).resolve()
        if real.parent.name == "blobs" and len(real.name) == _HUB_HASH:
            files[shard.name]["sha256"] = real.name
    for at, path in carried.items():
        name = path.relative_to(folder).as_posix()
        files[name] = {"bytes": path.stat().st_size, "sha256": sha256(path), **({"at": at} if at != name else {})}
    return files


def _tool() -> dict[str, str]:
    return {"name": TOOL, "version": zconvert.__version__}


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
