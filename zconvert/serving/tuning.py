"""Which way of decoding is fastest on this machine: forwards are timed once, drafts are counted as they are verified.

The time of a forward depends on its rows and tokens alone; what it yields on how often each slot of a block is right.
Times are measured (`measure`) and kept beside the checkpoint; rates come from the engine's counters while it runs. Both
together give the tokens per second of every plan (`best_plan`), and an `AutoPlan` takes the best one anew from time to
time, as the text and the number of rows change.
"""

from __future__ import annotations

import json
import platform
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import transformers

from zconvert import __version__
from zconvert.planning.acceptance import best_sets, two_forwards
from zconvert.tidar.cache import TidarCache
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.engine import Engine
from zconvert.tidar.layout import decode_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings

FILE = "tuning.json"
CONTEXT = 256  # tokens in the cache of the forwards that are timed
_REPEATS = 5
_TRUST = 24  # drafts of a slot that what is assumed of it weighs as much as
_FADE = 0.95  # what counts keep of their weight at each look
_EVERY = 12  # forwards between two looks at the counts
_SELDOM = 1024  # forwards between two plans at most
_MOVED = 0.2  # a change of what forwards yield that asks for a plan at once
_MOST = 6  # proposals in a set: more of them have never paid

OnProgress = Callable[[int, int], None]
"""told after each round: rounds done, rounds in all"""


@dataclass(frozen=True)
class Times:
    """Seconds of a forward by rows and tokens a row; between what was measured, straight lines."""

    machine: str
    """what it was measured on, and with which versions: times of anything else are of no use"""
    seconds: dict[int, dict[int, float]]
    """rows -> tokens -> seconds"""

    def of(self, rows: int, tokens: float) -> float:
        """Seconds of a forward of `rows` rows of `tokens` tokens each."""
        sizes = sorted(self.seconds)
        return _between(sizes, [_between(*_columns(self.seconds[size]), tokens) for size in sizes], rows)


def measure(
    model: LayoutModel,
    settings: TidarSettings,
    max_batch: int,
    *,
    repeats: int = _REPEATS,
    on_progress: OnProgress | None = None,
) -> Times:
    """Times forwards of 1 to `max_batch` rows and 1 to B + B² tokens, all in turn, so that noise hits all alike.

    Args:
        model: of the checkpoint.
        settings: its settings.
        max_batch: most rows; powers of two up to it are timed.
        repeats: rounds; the least time counts, as other work only ever adds.
        on_progress: told after each round.
    """
    size = settings.block_size
    # A causal part and a number of blocks: (1, 0) is plain decoding; all else verifies and drafts.
    shapes = [(1, 0), (size, 0), (1, 1), *[(size, count) for count in _counts(size)]]
    batches = [rows for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rows < max_batch] + [max_batch]
    best: dict[int, dict[int, float]] = {rows: {} for rows in batches}
    for done in range(repeats + 1):
        for rows in batches:
            cache = TidarCache(rows)
            _forward(model, settings, cache, (CONTEXT, 0))
            cache.commit(CONTEXT)
            for causal, blocks in shapes:
                started = time.perf_counter()
                _forward(model, settings, cache, (causal, blocks))
                if done:  # the first round warms up
                    took, tokens = time.perf_counter() - started, causal + size * blocks
                    best[rows][tokens] = min(took, best[rows].get(tokens, took))
        if on_progress is not None:
            on_progress(done + 1, repeats + 1)
    return Times(machine_of(model), best)


@torch.inference_mode()
def _forward(model: LayoutModel, settings: TidarSettings, cache: TidarCache, shape: tuple[int, int]) -> None:
    """A forward as the engine does it, with the logits of its drafts and of a block; ends on the CPU."""
    causal, blocks = shape
    lengths = cache.lengths
    layout = decode_layout(lengths, causal, tuple(range(1, blocks + 1)), settings.block_size, model.device)
    ids = torch.arange(layout.num_tokens, device=model.device) % max(1, settings.mask_token_id)
    hidden = model.hidden_states(ids.expand(len(lengths), -1), layout, cache)
    used = 1 if causal == CONTEXT else causal + (settings.block_size - 1 if blocks else 0)
    model.logits(hidden[:, :used]).argmax(-1).tolist()


