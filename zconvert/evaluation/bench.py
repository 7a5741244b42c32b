"""Decoding speed by sampler, in one run on the same prompts: plain AR, lossless, and mixed by each weight."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.engine import decode
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings

WARM_UP_TOKENS = 32

Progress = Callable[[int, int], None]
"""told after each prompt: prompts done, prompts in all"""


@dataclass
class _Tally:
    """What one sampler did over all prompts so far. `forwards` and all else but `seconds` leave the prefill out."""

    texts: list[tuple[int, ...]] = field(default_factory=list)
    seconds: float = 0.0
    """prefill included"""
    decode_seconds: float = 0.0
    forwards: int = 0
    tokens_in_forwards: int = 0
    accepted: Counter[int] = field(default_factory=Counter)

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


def bench(
    model: LayoutModel,
    prompts: Sequence[list[int]],
    settings: TidarSettings,
    *,
    eos_token_ids: frozenset[int] = frozenset(),
    max_new_tokens: int = 128,
    mix_weights: Sequence[float] = (0.5,),
    temperature: float = 0.0,
    proposals: tuple[int, ...] | None = None,
    block_size: int | None = None,
    seed: int = 0,
    baseline: LayoutModel | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Decodes every prompt with every sampler, one sequence at a time, and compares them.

    The samplers take turns prompt by prompt, so that whatever else the machine does hits all of them alike. Each one
    first decodes a little untimed.

    Args:
        model: of a converted checkpoint.
        prompts: token ids, each at least one.
        settings: the checkpoint's.
        eos_token_ids: tokens that end a text.
        max_new_tokens: at most so many tokens for a prompt.
        mix_weights: one mixed sampler for each.
        temperature: 0 is greedy, the only case in which texts can be compared.
        proposals: accepted counts that get a block of mask slots; None: the checkpoint's.
        block_size: tokens a forward can yield at most; None: the checkpoint's.
        seed: of the random numbers; every sampler draws from the same stream at each prompt.
        baseline: another model, the source say, to decode by plain AR and to compare texts with.
        on_progress: told after each prompt.

    Returns:
        A JSON document; one entry for each sampler under `results`: `ar`, `lossless`, `mixed` (the first weight) and
        `mixed:<w>` (the others), and `baseline`. `forwards` counts decoding forwards, without the prefills; the first
        token of a text comes from its prefill, so tokens per forward leave it out. `seconds` and tokens per second
        include prefills.

    Raises:
        ValueError: no prompts, or a setting out of range.
    """
    if not prompts:
        raise ValueError("there are no prompts")
    plans = {"ar": DecodePlan.autoregressive(settings.mask_token_id, Sampling(temperature), eos_token_ids)}
    weights = {"lossless": 1.0, **mixed_names(mix_weights)}
    for name, weight in weights.items():
        sampling = Sampling(temperature, mix_weight=weight)
        plans[name] = DecodePlan.tidar(settings, sampling, eos_token_ids, proposals=proposals, block_size=block_size)
    models = dict.fromkeys(plans, model)
    if baseline is not None:
        models["baseline"], plans["baseline"] = baseline, plans["ar"]
    for name, plan in plans.items():
        _run(models[name], prompts[0], plan, min(max_new_tokens, WARM_UP_TOKENS), seed, _Tally())
    tallies = {name: _Tally() for name in plans}
    for number, prompt in enumerate(prompts):
        for name, plan in plans.items():
            _run(models[name], prompt, plan, max_new_tokens, seed + number, tallies[name])
        if on_progress is not None:
            on_progress(number + 1, len(prompts))
    results = {"ar": _speed(tallies["ar"])}
    for name, weight in weights.items():
        extra = {} if name == "lossless" else {"mix_weight": weight}
        results[name] = {**extra, **_against(tallies[name], tallies["ar"], plans[name], greedy=temperature == 0)}
    if baseline is not None:
        for name, entry in results.items():
            entry["identical_to_baseline"] = _identical(tallies[name], tallies["baseline"], temperature == 0)
        results["baseline"] = _speed(tallies["baseline"])
    return {
        "prompts": len(prompts),
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "seed": seed,
        "batch_size": 1,
        "mode": settings.mode,
        "block_size": plans["lossless"].block_size,
        "proposals": list(plans["lossless"].proposals),
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "results": results,
    }


def mixed_names(weights: Sequence[float]) -> dict[str, float]:
    """Names the mixed samplers in `results`; a repeated weight is one sampler.

    >>> mixed_names([0.5, 0.3, 0.5])
    {'mixed': 0.5, 'mixed:0.3': 0.3}
    """
    unique = list(dict.fromkeys(weights))
    return {"mixed" if i == 0 else f"mixed:{weight:g}": weight for i, weight in enumerate(unique)}


def _run(
    model: LayoutModel, prompt: list[int], plan: DecodePlan, max_new_tokens: int, seed: int, tally: _Tally
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = []
    # Every step ends in numbers on the CPU, so these clocks need no further synchronisation on a GPU.
    started = prefilled = time.perf_counter()
    for step in decode(model, prompt, plan, max_new_tokens, generator):
        if not tokens:
            prefilled = time.perf_counter()
        else:
            tally.forwards += 1
            tally.tokens_in_forwards += step.tokens_in_forward
            tally.accepted[step.accepted] += 1
        tokens += step.tokens
    ended = time.perf_counter()
    tally.seconds += ended - started
    tally.decode_seconds += ended - prefilled
    tally.texts.append(tuple(tokens))


def _speed(tally: _Tally) -> dict[str, Any]:
    forwards = max(tally.forwards, 1)  # none at all where every text ended with its first token
    return {
        "tokens_per_forward": (tally.tokens - len(tally.texts)) / forwards,
        "tokens_per_second": tally.tokens / tally.seconds,
        "tokens": tally.tokens,
        "forwards": tally.forwards,
        "seconds": tally.seconds,
        "tokens_in_forward": tally.tokens_in_forwards / forwards,
        "forward_ms": 1000 * tally.decode_seconds / forwards,
    }


def _identical(tally: _Tally, other: _Tally, greedy: bool) -> int | None:
    return sum(a == b for a, b in zip(tally.texts, other.texts, strict=True)) if greedy else None


def _against(tally: _Tally, ar: _Tally, plan: DecodePlan, *, greedy: bool) -> dict[str, Any]:
    own, base = _speed(tally), _speed(ar)
    return {
        **own,
        "speedup": own["tokens_per_second"] / base["tokens_per_second"],
        "forward_cost": own["forward_ms"] / base["forward_ms"] if base["forward_ms"] else 0.0,
        "identical_prompts": _identical(tally, ar, greedy),
        "accepted_histogram": {str(n): tally.accepted[n] for n in range(1, plan.block_size + 1)},
    }
