"""A folder to hand on: the checkpoint, the code that decodes it, a model card, and where it all came from.

`AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True).generate(...)` decodes by TiDAR without zconvert;
without `trust_remote_code` the folder is the plain autoregressive model.

    card.py  what it says of itself     verify_export.py  looks whether it works     push.py  puts it on the Hub
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import zconvert
from zconvert.checkpoint.card import Facts, inherited_metadata, model_card
from zconvert.checkpoint.engines import serving_lines
from zconvert.checkpoint.folder import ORIGINALS, copy, copy_companions, link, new_folder, sha256
from zconvert.checkpoint.headers import INDEX_FILE, Headers, read_headers
from zconvert.checkpoint.json_patch import parse_json_object, patch_json, read_json, read_json_text
from zconvert.checkpoint.mask_token import choose_mask_token, tokenizer_patches
from zconvert.checkpoint.plan import GENERATION_CONFIG, generation_patch
from zconvert.checkpoint.provenance import (
    HISTORY,
    PROVENANCE_FILE,
    REWRITTEN,
    SOURCE_FILES,
    history_of,
    provenance,
    read_provenance,
)
from zconvert.checkpoint.reshard import Layout, plan_layout, write_layout
from zconvert.checkpoint.run_folder import EVALUATION_FOLDER, REPORT_FOLDER, RUN_CHECKPOINT
from zconvert.checkpoint.source import Source, read_config, require_converted
from zconvert.checkpoint.verify_export import verify_export
from zconvert.checkpoint.weights import check_written, config_patch
from zconvert.errors import UserError
from zconvert.recipe.yaml_text import write_yaml
from zconvert.tidar._requirements import OLDEST
from zconvert.tidar.settings import GATED_FILE, OWN_FILES, TidarSettings

CODE_FOLDER = "custom_generate"
_REQUIREMENTS_HEAD = """\
# Versions are only told here: transformers 4 would refuse the whole folder for them, which it runs autoregressively.
# The code looks for itself.
"""
RECIPE_FILE = "zconvert_config.yaml"
PLOTS_FOLDER = "plots"
EVALUATION_FILE = f"{EVALUATION_FOLDER}/results.json"
"""in a run's folder, a checkpoint's or an export's: what `zconvert evaluate` measured"""
"""folder of a run in which `zconvert report` draws"""
_RECIPE_HEAD = "# The recipes of all stages, in order, every setting written out.\n"


