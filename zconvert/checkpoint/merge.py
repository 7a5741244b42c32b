"""From a gated checkpoint back to its source: every file as it was, byte for byte.

Nothing is computed: the source's weights are in the checkpoint unchanged, and the originals of the files that
convert-init patched lie under `tidar/source`. `provenance.json` says where each file of the source is, and its sha256.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

from zconvert.checkpoint.folder import copy, new_folder, place, sha256
from zconvert.checkpoint.provenance import PROVENANCE_FILE, REWRITTEN, SOURCE_FILES, read_provenance
from zconvert.checkpoint.small_files import require_inside
from zconvert.checkpoint.source import Source, require_converted
from zconvert.errors import UserError


def merge_to_ar(
    checkpoint: Source, out: Path, *, on_file: Callable[[str, int, int], None] | None = None
) -> dict[str, Any]:
    """Writes the source of a gated checkpoint: its weights by link where the disk can, and its files as they were.

    Args:
        checkpoint: a gated checkpoint, trained or not, or an export of one.
        out: folder to write; must not exist.
        on_file: told of each file: its name, its number from 1, and how many there are.

    Returns:
        what was written, as JSON can hold it: `out`, `base_model`, `base_revision`, and by file its `bytes` and the
        `sha256` that it was found to have, null where none was known to compare it with.

    Raises:
        UserError: the checkpoint is not gated or is damaged, or `out` cannot be written.
    """
    settings = require_converted(checkpoint)
    if settings.mode != "gated":
        raise UserError(
            f"{checkpoint.name} cannot be merged back: training moves every weight of a checkpoint in mode full",
            found="mode full",
            expected="a checkpoint that `zconvert convert-init --mode gated` made",
            fix="take the source itself, or use the checkpoint: any engine that serves its architecture runs it "
            "autoregressively",
        )
    document = read_provenance(checkpoint.folder)
    if document.get(REWRITTEN):
        raise UserError(
            f"{checkpoint.name} was exported with other weight files than its source has",
            found=", ".join(f"{key} {value}" for key, value in document[REWRITTEN].items()),
            expected="the source's weight files, byte for byte",
            fix="merge the checkpoint that it was exported from, or take the source itself",
        )
    entries = _entries(document, checkpoint.folder)
    files: dict[str, dict[str, Any]] = {}
    with new_folder(out) as folder:
        for number, (name, entry) in enumerate(entries.items(), 1):
            if on_file is not None:
                on_file(name, number, len(entries))
            path, found_at = folder / name, checkpoint.folder / entry.get("at", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            if name.endswith(".safetensors"):
                place(found_at, path)
            else:
                require_inside(found_at, checkpoint.folder)
                copy(found_at, path)
            wanted = entry.get("sha256") or _exported(document, name)
            found = sha256(path) if wanted else None
            if path.stat().st_size != entry["bytes"] or found != wanted:
                raise UserError(
                    f"{name} of {checkpoint.name} is not the source's any more",
                    found=f"{path.stat().st_size} bytes" + (f", sha256 {found}" if found else ""),
                    expected=f"{entry['bytes']} bytes" + (f", sha256 {wanted}" if wanted else ""),
                    fix="copy the file from the source, or download or copy the checkpoint again",
                )
            files[name] = {"bytes": entry["bytes"], "sha256": found}
    return {
        "out": str(out),
        "base_model": settings.base_model,
        "base_revision": settings.base_revision,
        "files": files,
    }


def _entries(document: dict[str, Any], folder: Path) -> dict[str, dict[str, Any]]:
    """The files of the source; names in a downloaded document lead nowhere but into the folders."""
    entries = document.get(SOURCE_FILES)
    if not isinstance(entries, dict) or not all(
        isinstance(entry, dict) and type(entry.get("bytes")) is int and _inside(name) and _inside(entry.get("at", name))
        for name, entry in entries.items()
    ):
        raise UserError(
            f"{folder / PROVENANCE_FILE} does not tell the files of the source",
            found="nothing" if entries is None else "entries that are no files of a checkpoint",
            expected=f"{SOURCE_FILES}: name, bytes and sha256, as convert-init writes them",
            fix="copy or download the checkpoint again, or take the source itself",
        )
    missing = [name for name, entry in entries.items() if not (folder / entry.get("at", name)).is_file()]
    if missing:
        raise UserError(
            f"{folder} lacks files of its source",
            found=f"no {', '.join(missing[:5])}" + (f" and {len(missing) - 5} more" if len(missing) > 5 else ""),
            expected="every file that the source had",
            fix="copy or download the checkpoint again, with its folders",
        )
    return entries


def _inside(name: Any) -> bool:
    path = PurePosixPath(str(name))
    return isinstance(name, str) and bool(path.parts) and not path.is_absolute() and ".." not in path.parts


def _exported(document: dict[str, Any], name: str) -> str | None:
    """The hash that an export gave a weight file."""
    weights = document.get("weights")
    entry = weights.get(name) if isinstance(weights, dict) else None
    return entry.get("sha256") if isinstance(entry, dict) else None
