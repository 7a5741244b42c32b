"""After a conversion, before its folder gets its name: is everything the source's that should be, and nothing else?

- bytes: linked shards are the source's own files; of copied and rewritten ones every tensor is read back and compared
  with the source's, but for the rows that were to change, and those hold what was to be written. The tokenizer,
  `config.json` and `generation_config.json` agree with each other and with the embedding.
- logits: besides, the source and the conversion are loaded one after the other and give the same logits on a probe
  text, on every row that the source has but the mask token's.
- auto: bytes, and logits where the model is small.
- none: only that every tensor is there, with its type and shape.

What is read back comes from the operating system, mostly from its cache: this finds faults of ours and of the copying,
not those of a disk that forgets later.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Literal

from zconvert.checkpoint.compare import Range, around, first_difference
from zconvert.checkpoint.headers import Headers, Shard, TensorInfo, read_headers
from zconvert.checkpoint.json_patch import read_json
from zconvert.checkpoint.mask_token import TOKENIZER_FILE, choose_mask_token, read_vocabulary, tokenizer_patches
from zconvert.checkpoint.parity import NotComparable, compare_logits, free_memory, too_large_to_run, weights_in_memory
from zconvert.checkpoint.plan import GENERATION_CONFIG, Plan
from zconvert.checkpoint.rows import Floats, as_stored
from zconvert.checkpoint.source import read_config, tidar_settings
from zconvert.checkpoint.weights import check_written
from zconvert.errors import UserError
from zconvert.tidar.families import language_config

Level = Literal["auto", "bytes", "logits", "none"]
_AGAIN = "run the conversion again; if this happens again, check memory and disk"


@dataclass(frozen=True)
class Verified:
    """What was looked at; everything was found right, else there would be no result."""

    level: Literal["bytes", "logits", "none"]
    files_linked: int = 0
    """shards that are the source's own, by a hard link or shared bytes"""
    bytes_compared: int = 0
    """bytes of other files that were read back and are the source's"""
    logits_compared: int = 0
    """positions of the probe text"""
    logits_difference: float | None = None
    """the largest"""
    logits_skipped: str | None = None
    """why auto did not compare them"""


def check_level(plan: Plan, level: Level) -> None:
    """Tells before anything is written that the logits cannot be compared.

    Raises:
        UserError: `level` is logits, and the model does not fit into the memory.
    """
    free = free_memory()
    if level == "logits" and free is not None and weights_in_memory(plan.tensors, "auto") > free:
        raise UserError(
            "logits cannot be compared: the model does not fit into the memory",
            found=f"{free / 1e9:.3g} GB free",
            expected=f"{weights_in_memory(plan.tensors, 'auto') / 1e9:.3g} GB for its weights",
            fix="--verify bytes",
        )


def verify(
    plan: Plan, folder: Path, edits: dict[str, Floats], level: Level, tell: Callable[[str], None] = lambda _: None
) -> Verified:
    """Verifies a conversion.

    Args:
        plan: of the conversion, with its steps as they went.
        folder: what was written.
        edits: the values that were to be written, by tensor.
        level: see above.
        tell: told what is going on.

    Raises:
        UserError: something is not as it should be.
        ValueError: a tensor is missing, or has another type or shape.
    """
    check_written(folder, plan.tensors)
    if level == "none":
        return Verified("none")
    tell("Verifying")
    linked = compared = 0
    new = read_headers(folder)
    for shard in plan.headers.shards:
        action = _action(plan, shard.name)
        if action in ("link", "reflink"):
            _check_link(plan.source.folder / shard.name, folder / shard.name, action)
            linked += 1
        else:
            compared += _check_shard(plan, folder, new, shard, edits)
    compared += _check_copies(plan, folder)
    _check_texts(plan, folder, new)
    skipped = too_large_to_run(plan.tensors) if level == "auto" else None
    if level == "bytes" or skipped is not None:
        return Verified("bytes", linked, compared, logits_skipped=skipped)
    tell("Comparing logits")
    try:
        positions, difference = compare_logits(plan, folder)
    except NotComparable as error:
        if level == "logits":
            raise error.reason from error
        return Verified("bytes", linked, compared, logits_skipped=str(error))
    return Verified("logits", linked, compared, positions, difference)


def _action(plan: Plan, name: str) -> str:
    return next(step.action for step in plan.steps if step.name == name)


def _check_link(src: Path, dst: Path, action: str) -> None:
    # A reflink is a file of its own whose bytes the disk shares with the other's: there is nothing to compare.
    same = os.path.samefile(src, dst) if action == "link" else src.stat().st_size == dst.stat().st_size
    if not same:
        raise _damaged(dst, "another file", f"a link to {src}")


