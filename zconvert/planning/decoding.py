"""When does it pay? The time of a decoding forward, by its parts, and the speedup over autoregressive decoding.

Symbols: b sequences, c tokens of context each, N tokens a sequence in the forward; W bytes/s and F FLOP/s of the
device, of which kernels reach a share (`bandwidth_efficiency`, `matrix_efficiency`). A forward is a row of kernels one
after another; each takes what reading its bytes takes, or its arithmetic, whichever is longer (the roofline):

    shared    weights that every token passes: s numbers; 2 s · bN FLOP
    experts   distinct experts of a layer with m routed tokens: E (1 − (1 − k/E)^m); 2 k · (one expert) · m FLOP
    cache     keys and values, read once for a sequence, whatever N: this is what a block shares; q·k and w·v:
              2 · score width · N FLOP for each token of it
    head      V · H numbers, 2 V H FLOP for each token whose logits are made
    logits    12 bytes for each logit: written once and read twice, in float32
    kernels   a fixed time each (`kernel_us`), for 10 kernels a layer, 8 more with experts, 12 more with CCA's
              convolutions and residual scales, 4 more with latents
    engine    `sequence_us` a sequence, in TiDAR steps alone: what a serving engine adds to verify and to schedule

    time = Σ max(bytes / W, FLOP / F) + kernels + engine;   speedup = accepted · time(AR) / time(TiDAR)

The sum over parts lies above the one maximum over everything (the method's formula), as kernels do not overlap.
`matrix_efficiency` 0.55, `bandwidth_efficiency` 0.8 and 1 µs a kernel are the free numbers: with them TiDAR's published
4.71× and 5.91× come out as 5.2× and 6.0×, and Zyphra's 2.60× at batch 1 on an H100 as 2.7×. At larger batches Zyphra
measured 1.13 … 1.66× where an ideal engine would reach 2 … 3×: about 0.7 ms a sequence and step explain that. So
`sequence_us` is 0 unless a machine's file says what its engine takes. Communication between devices is not counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from zconvert.planning.acceptance import Curve, Yield, best_sets, two_forwards, yield_of
from zconvert.planning.model import ModelFacts

if TYPE_CHECKING:
    from zconvert.planning.machines import Machine

_LOGIT_BYTES = 12


@dataclass(frozen=True)
class Part:
    """A part of a forward."""

    name: str
    bytes: float
    flops: float
    seconds: float


@dataclass(frozen=True)
class Forward:
    """A decoding forward."""

    batch_size: int
    context: int
    tokens: float
    """N, tokens of one sequence"""
    touched_experts: float
    """distinct routed experts of a layer that it reads"""
    parts: tuple[Part, ...]

    @property
    def seconds(self) -> float:
        """What it takes."""
        return sum(part.seconds for part in self.parts)


@dataclass(frozen=True)
class Calibration:
    """What steps take on a measured device beyond its roofline (calibrate.py fits it), seconds."""

    constant: float
    """of a step"""
    layer: float
    """of each layer"""
    expert: float
    """of each expert that a layer reads"""
    token: float
    """of each token in each layer"""
    roofline: float
    """what the roofline of the measured rates is multiplied by"""


@dataclass(frozen=True)
class Device:
    """What decodes: one machine, or several that share the model's weights (tensor parallel, ideal)."""

    machine: Machine
    gpus: int = 1
    weight_bytes: float = 2
    """of a parameter"""
    cache_bytes: float = 2
    """of a number of keys and values"""
    all_logits: bool = False
    """logits of every token of a forward are made, as the published TiDAR code does; ours makes those that are used"""
    masks_pass_experts: bool = True
    """False in gated mode with a diffusion expert in the routed ones' place"""
    calibration: Calibration | None = None
    """of a device that was measured; None: kernels take `kernel_us` each"""


