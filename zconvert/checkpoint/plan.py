"""What a conversion will do, worked out from `config.json`, headers and tokenizer before anything is written.

plan = plan_conversion(resolve("./source"), Path("init"), Choices(block_size=16))
plan.steps      # each file, what happens to it, and the bytes written
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from zconvert.checkpoint.folder import ORIGINALS, can_link, companions, free_space, refuse_existing
from zconvert.checkpoint.headers import INDEX_FILE, Headers, Shard, TensorInfo
from zconvert.checkpoint.json_patch import parse_json_object, patch_json, read_json, read_json_text
from zconvert.checkpoint.mask_token import MaskToken, choose_mask_token, read_vocabulary, tokenizer_patches
from zconvert.checkpoint.provenance import HISTORY, PROVENANCE_FILE, SOURCE_FILES, provenance, source_files
from zconvert.checkpoint.rows import TokenRows
from zconvert.checkpoint.source import Source, headers_of, read_config, tidar_settings
from zconvert.checkpoint.verdict import require_convertible
from zconvert.checkpoint.weights import index_patch, patch_config, shard_size
from zconvert.errors import UserError
from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, DEFAULT_MASK_INIT, GatedParts, TidarSettings, check_proposals

GENERATION_CONFIG = "generation_config.json"
Action = Literal["link", "reflink", "copy", "copy + patch", "rewrite", "patch JSON", "new"]
"""what happens to a file; that a disk has reflinks shows in the doing, so that a plan says link"""


@dataclass(frozen=True)
class Choices:
    """What the user decides about a conversion."""

    block_size: int = DEFAULT_BLOCK_SIZE
    """tokens per diffusion block"""
    mask_token: str | int | None = None
    """text or id of the mask token; None chooses (`choose_mask_token`): with gated parts that have an embedding of
    their own a virtual one"""
    mask_init: str = DEFAULT_MASK_INIT
    """start value of its embedding row: mean (of the tokenizer's rows), zero, random (normal, as wide as the rows are),
    or copy:<token text or id>"""
    seed: int = 0
    """seed of random"""
    proposals: Sequence[int] | None = None
    """accepted counts that get a proposal block in decoding; None for all"""
    gated: GatedParts | None = None
    """the gated parts, where the source is to stay frozen; None for full training"""


@dataclass(frozen=True)
class FileStep:
    """What happens to one file of the new folder."""

    name: str
    action: Action
    bytes: int
    """size of the file in the new folder"""
    written: int
    """bytes that are written for it: none for a link"""


@dataclass(frozen=True)
class Plan:
    """A conversion that was checked and not begun."""

    source: Source
    out: Path
    choices: Choices
    settings: TidarSettings
    """what `config.json` will say"""
    mask: MaskToken
    headers: Headers = field(repr=False)
    """the source's tensors"""
    tensors: dict[str, TensorInfo] = field(repr=False)
    """the new folder's; their offsets are still the source's"""
    rows: TokenRows = field(repr=False)
    texts: dict[str, str] = field(repr=False)
    """the files that change or are new, but for weights: text by name"""
    copies: dict[str, Path] = field(repr=False)
    """the files that go along unchanged, but for weights: the source's file by name in the new folder"""
    steps: tuple[FileStep, ...] = field(repr=False)

    def edited(self, shard: Shard) -> list[TensorInfo]:
        """The source's tensors in a shard that get new rows or values."""
        return [t for t in self.rows.edited if t.shard == shard.name]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it; `zconvert convert-init --json` prints this and more."""
        return {
            "out": str(self.out),
            "base_model": self.settings.base_model,
            "base_revision": self.settings.base_revision,
            "block_size": self.settings.block_size,
            "proposals": list(self.settings.default_proposals()),
            "mask_token": {**dataclasses.asdict(self.mask), "init": self.choices.mask_init},
            "files": [dataclasses.asdict(step) for step in self.steps],
            "bytes": sum(step.bytes for step in self.steps),
            "bytes_written": sum(step.written for step in self.steps),
            "bytes_free": free_space(self.out),
        }


def plan_conversion(source: Source, out: Path, choices: Choices | None = None, *, copy: bool = False) -> Plan:
    """Checks a checkpoint and works out its conversion. Writes nothing, and reads no weights but their headers.

    Args:
        source: the checkpoint to convert; its weights need not be there, where it comes with their headers.
        out: the folder that the conversion is to write; must not exist.
        choices: of the user; None for the defaults.
        copy: copies also the shards that do not change, so that the new folder shares no file with the source.

    Raises:
        UserError: the checkpoint cannot be converted, is damaged or converted already, or `out` exists.
    """
    choices = choices or Choices()
    config, gated = read_config(source.folder), choices.gated is not None
    require_convertible(source.name, config, gated=gated)
    if tidar_settings(config) is not None:
        raise UserError(
            f"{source.name} is converted already",
            found="a tidar section in its config.json",
            expected="an autoregressive checkpoint",
            fix="train it with `zconvert midtrain`, or convert its source again with other settings",
        )
    refuse_existing(out)
    headers = headers_of(source)
    require_convertible(source.name, config, headers, gated=gated)
    vocabulary = read_vocabulary(source.folder)
    virtual = choices.gated is not None and choices.gated.mask_embedding
    mask = choose_mask_token(source.folder, headers, config, choices.mask_token, vocabulary, virtual=virtual)
    settings = _settings(source, mask, choices)
    if choices.gated is not None and mask.source == "grown":
        raise UserError(
            "gated mode leaves every weight as it is, and the embedding has no row left for a mask token",
            found=f"{len(vocabulary)} tokens in as many rows",
            expected="a mask token, or a spare row",
            fix="leave --mask-token out, with mask_embedding: true, or name a token that texts never hold",
        )
    rows = TokenRows(source.folder, headers, config, mask, vocabulary, frozen=choices.gated is not None)
    rows.check_start(choices.mask_init)
    _check_ids(source.folder, config, rows.before)
    tensors = headers.tensors | {t.name: _resized(t, mask.rows) for t in rows.edited}
    texts = _texts(source.folder, config, settings, rows)
    index = index_patch(source.folder, headers, tensors.values()) if rows.edited else None
    if index is not None:
        texts[INDEX_FILE] = index
    copies = _copies(source.folder, headers, texts, gated=choices.gated is not None)
    kept = {SOURCE_FILES: source_files(source.folder, headers.shards, copies)} if choices.gated is not None else {}
    history = [{"stage": "convert-init", "recipe": _recipe(source, out, settings, choices)}]
    origin = provenance(
        settings, conversion=_conversion(settings, choices), rows=_changed(rows), **{HISTORY: history}, **kept
    )
    texts[PROVENANCE_FILE] = json.dumps(origin, indent=2) + "\n"
    plan = Plan(source, out, choices, settings, mask, headers, tensors, rows, texts, copies, ())
    return dataclasses.replace(plan, steps=tuple(_steps(plan, copy)))


def generation_patch(folder: Path, config: dict[str, Any], suppressed: Sequence[int]) -> str:
    """`generation_config.json` that never lets the AR path emit the given ids.

    Transformers drops what a file marked `_from_model_config` says beyond the model's own configuration, so the mark
    is removed. A checkpoint without the file gets one with what transformers would have derived from `config.json`.
    """
    path = folder / GENERATION_CONFIG
    text = read_json_text(path) if path.exists() else patch_json("{}", _derived_generation(config)) + "\n"
    before = parse_json_object(text, str(path)).get("suppress_tokens") or []
    merged = [*before, *(i for i in suppressed if i not in before)]
    return patch_json(text, {"suppress_tokens": merged}, remove=["_from_model_config"], name=str(path))


def _check_ids(folder: Path, config: dict[str, Any], rows: int) -> None:
    """Tokens that the configurations name must have a row."""
    for name, values in (("config.json", config), (GENERATION_CONFIG, read_json(folder / GENERATION_CONFIG))):
        for role in ("bos_token_id", "eos_token_id", "pad_token_id"):
            ids = values.get(role)
            for place in ids if isinstance(ids, list) else [ids]:
                if isinstance(place, int) and place >= rows:
                    raise UserError(
                        f"{name} does not fit the model: it names a token that the embedding has no row for",
                        found=f"{role} {place}, {rows} embedding rows",
                        expected=f"an id from 0 to {rows - 1}",
                        fix="the files are of different checkpoints: download or copy them again",
                    )


def _settings(source: Source, mask: MaskToken, choices: Choices) -> TidarSettings:
    proposals, block_size = choices.proposals, choices.block_size
    try:
        return TidarSettings(
            block_size=block_size,
            mask_token_id=mask.id,
            mask_token=mask.text,
            mask_token_source=mask.source,
            proposals=None if proposals is None else check_proposals(tuple(proposals), block_size),
            base_model=source.name,
            base_revision=source.revision,
            mode="full" if choices.gated is None else "gated",
            gated=choices.gated,
        )
    except ValueError as error:
        raise UserError(
            "the conversion's settings cannot work", found=error, fix="choose other options, or correct the recipe"
        ) from error


def _texts(folder: Path, config: dict[str, Any], settings: TidarSettings, rows: TokenRows) -> dict[str, str]:
    """New texts of the JSON files that change."""
    changes: dict[str, Any] = {"tidar": settings.to_dict()}
    if settings.virtual:
        return {"config.json": patch_config(folder, changes)}
    if rows.mask.source == "grown":
        changes["vocab_size"] = rows.mask.rows
        if rows.per_layer is not None:
            changes["vocab_size_per_layer_input"] = rows.mask.rows
    # Rows that growth adds beyond the mask token's have no text: the model must not emit them either.
    suppressed = sorted({rows.mask.id, *range(rows.before, rows.mask.rows)})
    return {
        **tokenizer_patches(folder, rows.mask, rows.vocabulary),
        "config.json": patch_config(folder, changes),
        GENERATION_CONFIG: generation_patch(folder, config, suppressed),
    }


def _copies(folder: Path, headers: Headers, texts: Collection[str], *, gated: bool) -> dict[str, Path]:
    """The files that are copied: what is not patched, and where the source is to be had back what is."""
    copies = {name: path for name, path in companions(folder).items() if name not in texts}
    if headers.indexed and INDEX_FILE not in texts:
        copies[INDEX_FILE] = folder / INDEX_FILE
    patched = [name for name in texts if (folder / name).exists()] if gated else []
    return {**copies, **{f"{ORIGINALS}/{name}": folder / name for name in patched}}


def _derived_generation(config: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig, GenerationConfig

    members = {key: value for key, value in config.items() if key != "model_type"}
    derived = GenerationConfig.from_model_config(AutoConfig.for_model(config["model_type"], **members))
    return {k: v for k, v in derived.to_diff_dict().items() if k not in ("transformers_version", "_from_model_config")}


def _conversion(settings: TidarSettings, choices: Choices) -> dict[str, Any]:
    """The choices, for `provenance.json`."""
    mask = {"id": settings.mask_token_id, "text": settings.mask_token, "source": settings.mask_token_source}
    if choices.gated is None:
        mask |= {"init": choices.mask_init, "seed": choices.seed if choices.mask_init == "random" else None}
    proposals = None if settings.proposals is None else list(settings.proposals)
    return {"block_size": settings.block_size, "proposals": proposals, "mask_token": mask}


def _recipe(source: Source, out: Path, settings: TidarSettings, choices: Choices) -> dict[str, Any]:
    """The recipe of convert-init that makes the same choices."""
    return {
        "base_model": source.name,
        "revision": source.revision,
        "output_dir": str(out),
        "seed": choices.seed,
        "diffusion": {
            "mode": settings.mode,
            **({} if choices.gated is None else {"gated": dataclasses.asdict(choices.gated)}),
            "block_size": choices.block_size,
            "mask_token": choices.mask_token,
            "mask_init": choices.mask_init,
            "proposals": None if choices.proposals is None else list(choices.proposals),
        },
    }


def _changed(rows: TokenRows) -> dict[str, list[int]]:
    """The rows that are not the source's: tensor name -> first and last."""
    return {t.name: [rows.first, rows.first + rows.count - 1] for t in rows.edited}


def _resized(tensor: TensorInfo, rows: int) -> TensorInfo:
    return tensor._replace(shape=(rows, *tensor.shape[1:]))


def _steps(plan: Plan, copy: bool) -> list[FileStep]:
    """What happens to each file, in the order of names."""
    folder, steps = plan.source.folder, []
    for shard in plan.headers.shards:
        # Weights that were not fetched will be in the folder's cache, on the same disk.
        here = folder / shard.name if (folder / shard.name).exists() else folder
        if plan.edited(shard) and plan.mask.source == "grown":
            tensors = [t for t in plan.tensors.values() if t.shard == shard.name]
            size = shard_size(tensors, shard.metadata)
            steps.append(FileStep(shard.name, "rewrite", size, size))
        elif plan.edited(shard):
            steps.append(FileStep(shard.name, "copy + patch", shard.bytes, shard.bytes))
        elif not copy and can_link(here, plan.out.absolute().parent):
            steps.append(FileStep(shard.name, "link", shard.bytes, 0))
        else:
            steps.append(FileStep(shard.name, "copy", shard.bytes, shard.bytes))
    for name, path in plan.copies.items():
        size = path.stat().st_size
        steps.append(FileStep(name, "copy", size, size))
    for name, text in plan.texts.items():
        size = len(text.encode())
        old = name != PROVENANCE_FILE and (folder / name).exists()  # the source's own stays behind: it tells of that
        steps.append(FileStep(name, "patch JSON" if old else "new", size, size))
    return sorted(steps, key=lambda step: step.name)