def times_of(
    model: LayoutModel,
    settings: TidarSettings,
    max_batch: int,
    folder: Path | None,
    *,
    on_progress: OnProgress | None = None,
) -> Times:
    """Times from the checkpoint's folder, or measured now and left there.

    Args:
        model: of the checkpoint.
        settings: its settings.
        max_batch: most rows.
        folder: of the checkpoint; None, or a folder that cannot be written: they are measured each time.
        on_progress: of the measurement.
    """
    file = None if folder is None else folder / FILE
    kept: dict[str, dict[str, dict[str, float]]] = {}
    if file is not None and file.exists():
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            table = kept.get(machine_of(model), {})
            times = {int(rows): {int(n): float(s) for n, s in row.items()} for rows, row in table.items()}
            if times and max(times) >= max_batch:
                return Times(machine_of(model), times)
        except (OSError, ValueError, AttributeError, TypeError):
            kept = {}  # not ours, or broken: measured again
    measured = measure(model, settings, max_batch, on_progress=on_progress)
    if file is not None:
        document = {**kept, measured.machine: measured.seconds}
        partial = file.with_name(f".{FILE}.partial")
        try:
            partial.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
            partial.replace(file)
        except OSError:
            partial.unlink(missing_ok=True)  # somebody else's folder: then they are measured each time
    return measured


