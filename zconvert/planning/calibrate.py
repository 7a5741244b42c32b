"""Measures the device it runs on, and small models of the same family on it, so that predictions rest on both.

Three rates are measured: reading memory (matrix times vector), matrix products of some hundred rows, and a kernel that
does nothing. Then shallow copies of the model (one and two layers, real widths, random weights, tokens routed evenly)
decode with blocks and proposals of several sizes, all in turns, so that whatever else the machine does hits all alike.
The time of a step of `tidar/decoding.py` is fitted, with no coefficient below zero and relative errors, as

    constant + layers · L + expert · L_moe · (touched experts) + token · L · (b N) + slower · roofline

whose roofline (decoding.py) takes the measured rates. What the fit knows of one and two layers carries to all of them.
torch is imported when something is measured, not before.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zconvert.errors import UserError
from zconvert.planning.decoding import Calibration, Device, forward
from zconvert.planning.machines import Machine
from zconvert.planning.model import ModelFacts, facts_from_config
from zconvert.planning.step_time import row_flops
from zconvert.planning.workload import Workload
from zconvert.tidar.settings import TidarSettings

if TYPE_CHECKING:
    from zconvert.tidar.model import LayoutModel

CONTEXT = 64
"""tokens of the prompt that calibration decodes after"""
SETS: tuple[tuple[int, tuple[int, ...]], ...] = (
    (1, ()),
    *((size, (1,)) for size in (2, 4, 8, 16)),
    *((16, tuple(range(1, count + 1))) for count in (3, 7, 11, 16)),
)
"""(block size, proposals) of the steps that are timed, of 1, 4, 8, 16, 32, 64, 128, 192 and 272 tokens; block 1: AR"""
DEPTHS = (1, 2)
_STEPS = 6
_MOST_TRAINED = 4096
"""tokens of a forward whose training is timed"""


@dataclass(frozen=True)
class Sample:
    """A timed step: what of, tokens in its forward, distinct experts that a layer read, seconds."""

    facts: ModelFacts
    tokens: int
    touched: float
    seconds: float


@dataclass(frozen=True)
class Calibrated:
    """A measured machine, and what its steps were."""

    machine: Machine
    calibration: Calibration
    samples: tuple[Sample, ...]
    checks: tuple[Sample, ...]
    """of the whole model, where it was timed along: no part of the fit"""


def calibrate(
    config: dict[str, Any],
    *,
    device: str = "cpu",
    dtype: str = "float32",
    rounds: int = 8,
    whole: Any = None,
    work: Workload | None = None,
) -> Calibrated:
    """Measures this device with models of a family.

    Args:
        config: `config.json` of the model.
        device: torch's name of the device.
        dtype: of the weights.
        rounds: how often each step is timed; the least tenth counts, as other work only ever adds.
        whole: the model itself, to be timed along and compared; None: not.
        work: a stage of training, whose speed is measured as well; None: not, and it stays unknown.

    Raises:
        UserError: the family's shapes do not follow from its config, or its models cannot be made.
    """
    import torch

    models = {}
    for depth in DEPTHS:
        shallow = shallow_config(config, depth)
        models[depth] = (_model_of(shallow, device, dtype), facts_from_config(shallow, f"{depth} layers"))
    if whole is not None:
        models[0] = (whole, facts_from_config(config, "whole"))
    times: dict[tuple[int, int], list[float]] = {}
    with torch.inference_mode():
        for done in range(rounds + 1):
            for depth, (model, _) in models.items():
                for place, (size, proposals) in enumerate(SETS):
                    took = _steps(model, size, proposals)
                    if done:  # the first round warms up
                        times.setdefault((depth, place), []).extend(took)
    samples: list[Sample] = []
    checks: list[Sample] = []
    for (depth, place), took in times.items():
        size, proposals = SETS[place]
        facts, tokens = models[depth][1], size + size * len(proposals)
        even = min(facts.experts, tokens * facts.experts_per_token)
        sample = Sample(facts, tokens, even, _typical(took))
        (samples if depth else checks).append(sample)
    machine = measure_machine(device, dtype, max(sample.facts.stored_bytes for sample in samples))
    if work is not None:
        reached = training_efficiency(*models[0 if whole is not None else DEPTHS[-1]], work, machine, device)
        machine = machine.model_copy(update={"training_efficiency": reached})
    return Calibrated(machine, fit(samples, machine, 4 if dtype == "float32" else 2), tuple(samples), tuple(checks))


def measure_machine(device: str, dtype: str, weight_bytes: int) -> Machine:
    """This device's rates.

    Args:
        device: torch's name of it.
        dtype: of the numbers.
        weight_bytes: of the models to be predicted: memory is read in pieces as large, since small ones stay in caches.
    """
    import torch

    kind = getattr(torch, dtype)
    width = max(256, min(8192, int((weight_bytes / kind.itemsize) ** 0.5)))
    matrix = torch.randn(width, width, device=device).to(kind)
    vector, rows = (torch.randn(width, count, device=device).to(kind) for count in (1, 256))
    one = torch.zeros(1, device=device)
    reading = _seconds(lambda: matrix @ vector, device)
    product = _seconds(lambda: matrix @ rows, device)
    kernel = _seconds(lambda: one + one, device)
    rate = 2 * width * width * 256 / product / 1e12
    total = torch.cuda.get_device_properties(device).total_memory if device.startswith("cuda") else _ram_bytes()
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else "this CPU"
    return Machine(
        name=name,
        memory_gb=total / 1e9,
        bandwidth_gb_s=width * width * kind.itemsize / reading / 1e9,
        bf16_tflops=rate,
        fp32_tflops=rate,
        kernel_us=max(1e-3, kernel * 1e6),
        bandwidth_efficiency=1.0,
        matrix_efficiency=1.0,
        training_efficiency=None,
        source="measured",
    )


def training_efficiency(
    model: LayoutModel, facts: ModelFacts, work: Workload, machine: Machine, device: str = "cpu"
) -> float:
    """Share of a machine's matrix products that training reaches, by plain causal steps on rows as long as packed ones.

    A packed row takes about what a plain one of as many tokens does (docs/benchmarks.md).

    Args:
        model: to be timed; its weights stay.
        facts: of it.
        work: the stage; of more than 4,096 tokens a forward, as many are timed.
        machine: whose products were measured.
        device: torch's name of it.
    """
    import torch

    length = min(round(work.tokens_per_row), _MOST_TRAINED)
    rows = max(1, min(work.micro_batch_size, _MOST_TRAINED // length))
    ids = (torch.arange(rows * length, device=device) % facts.vocabulary).view(rows, length)

    def step() -> None:
        model.model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        model.model.zero_grad()

    plain = Workload(sequence_len=length, diffusion_fraction=0.0, gradient_checkpointing=False)
    number = next(model.model.parameters()).element_size()
    reached = rows * row_flops(facts, plain) / _seconds(step, device, repeats=2) / machine.flops(number)
    return min(1.0, reached)


def fit(samples: Sequence[Sample], machine: Machine, weight_bytes: float) -> Calibration:
    """The calibration whose predictions have the least relative squared errors, no coefficient below zero."""
    import torch

    rows = torch.tensor([_features(sample, machine, weight_bytes) for sample in samples], dtype=torch.float64)
    seconds = torch.tensor([sample.seconds for sample in samples], dtype=torch.float64)
    relative = rows / seconds[:, None]
    scale = relative.abs().amax(dim=0).clamp_min(1e-30)
    kept = [place for place in range(rows.shape[1]) if relative[:, place].any()]
    while True:  # the ones below zero leave, the worst one first
        solved = torch.linalg.lstsq(relative[:, kept] / scale[kept], torch.ones(len(samples), dtype=torch.float64))
        found = solved.solution
        if not kept or float(found.min()) >= 0:
            break
        kept.pop(int(found.argmin()))
    values = [0.0] * rows.shape[1]
    for place, value in zip(kept, found.tolist(), strict=True):
        values[place] = value / float(scale[place])
    return Calibration(*values)


def predicted_seconds(facts: ModelFacts, calibrated: Calibrated, tokens: float, weight_bytes: float) -> float:
    """What a step of so many tokens takes, at batch 1 after calibration's context."""
    device = Device(calibrated.machine, 1, weight_bytes, weight_bytes, calibration=calibrated.calibration)
    logits = 1 if tokens == 1 else 32
    return forward(facts, device, 1, CONTEXT, tokens, causal=min(16, tokens), logits=logits).seconds