@dataclass(frozen=True)
class Cell:
    """Decoding by one mode, at one batch and context."""

    batch_size: int
    context: int
    mode: str
    """single: one forward verifies and drafts. two: one forward each"""
    speedup: float
    break_even_accepted: float
    """tokens per step from which on it beats AR decoding"""
    accepted: float
    block_size: int
    proposals: tuple[int, ...]
    fits: bool
    """weights and cache fit into the memory"""

    def to_dict(self) -> dict[str, Any]:
        """As it stands in JSON."""
        return asdict(self) | {"proposals": list(self.proposals)}


def touched_experts(experts: int, per_token: int, tokens: float) -> float:
    """Expected number of distinct experts that so many tokens are routed to, if all are equally likely.

    >>> touched_experts(16, 1, 1)
    1.0
    >>> round(touched_experts(16, 1, 16), 1)
    10.3
    """
    return experts * (1 - (1 - per_token / experts) ** tokens) if experts else 0.0


def forward(
    model: ModelFacts,
    device: Device,
    batch_size: int,
    context: int,
    tokens: float,
    *,
    causal: float,
    logits: float,
    verifies: bool = True,
) -> Forward:
    """The time of one forward.

    Args:
        model: what decodes.
        device: where.
        batch_size: b.
        context: c, tokens in the cache of each sequence.
        tokens: N, tokens of each sequence.
        causal: how many of them are no mask slots.
        logits: tokens of each sequence whose logits are made.
        verifies: the engine checks drafts after it.
    """
    machine = device.machine
    width = device.gpus * machine.bytes_per_second * machine.bandwidth_efficiency
    rate = device.gpus * machine.flops(device.weight_bytes) * machine.matrix_efficiency
    rows = batch_size * tokens
    routed = rows if device.masks_pass_experts else batch_size * causal
    touched = touched_experts(model.experts, model.experts_per_token, routed)
    one = model.expert_parameters * model.moe_layers
    made = batch_size * (tokens if device.all_logits else min(tokens, logits))

    def part(name: str, size: float, flops: float) -> Part:
        return Part(name, size, flops, max(size / width, flops / rate))

    attended = sum(cache.layers * cache.tokens(context) for cache in model.caches)
    weight = device.weight_bytes
    parts = [
        part("shared", weight * model.shared_parameters, 2 * model.shared_parameters * rows),
        part("experts", weight * one * touched, 2 * one * model.experts_per_token * routed),
        part(
            "cache",
            device.cache_bytes * batch_size * model.cache_numbers(context),
            2 * model.score_width * attended * rows,
        ),
        part("head", weight * model.head_parameters, 2 * model.head_parameters * made),
        part("logits", _LOGIT_BYTES * model.vocabulary * made, 0.0),
        Part("kernels", 0.0, 0.0, kernels_of(model) * machine.kernel_us * 1e-6),
        Part("engine", 0.0, 0.0, batch_size * machine.sequence_us * 1e-6 if verifies else 0.0),
    ]
    if device.calibration is not None:
        parts = _calibrated(device.calibration, parts, model, rows, touched)
    return Forward(batch_size, context, tokens, touched, tuple(parts))


def _calibrated(fit: Calibration, parts: list[Part], model: ModelFacts, rows: float, touched: float) -> list[Part]:
    """The parts of the roofline as they were measured, and what was measured beside them."""
    work = [replace(part, seconds=fit.roofline * part.seconds) for part in parts if part.name != "kernels"]
    overhead = fit.constant + fit.layer * model.layers + fit.expert * model.moe_layers * touched
    return [*work, Part("kernels", 0.0, 0.0, overhead), Part("tokens", 0.0, 0.0, fit.token * model.layers * rows)]


def kernels_of(model: ModelFacts) -> int:
    """Kernels that a forward launches, roughly."""
    layer = 10 + 12 * (model.attention_kind == "cca") + 4 * (model.attention_kind == "mla")
    return layer * model.layers + 8 * model.moe_layers


