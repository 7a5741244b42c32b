"""The graft: a source checkpoint becomes a block-diffusion checkpoint, before any training.

Bytes and JSON are patched; no model is built. What changes: the mask token's embedding row, the tokenizer's knowledge
of that token, and the `tidar` section of `config.json`. Every other weight is the source's, by link where possible.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import copy, copy_companions, new_folder, place
from zconvert.checkpoint.headers import INDEX_FILE, Headers, TensorInfo, read_headers
from zconvert.checkpoint.json_patch import parse_json_object, patch_json, read_json_text
from zconvert.checkpoint.mask_token import (
    MaskToken,
    choose_mask_token,
    tokenizer_patches,
)
from zconvert.checkpoint.rows import Floats, TokenRows, as_stored
from zconvert.checkpoint.source import Source, read_config, tidar_settings
from zconvert.checkpoint.weights import check_written, index_patch, read_chunks, write_shard
from zconvert.errors import UserError
from zconvert.tidar.families import judge
from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, TidarSettings, check_proposals

GENERATION_CONFIG = "generation_config.json"


def convert_init(
    source: Source,
    out: Path,
    *,
    block_size: int = DEFAULT_BLOCK_SIZE,
    mask_token: str | int | None = None,
    mask_init: str = "mean",
    seed: int = 0,
    proposals: Sequence[int] | None = None,
) -> TidarSettings:
    """Writes a converted, untrained checkpoint.

    Args:
        source: the checkpoint to convert, with its weights; it is not changed.
        out: folder to write; must not exist.
        block_size: tokens per diffusion block.
        mask_token: text or id of the mask token; None chooses (`choose_mask_token`).
        mask_init: start value of its embedding row: mean (of the tokenizer's rows), zero, random (normal, as wide as
            the rows are), or copy:<token text or id>.
        seed: of random.
        proposals: accepted counts that get a proposal block in decoding; None for all.

    Returns:
        the settings written to `config.json`.

    Raises:
        UserError: the checkpoint cannot be converted, is damaged or converted already, or `out` cannot be written.
    """
    config = read_config(source.folder)
    verdict = judge(config)
    if not verdict.supported:
        raise UserError(
            f"{source.name} cannot be converted",
            found=verdict.reason,
            expected="a model whose layers mix tokens by attention (or CCA) alone",
            fix="choose another checkpoint; `zconvert inspect` says which can be converted",
        )
    if tidar_settings(config) is not None:
        raise UserError(
            f"{source.name} is converted already",
            found="a tidar section in its config.json",
            expected="an autoregressive checkpoint",
            fix="train it with `zconvert midtrain`, or convert its source again with other settings",
        )
    headers = read_headers(source.folder)
    mask = choose_mask_token(source.folder, headers, config, mask_token)
    settings = _settings(source, mask, block_size, proposals)
    rows = TokenRows(source.folder, headers, config, mask)
    edits = rows.edits(mask_init, seed)
    texts = _texts(source.folder, config, mask, settings, rows.before)
    tensors = {name: _grown(t, mask.rows) if name in edits else t for name, t in headers.tensors.items()}
    index = index_patch(source.folder, headers, tensors.values())
    if index is not None:
        texts[INDEX_FILE] = index
    with new_folder(out) as folder:
        for shard in headers.shards:
            edited = {name: edits[name] for name in edits if headers.tensors[name].shard == shard.name}
            if not edited:
                place(source.folder / shard.name, folder / shard.name)
            elif mask.source == "grown":
                _rewrite(source.folder / shard.name, folder / shard.name, headers, tensors, edited)
            else:
                copy(source.folder / shard.name, folder / shard.name)
                for name, values in edited.items():
                    _patch_row(folder / shard.name, headers.tensors[name], mask.id, values)
        copy_companions(source.folder, folder, without=texts)
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        check_written(folder, tensors)
    return settings


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


def _settings(source: Source, mask: MaskToken, block_size: int, proposals: Sequence[int] | None) -> TidarSettings:
    try:
        return TidarSettings(
            block_size=block_size,
            mask_token_id=mask.id,
            mask_token=mask.text,
            mask_token_source=mask.source,
            proposals=None if proposals is None else check_proposals(tuple(proposals), block_size),
            base_model=source.name,
            base_revision=source.revision,
        )
    except ValueError as error:
        raise UserError("the conversion's settings cannot work", found=error, fix="correct them") from error


def _texts(
    folder: Path, config: dict[str, Any], mask: MaskToken, settings: TidarSettings, rows_before: int
) -> dict[str, str]:
    """New texts of the JSON files that change."""
    changes: dict[str, Any] = {"tidar": settings.to_dict()}
    if mask.rows != config.get("vocab_size") and mask.source == "grown":
        changes["vocab_size"] = mask.rows
    # Rows that growth adds beyond the mask token's have no text: the model must not emit them either.
    suppressed = sorted({mask.id, *range(rows_before, mask.rows)})
    return {
        **tokenizer_patches(folder, mask),
        "config.json": patch_json(read_json_text(folder / "config.json"), changes, name="config.json"),
        GENERATION_CONFIG: generation_patch(folder, config, suppressed),
    }


def _derived_generation(config: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoConfig, GenerationConfig

    members = {key: value for key, value in config.items() if key != "model_type"}
    derived = GenerationConfig.from_model_config(AutoConfig.for_model(config["model_type"], **members))
    return {k: v for k, v in derived.to_diff_dict().items() if k not in ("transformers_version", "_from_model_config")}


def _grown(tensor: TensorInfo, rows: int) -> TensorInfo:
    return dataclasses.replace(tensor, shape=(rows, *tensor.shape[1:]))


def _patch_row(path: Path, tensor: TensorInfo, row: int, values: Floats) -> None:
    """Writes rows from `row` on at their place in the file, and reads them back."""
    data = as_stored(values, tensor.dtype)
    offset = tensor.start + row * (tensor.bytes // tensor.shape[0])
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        file.seek(offset)
        if file.read(len(data)) != data:
            raise OSError(f"{path}: what was written does not read back")


def _rewrite(src: Path, dst: Path, headers: Headers, tensors: dict[str, TensorInfo], added: dict[str, Floats]) -> None:
    """Writes a shard with rows added to some tensors, streaming the rest."""

    def chunks(name: str) -> Iterator[bytes]:
        yield from read_chunks(src, headers.tensors[name])
        if name in added:
            yield as_stored(added[name], tensors[name].dtype)

    shard = next(s for s in headers.shards if s.name == src.name)
    write_shard(dst, [t for t in tensors.values() if t.shard == src.name], shard.metadata, chunks)
