"""What to change where memory runs out: what a run takes by the planner's estimate, and what settings would save."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from zconvert.errors import UserError, out_of_memory
from zconvert.planning.decoding import decoding_bytes
from zconvert.planning.layouts import Layout
from zconvert.planning.memory import memory_of
from zconvert.planning.model import ModelFacts
from zconvert.planning.target import find_target
from zconvert.planning.workload import BYTES, Workload, workload_of
from zconvert.recipe import TrainingRecipe

_MATTERS = 0.02
"""share of the whole that a change must save to be worth a word"""


@contextlib.contextmanager
def explained(explain: Callable[[str], UserError]) -> Iterator[None]:
    """Turns memory that is not to be had into what `explain` makes of it."""
    try:
        yield
    except (MemoryError, RuntimeError, OSError) as error:
        said = out_of_memory(error)
        if said is None:
            raise
        raise explain(said) from error


def too_little_for_training(recipe: TrainingRecipe, processes: int, said: str) -> UserError:
    """Names the parts of a stage's memory, and settings that lower it, each with what would then be needed.

    Args:
        recipe: of the stage.
        processes: that share it.
        said: by the allocator.
    """
    what = f"{recipe.stage} needs more memory than there is"
    try:
        target = find_target(recipe.base_model, revision=recipe.revision)
    except UserError:
        return UserError(what, found=said, fix="zconvert plan tells what a recipe needs")
    settings = target.settings
    assert settings is not None, "what is trained was converted"
    work = workload_of(recipe, settings.block_size, settings.gated if settings.mode == "gated" else None)
    layout = Layout.of(recipe.parallel, processes)
    memory = memory_of(target.facts, work, layout)
    parts = sorted(memory.parts().items(), key=lambda part: -part[1])
    largest = [f"{name.replace('_', ' ')} {_gb(size)}" for name, size in parts if size > _MATTERS * memory.total]
    saved = {words: memory_of(target.facts, changed, layout).total for words, changed in _lower(work).items()}
    wider = replace(layout, gpus=2 * processes, fsdp=2 * layout.fsdp)
    saved["twice as many processes"] = memory_of(target.facts, work, wider).total
    return UserError(
        what,
        found=f"{said}; this run takes about {_gb(memory.total)} a device: {', '.join(largest)}",
        fix=_advice(saved, memory.total),
    )


def too_little_for_decoding(checkpoint: str, said: str, options: dict[str, Any]) -> UserError:
    """The same for a command that decodes.

    Args:
        checkpoint: as the user named it.
        said: by the allocator.
        options: of the command: `batch_size` (one or several), `max_new_tokens`, `dtype`, where it has them.
    """
    what = f"decoding {checkpoint} needs more memory than there is"
    try:
        facts = find_target(checkpoint).facts
    except UserError:
        return UserError(what, found=said, fix="use a smaller --batch-size, or --dtype bfloat16")
    batch, tokens = (_largest(options.get(name)) for name in ("batch_size", "max_new_tokens"))
    number = _number_bytes(facts, str(options.get("dtype", "auto")))
    weights, cache = decoding_bytes(facts, batch, tokens, number, number)
    saved = {}
    if batch > 1:
        saved[f"--batch-size {batch // 2}"] = sum(decoding_bytes(facts, batch // 2, tokens, number, number))
    if "max_new_tokens" in options and tokens > 1:
        saved[f"--max-new-tokens {tokens // 2}"] = sum(decoding_bytes(facts, batch, tokens // 2, number, number))
    if number > BYTES["bfloat16"]:
        saved["--dtype bfloat16"] = sum(decoding_bytes(facts, batch, tokens, 2, 2))
    takes = f"weights take about {_gb(weights)}, caches of {batch} × {tokens} new tokens {_gb(cache)}"
    return UserError(what, found=f"{said}; {takes}", fix=_advice(saved, weights + cache))


def _lower(work: Workload) -> dict[str, Workload]:
    """Changes of a recipe that take less memory, in its words."""
    changes: dict[str, Workload] = {}
    if work.micro_batch_size > 1:
        rows, steps = work.micro_batch_size // 2, work.gradient_accumulation_steps * 2
        words = f"micro_batch_size: {rows} with gradient_accumulation_steps: {steps}"
        changes[words] = replace(work, micro_batch_size=rows, gradient_accumulation_steps=steps)
    if not work.gradient_checkpointing:
        changes["gradient_checkpointing: true"] = replace(work, gradient_checkpointing=True)
    half = work.sequence_len // 2
    changes[f"sequence_len: {half}"] = replace(work, sequence_len=half)
    if work.diffusion_fraction > 0.5:
        changes["diffusion.diffusion_fraction: 0.5"] = replace(work, diffusion_fraction=0.5)
    if work.compute_bytes > BYTES["bfloat16"]:
        changes["dtype: bfloat16"] = replace(work, compute_bytes=BYTES["bfloat16"])
    if work.optimizer != "adamw_8bit" and work.gated is None:
        changes["optimizer: adamw_8bit"] = replace(work, optimizer="adamw_8bit")
    chunk = (work.loss_chunk_size or 4096) // 4
    changes[f"loss_chunk_size: {chunk}"] = replace(work, loss_chunk_size=chunk)
    return changes


def _advice(saved: dict[str, float], total: float) -> str:
    """The changes that matter, the one that saves most first."""
    worth = sorted((size, words) for words, size in saved.items() if size < (1 - _MATTERS) * total)
    if not worth:
        return "take a machine with more memory: zconvert plan tells how much is needed"
    return "one of: " + "; ".join(f"{words} (about {_gb(size)})" for size, words in worth)


def _largest(value: Any) -> int:
    """Of an option that may be given several times."""
    return max(value) if isinstance(value, list | tuple) and value else value if isinstance(value, int) else 1


def _number_bytes(facts: ModelFacts, dtype: str) -> float:
    return float(BYTES.get(dtype, facts.stored_bytes / max(1, facts.total)))


def _gb(size: float) -> str:
    return f"{size / 1e9:.3g} GB"
