"""What is planned for: a folder (by its headers), a Hub id (by its config, else by headers) or a bare config.json."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.checkpoint.json_patch import read_named_json
from zconvert.checkpoint.source import headers_of, read_config, resolve, tidar_settings
from zconvert.checkpoint.verdict import require_convertible
from zconvert.errors import UserError
from zconvert.planning.from_config import knows
from zconvert.planning.model import ModelFacts, facts_from_config, facts_from_headers
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import TidarSettings


@dataclass(frozen=True)
class Target:
    """A model to plan for."""

    facts: ModelFacts
    settings: TidarSettings | None
    """of a converted checkpoint; None: not converted yet"""
    config: dict[str, Any]
    source: str
    """headers, or config.json: what the facts come from"""
    folder: Path | None = None
    """where its weights lie; None: not on this disk"""


def find_target(text: str, *, revision: str | None = None, token: str | None = None) -> Target:
    """Reads what a user named; weights are neither loaded nor fetched.

    Args:
        text: a checkpoint's folder, a training run's folder, a Hub id, or the path of a config.json.
        revision: branch, tag or commit on the Hub.
        token: access token of the Hub.

    Raises:
        UserError: it is not there, cannot be converted, or does not say how large it is.
    """
    path = Path(text).expanduser()
    if path.suffix == ".json":
        config, name = read_named_json(path), path.absolute().parent.name if path.name == "config.json" else path.stem
        require_convertible(name, config)
        return Target(facts_from_config(config, name), tidar_settings(config), config, "config.json")
    source = resolve(text, revision=revision, token=token, weights=False)
    config = read_config(source.folder)
    require_convertible(source.name, config)
    if source.files is not None and knows(language_config(config).get("model_type")):
        # On the Hub each shard is a request, or several: where shapes follow from the config, none is made.
        with contextlib.suppress(UserError):
            return Target(facts_from_config(config, source.name), tidar_settings(config), config, "config.json")
    try:
        headers = headers_of(source)
    except UserError:
        # A folder with a config alone: its shapes may follow from that.
        if any(source.folder.glob("*.safetensors")) or not knows(language_config(config).get("model_type")):
            raise
        return Target(facts_from_config(config, source.name), tidar_settings(config), config, "config.json")
    require_convertible(source.name, config, headers)
    folder = source.folder if source.files is None else None
    facts = facts_from_headers(headers, config, source.name)
    return Target(facts, tidar_settings(config), config, "headers", folder)