def shallow_config(config: dict[str, Any], depth: int) -> dict[str, Any]:
    """The same model with so few layers, all of them with experts where it has any."""
    shallow = copy.deepcopy(config)
    for key in ("num_hidden_layers", "num_layers", "n_layers"):
        if key in shallow:
            shallow[key] = depth
    for key in ("layer_types", "mlp_layer_types", "no_rope_layers"):
        if isinstance(shallow.get(key), list):
            kinds = [each for each in shallow[key] if each != "dense"] or shallow[key]
            shallow[key] = (kinds * depth)[:depth]
    for key in ("first_k_dense_replace", "num_dense_layers"):
        if key in shallow:
            shallow[key] = 0
    for key in ("moe_layers", "mlp_only_layers"):
        if isinstance(shallow.get(key), list):
            shallow[key] = [] if key == "mlp_only_layers" else list(range(depth))
    shallow.pop("tidar", None)
    return shallow


def _features(sample: Sample, machine: Machine, weight_bytes: float) -> tuple[float, ...]:
    """What the coefficients of `Calibration` multiply, for one step."""
    device = Device(machine, 1, weight_bytes, weight_bytes, calibration=Calibration(0, 0, 0, 0, 1))
    logits = 1 if sample.tokens == 1 else 32
    step = forward(sample.facts, device, 1, CONTEXT, sample.tokens, causal=min(16, sample.tokens), logits=logits)
    facts = sample.facts
    return (
        1.0,
        float(facts.layers),
        facts.moe_layers * sample.touched,
        float(facts.layers * sample.tokens),
        step.seconds,
    )


