"""The whole plan: what `zconvert plan --json` prints, from facts of a model, a machine and the stages to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from zconvert.errors import UserError
from zconvert.planning.acceptance import Curve
from zconvert.planning.decoding import (
    Cell,
    Device,
    Forward,
    ar_forward,
    blocks_under_roofline,
    predict,
    single_forward,
    two_forward_step,
    yield_of,
)
from zconvert.planning.layouts import Layout, layouts
from zconvert.planning.memory import Memory, memory_of
from zconvert.planning.model import ModelFacts
from zconvert.planning.step_time import StageCost, StepTime, disk_bytes, stage_cost, step_time
from zconvert.planning.workload import Workload

if TYPE_CHECKING:
    from zconvert.planning.machines import Machine

BATCHES = (1, 2, 4, 8, 16, 32, 64)
CONTEXTS = (1024, 4096, 16_384, 32_768, 65_536, 131_072)
_MOST_GPUS = 1024
_GB = 1e9


@dataclass(frozen=True)
class StagePlan:
    """A stage on a number of devices, spread in the best way that fits."""

    work: Workload
    layout: Layout
    fits: bool
    memory: Memory
    time: StepTime
    cost: StageCost | None
    rejected: tuple[tuple[Layout, str], ...]
    """other layouts, and why not"""
    least_gpus: int | None
    """the smallest power of two on which some layout fits; None: none up to 1024"""


def plan_stage(model: ModelFacts, work: Workload, machine: Machine, gpus: int, tokens: float | None) -> StagePlan:
    """Chooses a layout: the fastest of those that fit, else the one that needs least memory.

    Args:
        model: what is trained.
        work: the stage.
        machine: one of the devices.
        gpus: how many.
        tokens: clean tokens to train on; None: as many as the stage's `max_steps` take.

    Raises:
        UserError: the recipe's own layout cannot be.
    """
    candidates: list[tuple[Layout, Memory, StepTime]] = []
    rejected: list[tuple[Layout, str]] = []
    impossible: list[tuple[Layout, str]] = []
    for layout, obstacle in layouts(model, work, gpus):
        if obstacle is not None:
            impossible.append((layout, obstacle))
            continue
        candidates.append((layout, memory_of(model, work, layout), step_time(model, work, layout, machine)))
    if not candidates:
        raise UserError(
            f"{work.stage}: the layout that its recipe's parallel: section says cannot be",
            found="; ".join(obstacle for _, obstacle in impossible),
            fix="change that section, or --gpus",
        )
    usable = machine.usable_bytes
    fitting = [candidate for candidate in candidates if candidate[1].total <= usable]

    def tokens_per_second(candidate: tuple[Layout, Memory, StepTime]) -> tuple[float, float]:
        return -candidate[2].tokens_per_second, candidate[1].total

    chosen = min(fitting, key=tokens_per_second) if fitting else min(candidates, key=lambda each: each[1].total)
    for layout, memory, time in candidates:
        if layout == chosen[0]:
            continue
        if memory.total > usable:
            reason = f"needs {memory.total / _GB:.0f} GB of {usable / _GB:.0f} GB"
        elif fitting:
            slower = chosen[2].tokens_per_second / time.tokens_per_second
            reason = f"fits, {slower:.2f}× as long" if slower > 1.005 else "fits, as fast, more memory"
        else:
            reason = "needs more memory"
        rejected.append((layout, reason))
    return StagePlan(
        work=work,
        layout=chosen[0],
        fits=bool(fitting),
        memory=chosen[1],
        time=chosen[2],
        cost=stage_cost(chosen[2], work, machine, gpus, tokens),
        rejected=(*rejected, *impossible),
        least_gpus=least_gpus(model, work, machine),
    )


def least_gpus(model: ModelFacts, work: Workload, machine: Machine) -> int | None:
    """The smallest power of two of devices on which some layout fits; None: none up to 1024."""
    gpus = 1
    while gpus <= _MOST_GPUS:
        for layout, obstacle in layouts(model, work, gpus):
            if obstacle is None and memory_of(model, work, layout).total <= machine.usable_bytes:
                return gpus
        gpus *= 2
    return None


def speed_map(
    model: ModelFacts,
    device: Device,
    curve: Curve,
    batches: Sequence[int],
    contexts: Sequence[int],
    proposals: tuple[int, ...] | None = None,
) -> list[Cell]:
    """Predictions over batch and context; smaller blocks than the curve's are tried where the set is free."""
    full = curve.block_size
    sizes = (full,) if proposals is not None else tuple(sorted({max(2, full // 4), max(2, full // 2), full}))
    return [
        cell
        for batch in batches
        for context in contexts
        for cell in predict(model, device, curve, batch, context, block_sizes=sizes, proposals=proposals)
    ]


def explain(model: ModelFacts, device: Device, curve: Curve, cell: Cell) -> dict[str, Any]:
    """The arithmetic behind a cell: the parts of the AR forward and of the cell's."""
    batch, context, size = cell.batch_size, cell.context, cell.block_size
    ar = ar_forward(model, device, batch, context)
    if cell.mode == "single":
        steps = [single_forward(model, device, batch, context, yield_of(curve.cut(size).rates, cell.proposals), size)]
    else:
        steps = list(two_forward_step(model, device, batch, context, size))
    seconds = sum(step.seconds for step in steps)
    return {
        "batch_size": batch,
        "context": context,
        "mode": cell.mode,
        "ar": _forward_dict(ar),
        "tidar": [_forward_dict(step) for step in steps],
        "sentence": (
            f"{cell.accepted:.2f} tokens accepted a step × {1e3 * ar.seconds:.3f} ms for one token "
            f"÷ {1e3 * seconds:.3f} ms for a step = {cell.speedup:.2f}×; "
            f"it breaks even at {cell.break_even_accepted:.2f} accepted"
        ),
    }


def _forward_dict(step: Forward) -> dict[str, Any]:
    return {
        "tokens": step.tokens,
        "touched_experts": step.touched_experts,
        "milliseconds": 1e3 * step.seconds,
        "parts": [
            {
                "name": part.name,
                "gigabytes": part.bytes / _GB,
                "gigaflops": part.flops / 1e9,
                "milliseconds": 1e3 * part.seconds,
            }
            for part in step.parts
        ],
    }


def document_of(
    model: ModelFacts,
    stages: Sequence[StagePlan],
    machine: Machine,
    gpus: int,
    device: Device,
    curve: Curve,
    cells: Sequence[Cell],
) -> dict[str, Any]:
    """The plan as JSON can hold it.

    Returns:
        - `summary`: the plan in sentences
        - `model`: its counts; `machine`, `gpus`
        - `memory`: of the stage that needs most: `total_gb_per_gpu`, `usable_gb_per_gpu` and the parts, GB
        - `time`: of all stages: `days`, `gpu_hours`, `dollars`, null where unknown
        - `stages`: each with its layout, `memory`, `time`, `disk_gb`, and the layouts `rejected` with the reason
        - `acceptance`: the curve; `decoding`: what decodes, and the blocks that are under the roofline
        - `speedup`: for each `batch_size`, `context` and `mode`: `speedup`, `break_even_accepted`, `proposals`, …
    """
    hungriest = max(stages, key=lambda stage: stage.memory.total)
    costs = [stage.cost for stage in stages]
    known = [cost for cost in costs if cost is not None]
    whole = len(known) == len(costs)
    dollars = [cost.dollars for cost in known if cost.dollars is not None]
    return {
        "summary": summary(stages, machine, gpus, cells),
        "model": {
            "name": model.name,
            "model_type": model.model_type,
            "parameters": model.total,
            "active_parameters": model.active,
            "experts": model.experts,
            "experts_per_token": model.experts_per_token,
            "kv_bytes_per_token": int(device.cache_bytes * model.kv_width),
        },
        "machine": machine.model_dump(mode="json"),
        "gpus": gpus,
        "memory": _memory_dict(hungriest.memory, machine),
        "time": {
            "days": sum(cost.days for cost in known) if whole else None,
            "gpu_hours": sum(cost.gpu_hours for cost in known) if whole else None,
            "dollars": sum(dollars) if whole and len(dollars) == len(known) else None,
        },
        "stages": [_stage_dict(model, stage, machine) for stage in stages],
        "acceptance": {"source": curve.source, "block_size": curve.block_size, "rates": list(curve.rates)},
        "decoding": {
            "gpus": device.gpus,
            "weight_bytes": device.weight_bytes,
            "cache_bytes": device.cache_bytes,
            "blocks_under_roofline": blocks_under_roofline(model, machine, curve.block_size, device.cache_bytes),
        },
        "speedup": [cell.to_dict() for cell in cells],
    }


def _stage_dict(model: ModelFacts, stage: StagePlan, machine: Machine) -> dict[str, Any]:
    time, work = stage.time, stage.work
    seconds: dict[str, Any] = {
        "step_seconds": time.total,
        "tokens_per_second": time.tokens_per_second,
        "parts_seconds": {
            "compute": time.compute,
            "sharding": time.sharding,
            "context": time.context,
            "experts": time.experts,
            "optimizer": time.optimizer,
        },
    }
    if machine.training_efficiency is None:
        seconds = dict.fromkeys(seconds)
    return {
        "stage": work.stage,
        "mode": "full" if work.gated is None else "gated",
        "gated": None if work.gated is None else asdict(work.gated),
        "trained_parameters": model.total if work.gated is None else model.gated_parameters(work.gated),
        "sequence_len": work.sequence_len,
        "micro_batch_size": work.micro_batch_size,
        "gradient_accumulation_steps": work.gradient_accumulation_steps,
        "gradient_checkpointing": work.gradient_checkpointing,
        "optimizer": work.optimizer,
        "layout": {**asdict(stage.layout), "title": stage.layout.title},
        "fits": stage.fits,
        "least_gpus": stage.least_gpus,
        "memory": _memory_dict(stage.memory, machine),
        "time": {
            "tokens_per_step": time.tokens,
            **seconds,
            **(asdict(stage.cost) if stage.cost is not None else {}),
        },
        "disk_gb": {name: size / _GB for name, size in disk_bytes(model, work).items()},
        "rejected": [{"layout": layout.title, "reason": reason} for layout, reason in stage.rejected],
    }


def _memory_dict(memory: Memory, machine: Machine) -> dict[str, float]:
    parts = {f"{name}_gb": size / _GB for name, size in memory.parts().items()}
    return {"total_gb_per_gpu": memory.total / _GB, "usable_gb_per_gpu": machine.usable_bytes / _GB, **parts}


def summary(stages: Sequence[StagePlan], machine: Machine, gpus: int, cells: Sequence[Cell]) -> list[str]:
    """The plan in plain words, a sentence each."""
    lines = []
    for stage in stages:
        name = f"{stage.work.stage}: " if len(stages) > 1 else ""
        needed = stage.memory.total / _GB
        room = f"{needed:.{0 if needed >= 1 else 2}f} of {machine.usable_bytes / _GB:.0f} GB"
        if stage.fits:
            fewer = stage.least_gpus
            also = f" (the least is {fewer})" if fewer is not None and fewer < gpus else ""
            spread = f"{stage.layout.title}{_in_recipe(stage)}"
            lines.append(f"{name}Fits on {gpus} × {machine.name} with {spread}: {room} a device{also}.")
        else:
            needs = f"{stage.least_gpus} would do" if stage.least_gpus else "no number of them up to 1024 would do"
            lines.append(f"{name}Does not fit on {gpus} × {machine.name}: {room} a device at best; {needs}.")
        cost = stage.cost
        if cost is not None and stage.fits:
            price = f", about ${cost.dollars:,.0f}" if cost.dollars is not None and cost.dollars >= 1 else ""
            lines.append(
                f"{name}{count_of(cost.tokens)} tokens take about {duration_of(cost.days)} at "
                f"{stage.time.tokens_per_second:,.0f} tokens/s{price}."
            )
        elif machine.training_efficiency is None:
            lines.append(f"{name}How long training takes is unknown: --calibrate measures it, on this machine.")
    lines.append(_where_it_pays(cells))
    return lines


def _in_recipe(stage: StagePlan) -> str:
    """Where a layout comes from: the recipe, or what it has to say for it; nothing where it need not say anything."""
    if stage.work.parallel is not None:
        return " (the recipe's)"
    layout, stock = stage.layout, Layout(stage.layout.gpus, fsdp=stage.layout.gpus)
    names = ("fsdp", "context_parallel", "expert_parallel")
    said = [f"{name}: {getattr(layout, name)}" for name in names if getattr(layout, name) != getattr(stock, name)]
    return f" (by parallel: {{{', '.join(said)}}} in the recipe)" if said else ""


def _where_it_pays(cells: Sequence[Cell]) -> str:
    fitting = [cell for cell in cells if cell.fits]
    if not fitting:
        return "Decoding: the weights do not fit on these devices."
    best = max(fitting, key=lambda cell: cell.speedup)
    where = f"best {best.speedup:.1f}× at batch {best.batch_size} and {best.context:,} tokens"
    wins = {(cell.batch_size, cell.context) for cell in fitting if cell.speedup > 1}
    everywhere = {(cell.batch_size, cell.context) for cell in fitting}
    if not wins:
        return f"Decoding would not pay anywhere ({where}): AR is faster."
    if wins == everywhere:
        limit = " that fits" if len(fitting) < len(cells) else ""
        return f"Decoding pays at every batch and context of the map{limit} ({where})."
    shortest, least = min(cell.context for cell in fitting), min(cell.batch_size for cell in fitting)
    batches = sorted({cell.batch_size for cell in fitting if cell.context == shortest})
    contexts = sorted({cell.context for cell in fitting if cell.batch_size == least})
    by_batch = _range_of(batches, {batch for batch, context in wins if context == shortest})
    by_context = _range_of(contexts, {context for batch, context in wins if batch == least})
    parts = [f"at batch {by_batch} whatever the context"] if by_batch else []
    parts += [f"at batch {least} with contexts {by_context}"] if by_context else []
    return f"Decoding pays {' and '.join(parts) or 'in a part of the map'} ({where})."


def _range_of(values: Sequence[int], winning: set[int]) -> str:
    """Where it pays, in words: `≥ 4`, `4 to 32`; empty where nowhere."""
    if not winning:
        return ""
    first, last = min(winning), max(winning)
    if last < values[-1]:
        return f"{first:,} to {last:,}" if last > first else f"{first:,}"
    return f"≥ {first:,}" if first > values[0] else "of any size"


def count_of(items: float) -> str:
    """A count in words: 600 B, 1.5 M."""
    for unit, name in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if items >= unit:
            return f"{items / unit:.3g} {name}"
    return f"{items:.0f}"


def duration_of(days: float) -> str:
    """A time in words: 12 days, 5 hours, 40 seconds."""
    if days >= 2:
        return f"{days:,.0f} days"
    if days >= 2 / 24:
        return f"{24 * days:.0f} hours"
    if days >= 2 / 1440:
        return f"{1440 * days:.0f} minutes"
    return f"{86400 * days:.0f} seconds"


def with_changes(machine: Machine, *, price: float | None = None, efficiency: float | None = None) -> Machine:
    """A machine with another price or training efficiency."""
    changes: dict[str, Any] = {}
    if price is not None:
        changes["price_per_hour"] = price
    if efficiency is not None:
        changes["training_efficiency"] = efficiency
    return machine.model_copy(update=changes) if changes else machine
