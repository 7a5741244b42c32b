"""Decoding speed, all on the same prompts in one run: plain AR, drafts of every kind, and what transformers offers.

Points (a way of decoding at a batch size and lengths) take turns, a few prompts each, so that whatever else the machine
does hits all of them alike. Two baselines: plain AR through our own cache, and `generate` of stock transformers. Rivals
are what a user could pick without converting: prompt lookup and assisted decoding.
"""

from __future__ import annotations

import resource
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from zconvert.evaluation.stock import StockDecoder
from zconvert.serving.compiled import compiled_engine
from zconvert.serving.timing import Known
from zconvert.serving.tuning import AutoPlan
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Engine
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings

WARM_UP_TOKENS = 32
MODES = ("single", "two", "auto")

Progress = Callable[[int, int], None]
"""told after each turn of all points: prompts done, prompts in all"""


@dataclass(frozen=True)
class Point:
    """A way of decoding."""

    mode: str
    """ar, single, two, auto; stock, prompt_lookup, assisted (by transformers); baseline (another model's AR)"""
    sampler: str
    """ar, lossless, mixed"""
    batch_size: int
    max_new_tokens: int
    prompt_tokens: int | None = None
    """prompts are cut to, or filled up to, so many; None: as they are"""
    proposals: tuple[int, ...] | None = None
    """None: the checkpoint's"""
    block_size: int | None = None
    mix_weight: float | None = None

    @property
    def place(self) -> tuple[int, int, int | None]:
        """Points of one place are compared."""
        return self.batch_size, self.max_new_tokens, self.prompt_tokens

    @property
    def name(self) -> str:
        """For people."""
        if self.mode in ("ar", "stock", "prompt_lookup", "assisted", "baseline"):
            return {"ar": "AR", "stock": "stock generate"}.get(self.mode, self.mode.replace("_", " "))
        sampler = "lossless" if self.mix_weight is None else f"mixed {self.mix_weight:g}"
        how = {"single": "", "two": ", two forwards", "auto": ", auto"}[self.mode]
        return f"{sampler}{how}" + (f" {','.join(map(str, self.proposals))}" if self.proposals else "")