def _check_shard(plan: Plan, folder: Path, new: Headers, shard: Shard, edits: dict[str, Floats]) -> int:
    """Compares a copied or rewritten shard with the source's; returns the bytes that are equal."""
    src, dst = plan.source.folder / shard.name, folder / shard.name
    edited, rows = plan.edited(shard), _rows(plan, shard)
    with dst.open("rb") as file:
        for tensor in edited:
            _check_rows(file, new.tensors[tensor.name], plan.rows.first, edits[tensor.name])
    if _action(plan, shard.name) == "rewrite":
        if next(s.metadata for s in new.shards if s.name == shard.name) != shard.metadata:
            raise _damaged(dst, "other __metadata__", "the source's")
        old = [t for t in plan.headers.tensors.values() if t.shard == shard.name]
        spans = [(t.start, new.tensors[t.name].start, t.bytes) for t in old]
    else:
        if dst.stat().st_size != shard.bytes:
            raise _damaged(dst, f"{dst.stat().st_size} bytes", f"{shard.bytes}, as in the source")
        spans = around(rows, shard.bytes)
    place = first_difference(src, dst, spans)
    if place is not None:
        names = [t.name for t in new.tensors.values() if t.shard == shard.name and t.start <= place < t.end]
        raise _damaged(dst, f"another value at byte {place}, in {(names or ['the header'])[0]}", "the source's bytes")
    return sum(count for _, _, count in spans)


def _rows(plan: Plan, shard: Shard) -> list[Range]:
    """The bytes of a shard that were to change, as they stand in the source's file."""
    return sorted(_place(t, plan.rows.first, plan.rows.count) for t in plan.edited(shard))


def _place(tensor: TensorInfo, first: int, count: int) -> Range:
    row = tensor.bytes // tensor.shape[0]
    return tensor.start + first * row, tensor.start + (first + count) * row


def _check_rows(file: BinaryIO, tensor: TensorInfo, first: int, values: Floats) -> None:
    expected = as_stored(values, tensor.dtype)
    file.seek(_place(tensor, first, len(values))[0])
    if file.read(len(expected)) != expected:
        raise _damaged(file.name, f"other values in {tensor.name}, from row {first} on", "those of the mask token")


def _check_copies(plan: Plan, folder: Path) -> int:
    compared = 0
    for name, path in plan.copies.items():
        size = path.stat().st_size
        differs = first_difference(path, folder / name, [(0, 0, size)]) is not None
        if differs or (folder / name).stat().st_size != size:
            raise _damaged(folder / name, "other bytes", "the source's")
        compared += size
    return compared


def _check_texts(plan: Plan, folder: Path, new: Headers) -> None:
    """The JSON files say what was planned, agree with the weights, and leave the rest to the source."""
    config, before = read_config(folder), read_config(plan.source.folder)
    rows = new.tensors[plan.rows.embedding.name].shape[0]
    theirs = plan.rows.vocabulary
    ours = read_vocabulary(folder) if TOKENIZER_FILE in plan.texts else theirs  # that it arrived whole was seen above
    virtual = plan.settings.virtual
    mask = choose_mask_token(folder, new, config, None if virtual else plan.mask.id, ours, virtual=virtual)  # they fit
    entry = {} if virtual else {mask.text: mask.id}
    suppressed = read_json(folder / GENERATION_CONFIG).get("suppress_tokens") or []
    changed = {"vocab_size", "vocab_size_per_layer_input", "tidar"}
    ours_config, theirs_config = language_config(config), language_config(before)
    outer = before.keys() - changed - ({"text_config"} if theirs_config is not before else set())
    checks = {
        "config.json has the settings": tidar_settings(config) == plan.settings,
        "config.json keeps what it had": all(config.get(key) == before[key] for key in outer)
        and all(ours_config.get(key) == theirs_config[key] for key in theirs_config.keys() - changed),
        "the mask token has a row, or is virtual": (plan.mask.id < rows) != virtual and rows == plan.mask.rows,
        "the tokenizer has the mask token at its id": mask.text == plan.mask.text,
        "the tokenizer's other entries are the source's": ours.ids == {**theirs.ids, **entry},
        "ids have no gaps": plan.mask.source in ("existing", "virtual") or max(ours.texts) + 1 == len(ours),
        "the tokenizer's files agree": tokenizer_patches(folder, mask, ours) == {},
        "the mask token is never sampled": virtual or plan.mask.id in suppressed,
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise _damaged(folder, f"not so: {'; '.join(wrong)}", "files that agree")


def _damaged(path: object, found: str, expected: str) -> UserError:
    return UserError(f"{path} was not written as planned", found=found, expected=expected, fix=_AGAIN)