def machine_of(model: LayoutModel) -> str:
    """The device, and whatever else decides what a forward takes."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    dtype = str(model.model.dtype).removeprefix("torch.")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, zconvert {__version__}"
    return f"{device.type} {name}, {torch.get_num_threads()} threads, {dtype}, {versions}"


def slot_rates(
    verified: Mapping[tuple[int, int, int], float], block_size: int, assumed: float = 0.7
) -> tuple[float, ...]:
    """How often the draft of each slot is right where those before it were; slot 0 is the anchor.

    Args:
        verified: how often drafts went how, see `Counters`.
        block_size: B.
        assumed: the rate of slots that nothing is known of.

    >>> [round(rate, 3) for rate in slot_rates({(1, 2, 2): 100_000}, 3)]
    [1.0, 1.0, 0.0]
    """
    right, tried = [0.0] * (block_size + 1), [0.0] * (block_size + 1)
    for (first, drafts, accepted), count in verified.items():
        for place in range(min(drafts, accepted)):
            slot = min(first + place, block_size)
            tried[slot] += count
            right[slot] += count if place < accepted - 1 else 0
    rates = [1.0]
    for slot in range(1, block_size):
        before = assumed if slot == 1 else rates[-1]  # what is seldom reached is as good as the slot before it
        rates.append((right[slot] + _TRUST * before) / (tried[slot] + _TRUST))
    return tuple(rates)


def rates_of_histogram(histogram: Mapping[str, int], block_size: int) -> tuple[float, ...]:
    """The same from how often how many tokens were accepted (`bench --json`), as if every block had been whole."""
    return slot_rates({(1, block_size - 1, int(n)): count for n, count in histogram.items()}, block_size)


@dataclass(frozen=True)
class Option:
    """A plan and what it yields, whatever the machine."""

    mode: str
    """ar, single or two"""
    block_size: int
    proposals: tuple[int, ...]
    tokens_per_forward: float
    tokens: tuple[float, ...]
    """in each of the forwards that take turns"""


@dataclass(frozen=True)
class Choice:
    """A plan and what it gives on a machine."""

    option: Option
    seconds: float
    """of a forward"""
    tokens_per_second: float
    """of all rows together"""


def options(rates: tuple[float, ...]) -> list[Option]:
    """Every plan worth a thought.

    Args:
        rates: of the slots of a block.
    """
    found = [Option("ar", 1, (), 1.0, (1.0,))]
    for size in dict.fromkeys((len(rates), *(n for n in (2, 4, 6, 8, 12) if n < len(rates)))):
        cut = rates[:size]
        found += [
            Option("single", size, plan.proposals, plan.accepted, (plan.tokens,)) for plan in best_sets(cut, _MOST)
        ]
        found.append(Option("two", size, (1,), two_forwards(cut).accepted / 2, (1.0 + size, float(size))))
    return found


def choices(times: Times, worth: Sequence[Option], rows: int) -> list[Choice]:
    """Plans by their speed, the fastest first.

    Args:
        times: of forwards.
        worth: plans, see `options`.
        rows: texts in the batch.
    """
    found = []
    for option in worth:
        seconds = sum(times.of(rows, tokens) for tokens in option.tokens) / len(option.tokens)
        found.append(Choice(option, seconds, rows * option.tokens_per_forward / seconds))
    return sorted(found, key=lambda choice: -choice.tokens_per_second)


class AutoPlan:
    """Sets an engine's plan by what is fastest: `Engine(…, replan=AutoPlan(…))`.

    Greedy texts do not depend on it; sampled ones follow the same law, but a seed no longer repeats them.

    How often slots are right is reckoned anew ever more seldom, but soon when what forwards yield has moved. The number
    of rows counts at every change.
    """

    def __init__(self, times: Times, settings: TidarSettings) -> None:
        """Starts without knowledge of the text.

        Args:
            times: of forwards on this machine.
            settings: of the checkpoint.
        """
        self.times = times
        self.chosen: Choice | None = None
        self._settings = settings
        self._counts: dict[tuple[int, int, int], float] = {}
        self._taken: Counter[tuple[int, int, int]] = Counter()
        self._worth: list[Option] = []
        self._ranked: dict[int, list[Choice]] = {}
        self._look, self._due, self._wait = 0, 0, _EVERY
        self._yields, self._planned_for = 1.0, 1.0  # tokens a drafting forward gave a text lately, and at the last plan

    @property
    def rates(self) -> tuple[float, ...]:
        """What is known of the slots now."""
        return slot_rates(self._counts, self._settings.block_size)

    def ranked(self, rows: int) -> list[Choice]:
        """The plans by their speed for so many texts at once, the fastest first."""
        if rows not in self._ranked:
            self._ranked[rows] = choices(self.times, self._worth or options(self.rates), rows)
        return self._ranked[rows]

    def __call__(self, engine: Engine) -> None:
        """Sets the plan, if another has become the fastest."""
        forwards = engine.counters.forwards
        if forwards >= self._look:
            self._look = forwards + _EVERY
            drafted = self._take_in(engine.counters.verified)
            if forwards >= self._due or abs(self._yields / self._planned_for - 1) > _MOVED:
                self._worth, self._ranked = options(self.rates), {}
                self._wait = min(2 * self._wait, _SELDOM)
                self._due, self._planned_for = forwards + self._wait, self._yields
                if forwards and not drafted:
                    # Plain decoding teaches nothing of drafts: they get another chance until the next look.
                    self._worth = [option for option in self._worth if option.mode != "ar"]
                    self._due = self._look
        best = self.ranked(engine.running)[0]
        if self.chosen is None or best.option != self.chosen.option:
            engine.plan = plan_of_option(best.option, engine.plan, self._settings)
        self.chosen = best

    def _take_in(self, verified: Counter[tuple[int, int, int]]) -> bool:
        """Older counts fade as newer ones come; returns whether any did."""
        new = {key: count for key, count in (verified - self._taken).items() if key[1]}  # those with drafts
        self._taken = Counter(verified)
        if not new:
            return False
        self._counts = {key: _FADE * count for key, count in self._counts.items()}
        for key, count in new.items():
            self._counts[key] = self._counts.get(key, 0.0) + count
        weight = sum(self._counts.values())
        self._yields = sum(key[2] * count for key, count in self._counts.items()) / weight
        return True


def plan_of_option(option: Option, plan: DecodePlan, settings: TidarSettings) -> DecodePlan:
    """The plan of an option; how tokens are chosen and where texts end stays as in `plan`."""
    if option.mode == "ar":
        return replace(plan, block_size=1, proposals=(), two_forwards=False)
    return DecodePlan.tidar(
        settings,
        plan.sampling,
        plan.eos_token_ids,
        proposals=option.proposals,
        block_size=option.block_size,
        two_forwards=option.mode == "two",
    )


def _counts(size: int) -> list[int]:
    """Numbers of blocks that are timed: 1, 2, 3, 4, 6, 8, 12 … B."""
    return [count for count in (1, 2, 3, 4, 6, 8, 12) if count < size] + [size]


def _columns(row: dict[int, float]) -> tuple[list[int], list[float]]:
    ordered = sorted(row)
    return ordered, [row[key] for key in ordered]


def _between(places: Sequence[int], values: Sequence[float], at: float) -> float:
    """Straight lines between points, and beyond the last two."""
    if len(places) == 1:
        return values[0]
    right = min(max(bisect_left(places, at), 1), len(places) - 1)
    left = right - 1
    share = (at - places[left]) / (places[right] - places[left])
    return values[left] + share * (values[right] - values[left])
