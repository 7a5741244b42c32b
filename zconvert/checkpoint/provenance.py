"""`provenance.json`: what a checkpoint was made of, with which choices, by which versions."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

import zconvert
from zconvert.checkpoint.json_patch import patch_json, read_json_text
from zconvert.tidar.settings import TidarSettings

PROVENANCE_FILE = "provenance.json"
_LIBRARIES = ("torch", "transformers", "safetensors", "tokenizers", "huggingface-hub")


def provenance(settings: TidarSettings, **more: Any) -> dict[str, Any]:
    """The document: source and commit, stages, tool and libraries, then what the command at hand has to say."""
    return {
        "format_version": 1,
        "base_model": settings.base_model,
        "base_revision": settings.base_revision,
        "mode": settings.mode,
        "stages": list(settings.stages),
        "tool": {"name": "zconvert", "version": zconvert.__version__},
        "libraries": {name: _version(name) for name in _LIBRARIES},
        **more,
    }


def carried_on(base: Path, settings: TidarSettings) -> str | None:
    """The base's document for a checkpoint trained from it: other stages, and no word of the rows it began with.

    Raises:
        UserError: the base's document is malformed.
    """
    path = base / PROVENANCE_FILE
    if not path.exists():
        return None
    return patch_json(read_json_text(path), {"stages": list(settings.stages)}, remove=["rows"], name=PROVENANCE_FILE)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