def ar_forward(model: ModelFacts, device: Device, batch_size: int, context: int) -> Forward:
    """A step of autoregressive decoding."""
    return forward(model, device, batch_size, context, 1, causal=1, logits=1, verifies=False)


def single_forward(model: ModelFacts, device: Device, batch_size: int, context: int, plan: Yield, size: int) -> Forward:
    """A step that verifies drafts and drafts the next ones: logits of the drafts, and of the one block that is used."""
    return forward(model, device, batch_size, context, plan.tokens, causal=plan.causal, logits=2 * size)


def predict(
    model: ModelFacts,
    device: Device,
    curve: Curve,
    batch_size: int,
    context: int,
    *,
    block_sizes: tuple[int, ...] | None = None,
    proposals: tuple[int, ...] | None = None,
) -> list[Cell]:
    """The speedup of both modes at one batch and context.

    Args:
        model: what decodes.
        device: where.
        curve: how often slots are right.
        batch_size: b.
        context: c.
        block_sizes: to choose from; None: the curve's alone.
        proposals: the set to take; None: the best one of each block size.
    """
    ar = ar_forward(model, device, batch_size, context).seconds
    fits = fits_decoding(model, device, batch_size, context)
    cells: dict[str, Cell] = {}

    def offer(mode: str, seconds: float, accepted: float, size: int, chosen: tuple[int, ...]) -> None:
        break_even = seconds / ar
        cell = Cell(batch_size, context, mode, accepted / break_even, break_even, accepted, size, chosen, fits)
        if mode not in cells or cell.speedup > cells[mode].speedup:
            cells[mode] = cell

    for size in block_sizes or (curve.block_size,):
        rates = curve.cut(size).rates
        plans = best_sets(rates) if proposals is None else (_given(rates, proposals),)
        for plan in plans:
            step = single_forward(model, device, batch_size, context, plan, size)
            offer("single", step.seconds, plan.accepted, size, plan.proposals)
        verify, draft = two_forward_step(model, device, batch_size, context, size)
        offer("two", verify.seconds + draft.seconds, two_forwards(rates).accepted, size, ())
    return list(cells.values())


def two_forward_step(
    model: ModelFacts, device: Device, batch_size: int, context: int, size: int
) -> tuple[Forward, Forward]:
    """A forward that verifies a block's drafts, and one that reads the next token and drafts after it."""
    verify = forward(model, device, batch_size, context, size, causal=size, logits=size)
    return verify, forward(model, device, batch_size, context, size + 1, causal=1, logits=size, verifies=False)


def _given(rates: tuple[float, ...], proposals: tuple[int, ...]) -> Yield:
    return yield_of(rates, tuple(k for k in proposals if k <= len(rates)) or (len(rates),))


def fits_decoding(model: ModelFacts, device: Device, batch_size: int, context: int) -> bool:
    """Whether weights and caches fit into the memory."""
    needed = device.weight_bytes * model.total + device.cache_bytes * batch_size * model.cache_numbers(context)
    return needed <= device.gpus * device.machine.usable_bytes


def device_for(model: ModelFacts, machine: Machine, gpus: int, **options: Any) -> Device:
    """The smallest number of devices, a power of two up to `gpus`, that the weights fit on."""
    count = 1
    while count * 2 <= gpus and not fits_decoding(model, Device(machine, count, **options), 1, 4096):
        count *= 2
    return Device(machine, count, **options)


def blocks_under_roofline(model: ModelFacts, machine: Machine, block_size: int, cache_bytes: float = 2) -> float:
    """Blocks of a sequence that attention over a long cache takes for nothing, at data-sheet rates.

    While it reads a number of the cache, the device can do F · bytes / W operations; a token wants
    2 · score width / cache width of them. Zyphra names about 3 blocks on MI300X and 5 on MI355X for its model.
    """
    width = max((cache.width for cache in model.caches), default=1)
    for_a_token = 2 * model.score_width / (width * cache_bytes)
    return machine.flops(2) / machine.bytes_per_second / for_a_token / block_size