def _model_of(config: dict[str, Any], device: str, dtype: str) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from zconvert.tidar.generate import layout_model_of

    own = {key: value for key, value in config.items() if key not in ("model_type", "architectures", "auto_map")}
    try:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(str(config.get("model_type")), **own))
    except (ValueError, RuntimeError) as error:
        raise UserError(
            "a small model of this family cannot be made here", found=str(error)[:300], fix="plan without --calibrate"
        ) from error
    _route_evenly(model)
    return layout_model_of(model.to(device, getattr(torch, dtype)).eval())


def _route_evenly(model: Any) -> None:
    """Sends tokens to experts in turn: a fresh model's router would send them all to the same few."""
    import torch

    def spread(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        def even(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.is_floating_point():
                return value
            return torch.arange(value.numel(), device=value.device).view(value.shape) % int(module.num_experts)

        return tuple(map(even, args)), {name: even(value) for name, value in kwargs.items()}

    for name, module in model.named_modules():
        if name.endswith("experts") and hasattr(module, "num_experts"):
            module.register_forward_pre_hook(spread, with_kwargs=True)


def _steps(model: Any, block_size: int, proposals: tuple[int, ...]) -> list[float]:
    """Seconds of some decoding steps, after the prefill and the first one."""
    from zconvert.tidar.acceptance import Sampling
    from zconvert.tidar.decoding import DecodePlan
    from zconvert.tidar.engine import decode

    vocabulary = int(model.config.vocab_size)
    mask = vocabulary - 1
    if block_size == 1:
        plan = DecodePlan.autoregressive(mask, Sampling(0.0), frozenset())
    else:
        settings = TidarSettings(block_size=block_size, mask_token_id=mask)
        plan = DecodePlan.tidar(settings, Sampling(0.0), frozenset(), proposals=proposals)
    prompt = [(7 * place) % max(2, vocabulary - 1) for place in range(CONTEXT)]
    wanted = block_size + block_size * len(proposals)
    took: list[float] = []
    started = time.perf_counter()
    # Every step ends in numbers on the CPU: the clock needs no synchronisation on a GPU.
    for number, step in enumerate(decode(model, prompt, plan, 4 * block_size * _STEPS)):
        now = time.perf_counter()
        if number > 1 and step.tokens_in_forward == wanted:
            took.append(now - started)
        started = now
        if len(took) == _STEPS:
            break
    return took


def _seconds(work: Callable[[], Any], device: str, repeats: int = 7) -> float:
    """The least time of a piece of work, over some repeats."""
    import torch

    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize()

    work()
    best = float("inf")
    for _ in range(repeats):
        wait()
        count, started = 0, time.perf_counter()
        while count < 3 or (time.perf_counter() - started < 0.01 and count < 2000):
            work()
            count += 1
        wait()
        best = min(best, (time.perf_counter() - started) / count)
    return best


def _typical(took: list[float]) -> float:
    return sorted(took)[len(took) // 10]


def _ram_bytes() -> float:
    try:
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (ValueError, OSError, AttributeError):
        return 16e9


def errors(facts: ModelFacts, calibrated: Calibrated, weight_bytes: float) -> list[dict[str, float]]:
    """Prediction beside measurement for each step of the whole model that was timed along."""
    return [
        _error(sample.tokens, predicted_seconds(facts, calibrated, sample.tokens, weight_bytes), sample.seconds)
        for sample in sorted(calibrated.checks, key=lambda each: each.tokens)
    ]


def against_bench(facts: ModelFacts, calibrated: Calibrated, bench: dict[str, Any]) -> list[dict[str, Any]]:
    """`bench --json` laid over the prediction: milliseconds a forward, and the speedup, of each sampler.

    Args:
        facts: of the model that bench ran.
        calibrated: of the device that it ran on.
        bench: its document.

    Raises:
        UserError: it is no document of bench.
    """
    weight_bytes = 4 if bench.get("dtype") == "float32" else 2
    try:
        # One sequence at a time by one forward a step: what calibration times.
        results = [e for e in bench["results"] if e["mode"] in ("ar", "single") and e["batch_size"] == 1]
        ar = predicted_seconds(facts, calibrated, 1, weight_bytes)
        rows = []
        for entry in results:
            seconds = predicted_seconds(facts, calibrated, entry["tokens_in_forward"], weight_bytes)
            row = {"sampler": entry["name"], **_error(entry["tokens_in_forward"], seconds, entry["forward_ms"] / 1e3)}
            if "forward_cost" in entry:
                row["predicted_speedup"] = entry["tokens_per_forward"] * ar / seconds
                row["measured_speedup"] = entry["tokens_per_forward"] / entry["forward_cost"]
                row["speedup_error"] = row["predicted_speedup"] / row["measured_speedup"] - 1
            rows.append(row)
        return rows
    except (KeyError, TypeError, AttributeError, ArithmeticError, ValueError) as error:
        raise UserError(
            "this is no document of `zconvert bench --json`",
            found=f"nothing under {error}",
            fix="zconvert bench CHECKPOINT --json > bench.json",
        ) from None


def _error(tokens: float, predicted: float, measured: float) -> dict[str, float]:
    return {
        "tokens": tokens,
        "predicted_ms": 1e3 * predicted,
        "measured_ms": 1e3 * measured,
        "error": predicted / measured - 1,
    }
