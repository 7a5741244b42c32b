"""The graft: a source checkpoint becomes a block-diffusion checkpoint, before any training.

Bytes and JSON are patched; no model is built. What changes: the mask token's embedding row, the tokenizer's knowledge
of that token, and the `tidar` section of `config.json`. Every other weight is the source's, by link where possible.

    plan.py  what will happen      graft.py  does it      verify.py  looks whether it came true
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import copy, flush, new_folder, place
from zconvert.checkpoint.headers import Shard, TensorInfo
from zconvert.checkpoint.plan import Choices, FileStep, Plan, plan_conversion
from zconvert.checkpoint.rows import Floats, as_stored
from zconvert.checkpoint.source import Source
from zconvert.checkpoint.verify import Level, Verified, check_level, verify
from zconvert.checkpoint.weights import read_chunks, write_shard
from zconvert.tidar.settings import TidarSettings


@dataclass(frozen=True)
class Report:
    """What a conversion did."""

    plan: Plan
    """with the steps as they went: a link that could not be made is a copy"""
    verified: Verified

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it: the plan, and what was verified."""
        return {**self.plan.to_dict(), "verified": dataclasses.asdict(self.verified)}


def convert_init(source: Source, out: Path, *, verify: Level = "bytes", **choices: Any) -> TidarSettings:
    """Writes a converted, untrained checkpoint: `plan_conversion` and `carry_out` in one.

    Args:
        source: the checkpoint to convert, with its weights; it is not changed.
        out: folder to write; must not exist.
        verify: as for `carry_out`.
        choices: see `Choices`.

    Returns:
        the settings written to `config.json`.

    Raises:
        UserError: the checkpoint cannot be converted, is damaged or converted already, or `out` cannot be written.
    """
    return carry_out(plan_conversion(source, out, Choices(**choices)), level=verify).plan.settings


def carry_out(plan: Plan, *, level: Level = "bytes", on_step: Callable[[str], None] | None = None) -> Report:
    """Writes the folder of a plan, and verifies it before it gets its name.

    Args:
        plan: from `plan_conversion`, with the source's weights in their folder.
        level: what to verify, see `zconvert.checkpoint.verify`.
        on_step: told what is going on, in a few words.

    Raises:
        UserError: a file of the source is damaged, the folder cannot be written, or what was written is not right.
    """
    tell = on_step or (lambda _: None)
    check_level(plan, level)
    done = {step.name: step for step in plan.steps}
    with new_folder(plan.out) as folder, ThreadPoolExecutor(1) as beside:
        # Beside the copying, which leaves the processor to others: the rows' values, and later the way to the disk.
        edits = beside.submit(plan.rows.edits, plan.choices.mask_init, plan.choices.seed)
        flushes = []
        for name, path in plan.copies.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            copy(path, folder / name)
        for name, text in plan.texts.items():
            (folder / name).write_bytes(text.encode())
        for shard in plan.headers.shards:
            step = done[shard.name]
            if step.action != "link":
                tell(f"Writing {shard.name}")
            done[shard.name] = _write(plan, shard, step, folder, edits)
            if step.action != "link":
                flushes.append(beside.submit(flush, folder / shard.name))
        written = dataclasses.replace(plan, steps=tuple(done.values()))
        verified = verify(written, folder, edits.result(), level, tell)
        for flushed in flushes:
            flushed.result()  # a disk tells only once that it could not keep the bytes
        return Report(written, verified)


def _write(plan: Plan, shard: Shard, step: FileStep, folder: Path, edits: Future[dict[str, Floats]]) -> FileStep:
    """Puts one shard into the folder; returns the step as it went."""
    src, dst = plan.source.folder / shard.name, folder / shard.name
    if step.action == "link":
        placed = place(src, dst)
        return FileStep(shard.name, placed, shard.bytes, shard.bytes if placed == "copy" else 0)
    if step.action == "rewrite":
        _rewrite(plan, shard, dst, edits.result())
    else:
        copy(src, dst)
        for tensor in plan.edited(shard):
            _patch_rows(dst, tensor, plan.rows.first, edits.result()[tensor.name])
    return step


def _patch_rows(path: Path, tensor: TensorInfo, row: int, values: Floats) -> None:
    """Writes rows from `row` on at their place in the file."""
    with path.open("r+b") as file:
        file.seek(tensor.start + row * (tensor.bytes // tensor.shape[0]))
        file.write(as_stored(values, tensor.dtype))


def _rewrite(plan: Plan, shard: Shard, dst: Path, added: dict[str, Floats]) -> None:
    """Writes a shard with rows added to some tensors, streaming the rest."""

    def chunks(name: str) -> Iterator[bytes]:
        yield from read_chunks(plan.source.folder / shard.name, plan.headers.tensors[name])
        if name in added:
            yield as_stored(added[name], plan.tensors[name].dtype)

    write_shard(dst, [t for t in plan.tensors.values() if t.shard == shard.name], shard.metadata, chunks)
