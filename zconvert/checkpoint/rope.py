"""Rotary positions for a longer context: which members of `config.json` change, in the layout that is found there.

transformers 5 writes `rope_parameters`, one mapping or one for each layer type (ZAYA, Gemma 3); transformers 4 wrote
`rope_theta` and `rope_scaling`. What is found is changed where it stands, and everything else is left as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from zconvert.checkpoint.folder import companions, copy, link, writing
from zconvert.checkpoint.headers import INDEX_FILE
from zconvert.checkpoint.json_patch import patch_json, read_json, read_json_text
from zconvert.checkpoint.provenance import PROVENANCE_FILE
from zconvert.checkpoint.source import CONFIG_FILE, Source, headers_of, read_config
from zconvert.checkpoint.weights import patch_config
from zconvert.errors import UserError
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import OWN_FILES

LENGTHS = ("max_position_embeddings", "max_seq_len", "n_positions")
_LIMITED = ("sliding", "chunked")
"""in the names of layer types that see a window only: their distances stay what they were"""


@dataclass(frozen=True)
class RopeChange:
    """How positions are to reach further."""

    target_len: int
    """tokens of context afterwards"""
    original_len: int | None = None
    """tokens of context that the model was trained with; None: its config's"""
    method: Literal["theta", "linear", "yarn"] = "theta"
    """theta: a larger base; linear: positions divided by the factor; yarn: divided for slow frequencies only"""
    theta: float | None = None
    """of method theta; None: theta · factor^(d / (d − 2)), by which the slowest frequency is stretched by the factor"""
    attention_factor: float | None = None
    """of method yarn; None: transformers' default, 0.1 · ln(factor) + 1"""
    layer_types: Sequence[str] | None = None
    """which are changed, where each layer type has its own parameters; None: those that see the whole context"""


def original_length(config: Mapping[str, Any], change: RopeChange) -> int:
    """Tokens of context before the change.

    Raises:
        UserError: nobody says so, or it is no less than the target.
    """
    rope = _flat(config)
    found = change.original_len or (rope or {}).get("original_max_position_embeddings") or _length(config)[1]
    fix = "set context.original_len to the length that it was trained with"
    if not found:
        raise UserError("config.json does not say how long the model's context is", fix=fix)
    if found >= change.target_len:
        raise UserError(
            f"the context would not become longer: target_len is {change.target_len:,}",
            found=f"{found:,} tokens of context now",
            expected="a longer target",
            fix=fix + ", if it was trained with less than its config.json allows",
        )
    return int(found)


def config_changes(config: Mapping[str, Any], change: RopeChange) -> dict[str, Any]:
    """The members of a language model's config that change, with their new values.

    Args:
        config: the language model's part of `config.json`.
        change: what is wanted.

    Raises:
        UserError: the model has no rotary positions of a kind that can be changed so.

    >>> config = {"head_dim": 4, "max_position_embeddings": 100, "rope_parameters": {"rope_theta": 10.0}}
    >>> config_changes(config, RopeChange(400))
    {'rope_parameters': {'rope_theta': 160.0}, 'max_position_embeddings': 400}
    """
    original = original_length(config, change)
    changes: dict[str, Any] = {}
    found = config.get("rope_parameters")
    if isinstance(found, dict) and any(isinstance(inner, dict) for inner in found.values()):
        chosen = _layer_types(found, change)
        changes["rope_parameters"] = {
            kind: _changed(inner, config, change, original) if kind in chosen else inner
            for kind, inner in found.items()
        }
    elif isinstance(found, dict):
        changes["rope_parameters"] = _changed(found, config, change, original)
    else:
        old = _flat(config)
        if old is None:
            raise UserError(
                "config.json does not say how the model rotates its positions",
                found="neither rope_parameters nor rope_theta",
                expected="a model with rotary positions",
                fix="write rope_theta into base_model's config.json, if it has them",
            )
        new = _changed(old, config, change, original)
        theta = new.pop("rope_theta")
        if theta != config.get("rope_theta"):
            changes["rope_theta"] = theta
        if new != (config.get("rope_scaling") or {}):
            changes["rope_scaling"] = new
    name, length = _length(config)
    if length is None or length < change.target_len:
        changes[name] = change.target_len
    return changes