@dataclass
class _Tally:
    """What one point did over all prompts so far. `forwards` and all else but `seconds` leave the prefill out."""

    texts: list[tuple[int, ...]] = field(default_factory=list)
    seconds: float = 0.0
    """prefill included"""
    forwards: int = 0
    """of each text, added up: a forward over eight texts is eight"""
    accepted: Counter[int] = field(default_factory=Counter)
    by_tokens: dict[int, list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    """tokens of a forward, all rows together -> how many such forwards, seconds of all of them"""
    memory_mb: float = 0.0
    failed: str | None = None

    @property
    def tokens(self) -> int:
        return sum(map(len, self.texts))


Decoder = Callable[[Sequence[list[int]], int, int, _Tally], None]
"""decodes prompts: their ids, new tokens at most, the first one's seed, where it is counted"""


def points(
    *,
    batch_sizes: Sequence[int] = (1,),
    max_new_tokens: Sequence[int] = (128,),
    prompt_tokens: Sequence[int | None] = (None,),
    modes: Sequence[str] = ("single",),
    mix_weights: Sequence[float] = (0.5,),
    proposals: Sequence[tuple[int, ...] | None] = (None,),
    block_size: int | None = None,
    rivals: Sequence[str] = ("stock",),
    baseline: bool = False,
) -> list[Point]:
    """Every point of some settings, AR first in each place.

    Prompt lookup and assisted decoding take one text at a time, so that they stand at batch size 1 alone.

    Raises:
        ValueError: an unknown mode.
    """
    if unknown := set(modes) - set(MODES):
        raise ValueError(f"mode is {sorted(unknown)[0]!r}, expected one of {', '.join(MODES)}")
    found = []
    places = [(b, n, p) for b in batch_sizes for n in max_new_tokens for p in prompt_tokens]
    for batch_size, length, prompt in dict.fromkeys(places):
        own = Point("ar", "ar", batch_size, length, prompt)
        found += [own, *[replace(own, mode=rival) for rival in rivals if rival == "stock" or batch_size == 1]]
        if baseline:
            found.append(replace(own, mode="baseline"))
        for mode in dict.fromkeys(modes):
            for counts in proposals if mode == "single" else (None,):
                way = replace(own, mode=mode, sampler="lossless", proposals=counts, block_size=block_size)
                found += [way, *[replace(way, sampler="mixed", mix_weight=w) for w in dict.fromkeys(mix_weights)]]
    return found


def bench(
    model: LayoutModel,
    prompts: Sequence[list[int]],
    settings: TidarSettings,
    wanted: Sequence[Point],
    *,
    eos_token_ids: frozenset[int] = frozenset(),
    temperature: float = 0.0,
    seed: int = 0,
    known: Known | None = None,
    baseline: LayoutModel | None = None,
    assistant: Any = None,
    compiled: str | None = None,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Decodes every prompt in every way, and compares them. Each way first decodes a little untimed.

    Args:
        model: of a converted checkpoint.
        prompts: token ids, each at least one.
        settings: the checkpoint's.
        wanted: see `points`.
        eos_token_ids: tokens that end a text.
        temperature: 0 is greedy, the only case in which texts can be compared.
        seed: of the random numbers; every point draws from the same stream at each prompt.
        known: of decoding the checkpoint here, for `auto`.
        baseline: another model, the source say, to decode by plain AR and to compare texts with.
        assistant: a model of transformers that drafts for assisted decoding.
        compiled: mode of torch.compile for all that our own engine does; None: nothing is compiled.
        on_progress: told after each turn.

    Returns:
        A JSON document; under `results` one entry for each point, in order. `forwards` counts decoding forwards,
        without the prefills; the first token of a text comes from its prefill, so tokens per forward leave it out.
        `seconds` and tokens per second include prefills. `speedup` is against AR, `speedup_over_stock` against stock
        transformers, in the same place. A rival that does not work for this model has `unavailable`, the reason, in
        place of numbers.

    Raises:
        ValueError: no prompts, or a setting out of range.
    """
    if not prompts:
        raise ValueError("there are no prompts")
    decoders = {
        point: _decoder(point, model, settings, eos_token_ids, temperature, known, baseline, assistant, compiled)
        for point in wanted
    }
    tallies = {point: _Tally() for point in wanted}
    for point, decode in decoders.items():
        warm = _fitted(prompts[: point.batch_size], point.prompt_tokens)
        _turn(decode, warm, min(point.max_new_tokens, WARM_UP_TOKENS), seed, scratch := _Tally())
        tallies[point].failed = scratch.failed
    largest = max(point.batch_size for point in wanted)
    turn = 4 if largest == 1 else 4 * largest  # prompts: enough for a batch to be full most of the time
    for start in range(0, len(prompts), turn):
        for point, decode in decoders.items():
            if tallies[point].failed is None:
                chosen = _fitted(prompts[start : start + turn], point.prompt_tokens)
                _turn(decode, chosen, point.max_new_tokens, seed + start, tallies[point])
        if on_progress is not None:
            on_progress(min(start + turn, len(prompts)), len(prompts))
    return {
        "prompts": len(prompts),
        "temperature": temperature,
        "seed": seed,
        "mode": settings.mode,
        "block_size": wanted[-1].block_size or settings.block_size,
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "device": str(model.device),
        "threads": torch.get_num_threads(),
        "compiled": compiled,
        "results": [_entry(point, tallies, greedy=temperature == 0, settings=settings) for point in wanted],
    }


def entry_of(document: dict[str, Any], **fields: Any) -> dict[str, Any] | None:
    """The first entry of a bench document whose fields are these.

    >>> entry_of({"results": [{"mode": "ar"}, {"mode": "two", "speedup": 2}]}, mode="two")["speedup"]
    2
    """
    matching = (e for e in document["results"] if all(e.get(key) == value for key, value in fields.items()))
    return next(matching, None)


def _decoder(
    point: Point,
    model: LayoutModel,
    settings: TidarSettings,
    eos: frozenset[int],
    temperature: float,
    known: Known | None,
    baseline: LayoutModel | None,
    assistant: Any,
    compiled: str | None,
) -> Decoder:
    if point.mode in ("stock", "prompt_lookup", "assisted"):
        stock = StockDecoder(model.model, point.mode, eos, settings.mask_token_id, temperature, assistant)
        return lambda prompts, length, seed, tally: _by_stock(stock, point, prompts, length, seed, tally)
    sampling = Sampling(temperature, mix_weight=1.0 if point.mix_weight is None else point.mix_weight)
    if point.mode in ("ar", "baseline"):
        plan = DecodePlan.autoregressive(settings.mask_token_id, sampling, eos)
    else:
        two, size = point.mode == "two", point.block_size
        plan = DecodePlan.tidar(settings, sampling, eos, proposals=point.proposals, block_size=size, two_forwards=two)
    if point.mode == "baseline":
        assert baseline is not None
        model = baseline
    if compiled is not None:
        engine = compiled_engine(model, plan, point.batch_size, compiled)
    else:
        engine = Engine(model, plan, max_batch=point.batch_size)
    if point.mode == "auto":
        assert known is not None
        engine.replan = AutoPlan(known, settings)
    return lambda prompts, length, seed, tally: _by_engine(engine, prompts, length, seed, tally)


def _turn(decode: Decoder, prompts: Sequence[list[int]], length: int, seed: int, tally: _Tally) -> None:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    decode(prompts, length, seed, tally)
    peak = torch.cuda.max_memory_allocated() if cuda else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    tally.memory_mb = max(tally.memory_mb, peak / 2**20)


def _by_engine(engine: Engine, prompts: Sequence[list[int]], length: int, seed: int, tally: _Tally) -> None:
    # Every step ends in numbers on the CPU, so these clocks need no further synchronisation on a GPU.
    started = before = time.perf_counter()
    results = [engine.add(Request(prompt, length, seed=seed + i)) for i, prompt in enumerate(prompts)]
    while not engine.idle:
        prefills = engine.counters.prefills
        events = engine.step()
        now = time.perf_counter()
        if events and engine.counters.prefills == prefills:
            kind = tally.by_tokens[sum(step.tokens_in_forward for _, step in events)]
            kind[0] += 1
            kind[1] += now - before
        before = now
    tally.seconds += before - started
    for result in results:
        tally.texts.append(tuple(result.tokens))
        tally.forwards += result.forwards
        tally.accepted.update(result.accepted)


def _by_stock(
    stock: StockDecoder, point: Point, prompts: Sequence[list[int]], length: int, seed: int, tally: _Tally
) -> None:
    for start in range(0, len(prompts), point.batch_size):
        torch.manual_seed(seed + start)
        started = time.perf_counter()
        try:
            texts = stock.generate(prompts[start : start + point.batch_size], length)
        except Exception as error:  # whatever a model's own code does not like about this way of decoding
            tally.failed = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:200]
            return
        tally.seconds += time.perf_counter() - started
        tally.texts += map(tuple, texts)


def _fitted(prompts: Sequence[list[int]], tokens: int | None) -> list[list[int]]:
    """Prompts of so many tokens: the last ones of long prompts, short ones repeated."""
    if tokens is None:
        return list(prompts)
    return [(prompt * -(-tokens // len(prompt)))[-tokens:] for prompt in prompts]


def _entry(point: Point, tallies: dict[Point, _Tally], *, greedy: bool, settings: TidarSettings) -> dict[str, Any]:
    tally = tallies[point]
    ours = point.mode not in ("stock", "prompt_lookup", "assisted")
    head: dict[str, Any] = {
        "name": point.name,
        "mode": point.mode,
        "sampler": point.sampler,
        "batch_size": point.batch_size,
        "max_new_tokens": point.max_new_tokens,
        "prompt_tokens": point.prompt_tokens,
    }
    if point.mode == "single":
        size = point.block_size or settings.block_size
        head["proposals"] = list(point.proposals or [k for k in settings.default_proposals() if k <= size])
    if point.mix_weight is not None:
        head["mix_weight"] = point.mix_weight
    if tally.failed is not None:
        return {**head, "unavailable": tally.failed}
    rate = tally.tokens / tally.seconds
    entry = {**head, "tokens_per_second": rate, "tokens": tally.tokens, "seconds": tally.seconds}
    entry["memory_mb"] = tally.memory_mb

    def other(mode: str) -> _Tally | None:
        found = (t for p, t in tallies.items() if p.mode == mode and p.place == point.place and t.failed is None)
        return next(found, None)

    for name, key in (("ar", "speedup"), ("stock", "speedup_over_stock")):
        if (base := other(name)) is not None and base.tokens:
            entry[key] = rate / (base.tokens / base.seconds)
    for name, key in (("ar", "identical_prompts"), ("baseline", "identical_to_baseline")):
        if greedy and (base := other(name)) is not None and name != point.mode:
            entry[key] = sum(a == b for a, b in zip(tally.texts, base.texts, strict=True))
    if not ours:
        return entry
    pure = [(n, count, seconds) for n, (count, seconds) in sorted(tally.by_tokens.items())]
    forwards, seconds = sum(count for _, count, _ in pure), sum(s for _, _, s in pure)
    entry |= {
        # None at all where every text ended with its first token.
        "tokens_per_forward": (tally.tokens - len(tally.texts)) / max(tally.forwards, 1),
        "forwards": tally.forwards,
        "tokens_in_forward": sum(n * count for n, count, _ in pure) / max(forwards, 1),
        "forward_ms": 1000 * seconds / max(forwards, 1),
        "forward_ms_by_tokens": {str(n): 1000 * s / count for n, count, s in pure},
    }
    if point.mode not in ("ar", "baseline"):
        ar = other("ar")
        own = sum(s for _, s in ar.by_tokens.values()) / max(sum(n for n, _ in ar.by_tokens.values()), 1) if ar else 0
        entry["forward_cost"] = entry["forward_ms"] / (1000 * own) if own else 0.0
        size = point.block_size or settings.block_size
        entry["accepted_histogram"] = {str(n): tally.accepted[n] for n in range(1, size + 1)}
    return entry
