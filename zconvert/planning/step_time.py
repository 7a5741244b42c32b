"""How long a training step takes, and a whole stage: arithmetic, memory traffic of the optimizer, communication.

Symbols as in memory.py. Matrix work of a forward is 2 FLOP a parameter and token; the backward pass takes twice as
much, and gradient checkpointing one forward more. Of the (2T)² pairs of a packed row attention needs T²/2 (clean,
causal), T²/2 (mask slots to the clean prefix) and T·B (a slot's own block); a window cuts the first two. Gated mode
runs the clean half forward only, and its mask half without gradients of the frozen weights: 2 + 2 FLOP a parameter
instead of 2 + 4.

    compute        FLOP / (F · training_efficiency)
    optimizer      28 bytes for each trained parameter of the device / memory bandwidth, once a step
    communication  FSDP: weights gathered twice, each micro-batch, in float32 (in gated mode in the forward's format),
                   gradients sent once a step, or each micro-batch with sync_every_forward; CP: clean keys and values
                   gathered in every layer, their gradients sent back; EP: tokens sent to their experts and back,
                   forward and backward
    step           max(compute, FSDP) + CP + EP + optimizer: gathering layers overlaps with work, the others wait

Within a node devices talk over its link, else over the network. `training_efficiency` 0.35 of the data sheet is what
well-made training of mixtures of experts reaches; a stated assumption, not a measurement: --efficiency changes it. On
a CPU it is unknown, until --calibrate measures it there.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zconvert.planning.layouts import Layout
from zconvert.planning.model import ModelFacts
from zconvert.planning.workload import Workload

if TYPE_CHECKING:
    from zconvert.planning.machines import Machine

_OPTIMIZER_BYTES = 28  # reads master, gradient, mean, square; writes master, mean, square


@dataclass(frozen=True)
class StepTime:
    """Seconds of one optimizer step, by part, and how much text it sees."""

    compute: float
    optimizer: float
    sharding: float
    """gathering weights and sending gradients (FSDP, or the sum over replicas); overlaps with compute"""
    context: float
    experts: float
    tokens: int
    """clean tokens of a step, over all devices"""
    flops: float
    """of a step, over all devices"""

    @property
    def total(self) -> float:
        """Seconds of the step."""
        return max(self.compute, self.sharding) + self.context + self.experts + self.optimizer

    @property
    def tokens_per_second(self) -> float:
        """Clean tokens a second, over all devices."""
        return self.tokens / self.total


def step_time(model: ModelFacts, work: Workload, layout: Layout, machine: Machine) -> StepTime:
    """Time of one optimizer step of all devices together.

    Args:
        model: what is trained.
        work: the stage.
        layout: how it is spread.
        machine: one of the devices.
    """
    accumulation, number = work.gradient_accumulation_steps, work.compute_bytes
    efficiency = machine.training_efficiency or 1.0  # where it is unknown, layouts are compared all the same
    rows = layout.rows * work.micro_batch_size * accumulation
    flops = rows * row_flops(model, work)
    trained = model.total if work.gated is None else model.gated_parameters(work.gated)
    gathering = summing = 0.0
    if layout.sharded:
        gathering = 2 * work.gathered_bytes * model.total / _link(machine, layout.fsdp)
        summing = 4 * trained / _link(machine, layout.fsdp)
    if layout.replicas > 1:
        summing += 2 * 4 * trained / layout.fsdp / _link(machine, layout.gpus)
    inner = _link(machine, max(layout.context_parallel, layout.expert_parallel))
    packed = work.micro_batch_size * work.tokens_per_row / layout.context_parallel
    context = 0.0
    if layout.context_parallel > 1:
        context = 2 * (3 if work.gradient_checkpointing else 2) * work.micro_batch_size * work.sequence_len * number / 2
        context *= model.kv_width / inner
    experts = 0.0
    if layout.expert_parallel > 1:
        away = 1 - 1 / layout.expert_parallel
        passes = 4 + 2 * work.gradient_checkpointing  # there and back: forward, backward, run again
        experts = passes * packed * model.experts_per_token * model.hidden * number * model.moe_layers * away / inner
    return StepTime(
        compute=flops / layout.gpus / (machine.flops(number) * efficiency),
        optimizer=_OPTIMIZER_BYTES * trained / layout.fsdp / (machine.bytes_per_second * machine.bandwidth_efficiency),
        sharding=accumulation * gathering + (accumulation if work.sync_every_forward else 1) * summing,
        context=accumulation * context,
        experts=accumulation * experts,
        tokens=rows * work.sequence_len,
        flops=flops,
    )


def _link(machine: Machine, neighbours: int) -> float:
    """Bytes a second between so many devices side by side."""
    return 1e9 * (machine.link_gb_s if neighbours <= machine.gpus_per_node else machine.network_gb_s)


def row_flops(model: ModelFacts, work: Workload) -> float:
    """FLOP of one packed row, forward and backward."""
    length, again = work.sequence_len, int(work.gradient_checkpointing)
    routed = model.moe_layers * model.experts_per_token * model.expert_parameters
    matrices = model.shared_parameters + routed
    head = 2 * model.head_parameters * length
    pairs = sum(cache.layers * _pairs(length, cache.window) for cache in model.caches)
    clean_attention = 2 * model.score_width * pairs
    fraction = work.diffusion_fraction
    mask_attention = fraction * (clean_attention + 2 * model.score_width * model.layers * length * work.block_size)
    if work.gated is None:
        # The loss makes logits and both gradients in one pass: three products, none of them again.
        tokens = work.tokens_per_row
        return (3 + again) * (2 * matrices * tokens + clean_attention + mask_attention) + 3 * (1 + fraction) * head
    at_slots = model.shared_parameters + (0 if work.gated.mlp == "replace" else routed)
    extra = model.gated_parameters(work.gated)
    clean = 2 * matrices * length + clean_attention
    slots = fraction * length * ((2 + again) * 2 * at_slots + (3 + again) * 2 * extra) + (3 + again) * mask_attention
    return clean + slots + fraction * (1 + 2) * head  # the teacher's logits, and the slots' with their gradient


def _pairs(length: int, window: int | None) -> float:
    """Pairs of query and key of a causal row."""
    if window is None or window >= length:
        return length * length / 2
    return window * window / 2 + (length - window) * window


@dataclass(frozen=True)
class StageCost:
    """A whole stage."""

    steps: int
    tokens: int
    days: float
    gpu_hours: float
    dollars: float | None
    """None: the machine has no price"""


def stage_cost(time: StepTime, work: Workload, machine: Machine, gpus: int, tokens: float | None) -> StageCost | None:
    """What a stage takes.

    Args:
        time: of a step.
        work: the stage.
        machine: one of the devices.
        gpus: how many.
        tokens: clean tokens to train on; None: as many as its `max_steps` take.

    Returns:
        None where nothing says how long the stage is, or how fast the machine.
    """
    steps = work.max_steps if tokens is None else math.ceil(tokens / time.tokens)
    if steps is None or machine.training_efficiency is None:
        return None
    hours = steps * time.total / 3600
    price = machine.price_per_hour
    dollars = None if price is None else hours * gpus * price
    return StageCost(steps, steps * time.tokens, hours / 24, hours * gpus, dollars)


def disk_bytes(model: ModelFacts, work: Workload) -> dict[str, float]:
    """Bytes on disk, by what lies there: the checkpoint to start from, train states, the one that comes out."""
    trained = model.total if work.gated is None else model.gated_parameters(work.gated)
    return {
        "source": float(model.stored_bytes),
        # One more is there while it is written; the oldest goes when it is whole.
        "train_states": (work.save_total_limit + 1) * (4 + work.state_bytes) * trained,
        "result": float(model.stored_bytes) if work.gated is None else 4.0 * trained,
    }