def extended(source: Source, change: RopeChange, folder: Path) -> None:
    """A view of a checkpoint with another `config.json`: a folder with links to its weights and copies of its small
    files, from which it is loaded like any other.

    Args:
        source: the checkpoint.
        change: what is wanted.
        folder: where to make it; files of an earlier view are replaced.

    Raises:
        UserError: see `config_changes`; or the folder cannot be written.
    """
    config = read_config(source.folder)
    text = patch_config(source.folder, config_changes(language_config(config), change))
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        files = companions(source.folder)
        weights = [*(shard.name for shard in headers_of(source).shards), *OWN_FILES]
        files |= {name: source.folder / name for name in (INDEX_FILE, PROVENANCE_FILE, *weights)}
        for name, path in files.items():
            (folder / name).unlink(missing_ok=True)
            if path.exists():
                (folder / name).parent.mkdir(exist_ok=True)
                (link if name in weights else copy)(path, folder / name)
        (folder / CONFIG_FILE).write_bytes(text.encode())
        tokenizer = source.folder / "tokenizer_config.json"
        limit = read_json(tokenizer).get("model_max_length")
        if isinstance(limit, int) and limit < change.target_len:
            (folder / tokenizer.name).unlink()
            longer = patch_json(read_json_text(tokenizer), {"model_max_length": change.target_len}, name=str(tokenizer))
            (folder / tokenizer.name).write_bytes(longer.encode())


def _layer_types(parameters: Mapping[str, Any], change: RopeChange) -> list[str]:
    there = [kind for kind, inner in parameters.items() if isinstance(inner, dict)]
    unknown = sorted(set(change.layer_types or ()) - set(there))
    if unknown:
        raise UserError(
            "context.layer_types names layers that the model does not have",
            found=", ".join(unknown),
            expected=f"some of {', '.join(there)}",
            fix="correct context.layer_types in the recipe, or leave it out: all layers",
        )
    if change.layer_types is not None:
        return list(change.layer_types)
    return [kind for kind in there if not any(word in kind for word in _LIMITED)]


def _flat(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The one set of parameters in either layout; None where there is none, or one for each layer type."""
    found = config.get("rope_parameters")
    if isinstance(found, dict):
        return None if any(isinstance(inner, dict) for inner in found.values()) else found
    if "rope_theta" not in config:
        return None
    return {"rope_theta": config["rope_theta"], **(config.get("rope_scaling") or {})}


def _length(config: Mapping[str, Any]) -> tuple[str, int | None]:
    """Name and value of the longest position."""
    return next(((name, config[name]) for name in LENGTHS if isinstance(config.get(name), int)), (LENGTHS[0], None))


def _changed(rope: Mapping[str, Any], config: Mapping[str, Any], change: RopeChange, original: int) -> dict[str, Any]:
    name = "type" if "type" in rope and "rope_type" not in rope else "rope_type"
    kind = rope.get(name) or "default"
    factor = change.target_len / original
    if kind not in ("default", change.method):
        raise UserError(
            f"rope: {change.method} cannot extend this model",
            found=f"positions that are already scaled by {kind}",
            expected="plain rotary positions, or the same method again",
            fix=f"choose context.rope: {kind}" if kind in ("linear", "yarn") else "extend the model it came from",
        )
    if change.method == "theta":
        return {**rope, "rope_theta": change.theta or _stretched(float(rope["rope_theta"]), factor, rope, config)}
    if change.method == "linear":
        return {**rope, name: "linear", "factor": factor * float(rope.get("factor") or 1)}
    new = {**rope, name: "yarn", "factor": factor, "original_max_position_embeddings": original}
    if change.attention_factor is not None:
        new["attention_factor"] = change.attention_factor
    return new


def _stretched(theta: float, factor: float, rope: Mapping[str, Any], config: Mapping[str, Any]) -> float:
    """The base at which the slowest frequency is divided by the factor ("NTK-aware")."""
    head = config.get("qk_rope_head_dim") or config.get("head_dim")
    size = head or config["hidden_size"] // config["num_attention_heads"]
    share = rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0
    dim = int(size * share) if not config.get("qk_rope_head_dim") else int(size)
    return round(theta * factor ** (dim / (dim - 2)), 6)