def export(
    checkpoint: Source,
    out: Path,
    *,
    dtype: str = "source",
    max_shard_size: int | None = None,
    results: Mapping[str, Any] | None = None,
    as_links: bool = False,
    verify: bool = False,
    on_shard: Callable[[str, int, int], None] = lambda *_: None,
    tell: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Writes a converted checkpoint as a folder that works without zconvert.

    Weights are copied (by reflink where the disk can), never hard-linked: the folder is there to be moved, edited and
    uploaded, and an edit in place must not reach the checkpoint it came from. Train states never go along.

    Args:
        checkpoint: a converted checkpoint.
        out: folder to write; must not exist. Its name is the title of the card.
        dtype: source, or float32 or bfloat16 for weights of another type.
        max_shard_size: bytes that a weight file holds at most; None leaves the files as they are.
        results: what `zconvert bench --json` printed, for the card; what the checkpoint was exported with where None.
        as_links: makes weights symbolic links to the checkpoint's, for a folder that is only read and goes again.
        verify: sees that it works, before it gets its name: see `verify_export`.
        on_shard: told of each weight file: its name, its number from 1, and how many there are.
        tell: told what else is going on.

    Returns:
        what was written, as JSON can hold it: `out`, `base_model`, `base_revision`, `mode`, `block_size`, `mask_token`,
        `stages`, `license`, `recipe`, `rewritten`, `weights` (`bytes` and `sha256` by file), `files`, and `verified`
        (null where not asked for).

    Raises:
        UserError: the checkpoint is not converted or is damaged, `out` cannot be written, or it does not work.
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
    layout = plan_layout(headers, dtype, max_shard_size)
    document = read_provenance(source)
    results = document.get("results") if results is None else results
    history, attached, inherited = history_of(source), _attached(source), inherited_metadata(source)
    texts = _checked_texts(source, headers, config, settings)
    if layout.cast:
        texts["config.json"] = config_patch(source, settings, dtype)
    for name in ("config.json", "tokenizer_config.json"):
        text = texts.get(name) or read_json_text(source / name)
        if "auto_map" in parse_json_object(text, name):
            # Who loads it with trust_remote_code, for our decoding, would run the source's own code in place of
            # transformers': nobody was asked about that, and decoding knows only the latter.
            texts[name] = patch_json(text, {}, remove=["auto_map"], name=name)
    if history:
        texts[RECIPE_FILE] = _RECIPE_HEAD + write_yaml({"stages": history})
    facts = Facts(
        history=history,
        rewritten={**document.get(REWRITTEN, {}), **_rewritten(layout, dtype)},
        results=results,
        evaluation=read_json(attached[EVALUATION_FILE]) if EVALUATION_FILE in attached else None,
        serving=serving_lines(config, headers),
        plots=[file for file in attached if file.startswith(PLOTS_FOLDER)],
    )
    texts["README.md"] = model_card(out.name, settings, config, inherited, facts)
    kept = {HISTORY: history} if history else {}
    if not facts.rewritten and SOURCE_FILES in document:
        kept[SOURCE_FILES] = document[SOURCE_FILES]
    with new_folder(out) as folder:
        weights = _write_weights(source, folder, headers, layout, as_links, on_shard)
        left = {file for file in _originals(source) if facts.rewritten}
        copy_companions(source, folder, without={*texts, *left})
        for file, path in attached.items():
            (folder / file).parent.mkdir(exist_ok=True)
            copy(path, folder / file)
        _write_code(folder / CODE_FOLDER)
        told = {REWRITTEN: facts.rewritten} if facts.rewritten else {}
        origin = provenance(settings, **kept, **told, weights=weights, results=results)
        texts[PROVENANCE_FILE] = json.dumps(origin, indent=2) + "\n"
        for file, text in texts.items():
            (folder / file).write_bytes(text.encode())
        check_written(folder, layout.tensors)
        verified = verify_export(checkpoint, folder, cast=layout.cast, tell=tell) if verify else None
        files = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return {
        "out": str(out),
        "base_model": settings.base_model,
        "base_revision": settings.base_revision,
        "mode": settings.mode,
        "block_size": settings.block_size,
        "mask_token": {"id": settings.mask_token_id, "text": settings.mask_token},
        "stages": list(settings.stages),
        "license": inherited.get("license"),
        "recipe": bool(history),
        "rewritten": facts.rewritten,
        "weights": weights,
        "files": files,
        "verified": verified,
    }


def _write_weights(
    source: Path,
    folder: Path,
    headers: Headers,
    layout: Layout,
    as_links: bool,
    on_shard: Callable[[str, int, int], None],
) -> dict[str, dict[str, Any]]:
    """Puts the weight files into the folder; returns size and hash of each."""
    as_they_are = [name for name in OWN_FILES if (source / name).exists()]
    if layout.cast or layout.moved:
        write_layout(source, folder, layout, on_shard)
    else:
        as_they_are = [*(shard.name for shard in headers.shards), *as_they_are]
        if headers.indexed:
            copy(source / INDEX_FILE, folder / INDEX_FILE)
    for number, name in enumerate(as_they_are, 1):
        on_shard(name, number, len(as_they_are))
        (folder / name).parent.mkdir(exist_ok=True)
        (link if as_links else copy)(source / name, folder / name)
    names = {*layout.shards, *as_they_are}
    return {
        name: {
            "bytes": (folder / name).stat().st_size,
            "sha256": _verified_hash(source, folder, name) if name in as_they_are else sha256(folder / name),
        }
        for name in sorted(names)
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


def _attached(source: Path) -> dict[str, Path]:
    """What was drawn and measured: name in the export -> the file, of the run around a checkpoint or of an export."""
    run = source.parent if source.name == RUN_CHECKPOINT else source
    plots = sorted((source / PLOTS_FOLDER).glob("*.png")) or sorted((run / REPORT_FOLDER).glob("*.png"))
    attached = {f"{PLOTS_FOLDER}/{path.name}": path for path in plots}
    evaluation = next((path for place in (source, run) if (path := place / EVALUATION_FILE).is_file()), None)
    return attached if evaluation is None else {**attached, EVALUATION_FILE: evaluation}


def _originals(source: Path) -> list[str]:
    """The source's own files in a gated checkpoint, of no use where its weight files are others."""
    return [f"{ORIGINALS}/{path.name}" for path in (source / ORIGINALS).glob("*")]


def _rewritten(layout: Layout, dtype: str) -> dict[str, Any]:
    """How the weight files differ from the checkpoint's as it is; empty where they are the same."""
    shards = {"shards": len(layout.shards)} if layout.moved else {}
    return {**({"dtype": dtype} if layout.cast else {}), **shards}


def _verified_hash(source: Path, folder: Path, name: str) -> str:
    """The sha256 of a copied file, compared with the original's."""
    before = sha256(source / name)
    after = before if (folder / name).is_symlink() else sha256(folder / name)
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
    lines = [f"{name}\n# {name}>={'.'.join(map(str, oldest))}\n" for name, oldest in OLDEST.items()]
    (folder / "requirements.txt").write_text(_REQUIREMENTS_HEAD + "".join(lines), encoding="utf-8")
