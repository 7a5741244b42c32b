"""A folder to hand on: the checkpoint, the code that decodes it, a model card, and where it all came from.

`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).generate(...)` decodes by TiDAR without zconvert;
without `trust_remote_code` the folder is the plain autoregressive model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zconvert
from zconvert.checkpoint.card import inherited_metadata, model_card
from zconvert.checkpoint.folder import copy, copy_companions, new_folder, sha256
from zconvert.checkpoint.graft import GENERATION_CONFIG, generation_patch
from zconvert.checkpoint.headers import INDEX_FILE, Headers, read_headers
from zconvert.checkpoint.json_patch import read_json
from zconvert.checkpoint.mask_token import choose_mask_token, tokenizer_patches
from zconvert.checkpoint.provenance import PROVENANCE_FILE, SOURCE_FILES, provenance
from zconvert.checkpoint.source import Source, read_config, require_converted
from zconvert.checkpoint.weights import check_written
from zconvert.errors import UserError
from zconvert.tidar.settings import BIGRAM_FILE, GATED_FILE, TidarSettings

CODE_FOLDER = "custom_generate"
REQUIREMENTS = ("torch>=2.11", "transformers>=5.17")
"""what custom_generate needs: the lower bounds of pyproject.toml"""
RECIPE_FILE = "zconvert_config.yaml"


def export(
    checkpoint: Source,
    out: Path,
    *,
    recipe_text: str | None = None,
    results: Mapping[str, Any] | None = None,
    on_shard: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Writes a converted checkpoint as a folder that works without zconvert.

    Weights are copied (by reflink where the disk can), never hard-linked: the folder is there to be moved, edited and
    uploaded, and an edit in place must not reach the checkpoint it came from. Train states never go along.

    Args:
        checkpoint: a converted checkpoint.
        out: folder to write; must not exist. Its name is the title of the card.
        recipe_text: the recipe it was trained with, kept as `zconvert_config.yaml`.
        results: what `zconvert bench --json` printed, for the card.
        on_shard: told of each weight file: its name, its number from 1, and how many there are.

    Returns:
        what was written, as JSON can hold it: `out`, `base_model`, `base_revision`, `mode`, `block_size`, `mask_token`,
        `stages`, `license`, `recipe`, `weights` (`bytes` and `sha256` by file) and `files`.

    Raises:
        UserError: the checkpoint is not converted or is damaged, or `out` cannot be written.
    """
    settings = require_converted(checkpoint)
    source = checkpoint.folder
    if settings.mode == "gated" and not (source / GATED_FILE).exists():
        raise UserError(
            f"{checkpoint.name} has no gated weights yet",
            found=f"no {GATED_FILE}",
            expected="a trained checkpoint",
            fix="train it: zconvert midtrain RECIPE.yaml",
        )
    config, headers = read_config(source), read_headers(source)
    inherited = inherited_metadata(source)
    texts = _checked_texts(source, headers, config, settings)
    texts["README.md"] = model_card(
        name=out.name,
        settings=settings,
        config=config,
        inherited=inherited,
        has_recipe=recipe_text is not None,
        results=results,
    )
    if recipe_text is not None:
        texts[RECIPE_FILE] = recipe_text
    with new_folder(out) as folder:
        weights: dict[str, dict[str, Any]] = {}
        for number, shard in enumerate(headers.shards, 1):
            if on_shard is not None:
                on_shard(shard.name, number, len(headers.shards))
            copy(source / shard.name, folder / shard.name)
            weights[shard.name] = {"bytes": shard.bytes, "sha256": _verified_hash(source, folder, shard.name)}
        if headers.indexed:
            copy(source / INDEX_FILE, folder / INDEX_FILE)
        copy_companions(source, folder, without=texts)
        for name in (GATED_FILE, BIGRAM_FILE):
            if (source / name).exists():
                (folder / name).parent.mkdir(exist_ok=True)
                copy(source / name, folder / name)
                weights[name] = {
                    "bytes": (folder / name).stat().st_size,
                    "sha256": _verified_hash(source, folder, name),
                }
        _write_code(folder / CODE_FOLDER)
        kept = {k: v for k, v in read_json(source / PROVENANCE_FILE).items() if k == SOURCE_FILES}
        origin = provenance(settings, **kept, weights=dict(weights), results=results)
        texts[PROVENANCE_FILE] = json.dumps(origin, indent=2) + "\n"
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        check_written(folder, headers.tensors)
        files = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    return {
        "out": str(out),
        "base_model": settings.base_model,
        "base_revision": settings.base_revision,
        "mode": settings.mode,
        "block_size": settings.block_size,
        "mask_token": {"id": settings.mask_token_id, "text": settings.mask_token},
        "stages": list(settings.stages),
        "license": inherited.get("license"),
        "recipe": recipe_text is not None,
        "weights": weights,
        "files": files,
    }


def _checked_texts(source: Path, headers: Headers, config: dict[str, Any], settings: TidarSettings) -> dict[str, str]:
    """JSON files put right where somebody's edits undid what decoding needs; mostly they are as they should be."""
    if settings.virtual:
        return {}
    mask = choose_mask_token(source, headers, config, settings.mask_token_id)
    if mask.text != settings.mask_token:
        raise UserError(
            "the tokenizer is not the one that the checkpoint was converted with",
            found=f"id {settings.mask_token_id} is {mask.text!r}",
            expected=f"the mask token {settings.mask_token!r}",
            fix="copy the tokenizer's files from the converted checkpoint",
        )
    texts = tokenizer_patches(source, mask)
    path = source / GENERATION_CONFIG
    if not path.exists() or settings.mask_token_id not in (read_json(path).get("suppress_tokens") or []):
        texts[GENERATION_CONFIG] = generation_patch(source, config, [settings.mask_token_id])
    return texts


def _verified_hash(source: Path, folder: Path, name: str) -> str:
    """The sha256 of a copied file, compared with the original's."""
    before, after = sha256(source / name), sha256(folder / name)
    if before != after:
        raise UserError(
            f"{name} did not arrive whole",
            found=f"sha256 {after}",
            expected=before,
            fix="export again; if it happens again, check the disk, and that nothing writes to the checkpoint",
        )
    return after


def _write_code(folder: Path) -> None:
    """`zconvert/tidar` verbatim: transformers runs `generate` of `generate.py` and finds the others beside it."""
    folder.mkdir()
    for path in sorted((Path(zconvert.__file__).parent / "tidar").glob("*.py")):
        copy(path, folder / path.name)
    (folder / "requirements.txt").write_text("\n".join(REQUIREMENTS) + "\n", encoding="utf-8")
