"""Which way of decoding is fastest on this machine: forwards are timed once, drafts are counted as they are verified.

The time of a forward depends on its rows and tokens alone; what it yields on how often each slot of a block is right.
Times are measured once (timing.py); rates come from the engine's counters while it runs, and from going through other
plans' steps over texts that it made (hindsight.py). Both together give the tokens per second of every plan (`choices`),
and an `AutoPlan` takes the best one anew from time to time, as the text and the number of rows change.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from zconvert.planning.acceptance import two_forwards, yield_of
from zconvert.serving.hindsight import score
from zconvert.serving.timing import Known, Times
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.engine import Engine
from zconvert.tidar.settings import TidarSettings

_ASSUMED = 0.7  # the rate of slots that nothing is known of
_TRUST = 24  # drafts of a slot that what is assumed of it weighs as much as
_FADE = 0.95  # what counts keep of their weight at each look
_EVERY = 12  # forwards between two looks at the counts
_TRIED = 100  # a plan's forwards that weigh as much as what was foretold of it
_SELDOM = 1024  # forwards between two plans at most
_FIRST = 48  # forwards before texts are scored where few are known: a text costs about as much as ten forwards
_LATER = 300  # the same where enough are known
_SLOWLY = 0.1  # what one step's time counts for
_MOST = 3  # a step that took this much longer was held up by something else
_MOVED = 0.2  # a change of what forwards yield that asks for a plan at once
# Few sets, all of them regular: among all there are, some would look best by chance alone.
_SETS = ((1,), (1, 2), (1, 4), (1, 2, 4), (1, 3, 5), (1, 2, 4, 8), (1, 3, 5, 8), (1, 2, 3, 5, 8), (1, 2, 3, 4, 6, 8))
_ENOUGH = 4  # scored texts to begin with
_SCORED = 128  # tokens of a text, from its end, that are scored


def slot_rates(verified: Mapping[tuple[int, int, int], float], block_size: int) -> tuple[float, ...]:
    """How often the draft of each slot is right where those before it were; slot 0 is the anchor.

    Args:
        verified: how often drafts went how, see `Counters`.
        block_size: B.

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
        before = _ASSUMED if slot == 1 else rates[-1]  # what is seldom reached is as good as the slot before it
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
    """in each of the forwards that take turns, of one text"""

    @property
    def key(self) -> tuple[str, int, tuple[int, ...]]:
        """Which plan it is, whatever it yields."""
        return self.mode, self.block_size, self.proposals

    def width(self, rows: int) -> tuple[float, ...]:
        """The same in a batch, where all rows are as wide as the widest: the more of them, the nearer to the most."""
        if self.mode != "single":
            return self.tokens
        most = self.block_size * (1 + len(self.proposals))
        return tuple(most - (most - tokens) / rows for tokens in self.tokens)


@dataclass(frozen=True)
class Choice:
    """A plan and what it gives on a machine."""

    option: Option
    seconds: float
    """of a forward"""
    tokens_per_second: float
    """of all rows together"""


def options(rates: tuple[float, ...], known: Known | None = None) -> list[Option]:
    """Every plan worth a thought.

    Args:
        rates: of the slots of a block.
        known: has texts to go through each plan's steps on; what they say weighs as much as the forwards over them.
    """
    found = [Option("ar", 1, (), 1.0, (1.0,))]
    for size in dict.fromkeys((len(rates), *(n for n in (2, 4, 6, 8, 12) if n < len(rates)))):
        cut = rates[:size]
        for proposals in sorted({tuple(k for k in counts if k <= size) for counts in _SETS}):
            plan = yield_of(cut, proposals)
            accepted, tokens = _weighed(plan.accepted, plan.tokens, known, DecodePlan(0, size, proposals))
            found.append(Option("single", size, proposals, accepted, (tokens,)))
        both = two_forwards(cut).accepted / 2
        accepted, _ = _weighed(both, 0.0, known, DecodePlan(0, size, (1,), two_forwards=True))
        found.append(Option("two", size, (1,), accepted, (1.0 + size, float(size))))
    return found


def _weighed(accepted: float, tokens: float, known: Known | None, plan: DecodePlan) -> tuple[float, float]:
    """Tokens that a forward yields and processes: as expected, then ever more as texts say."""
    if known is None:
        return accepted, tokens
    seen = known.replayed(plan)
    weight = seen.forwards + _TRUST
    return (seen.yielded + _TRUST * accepted) / weight, (seen.processed + _TRUST * tokens) / weight


def choices(times: Times, worth: Sequence[Option], rows: int, beside: float = 0.0) -> list[Choice]:
    """Plans by their speed, the fastest first.

    Args:
        times: of forwards.
        worth: plans, see `options`.
        rows: texts in the batch.
        beside: seconds that each forward with drafts takes besides.
    """
    found = []
    for option in worth:
        seconds = sum(times.of(rows, tokens) for tokens in option.width(rows)) / len(option.tokens)
        seconds += 0.0 if option.mode == "ar" else beside
        found.append(Choice(option, seconds, rows * option.tokens_per_forward / seconds))
    return sorted(found, key=lambda choice: -choice.tokens_per_second)


class AutoPlan:
    """Sets an engine's plan by what is fastest: `Engine(…, replan=AutoPlan(…))`.

    Greedy texts do not depend on it; sampled ones follow the same law, but a seed no longer repeats them.

    How often slots are right is reckoned anew ever more seldom, but soon when what forwards yield has moved. The number
    of rows counts at every change.
    """

    def __init__(self, known: Known, settings: TidarSettings) -> None:
        """Starts with what is known.

        Args:
            known: of the checkpoint on this machine; learns of the texts that are decoded.
            settings: of the checkpoint.
        """
        self.known = known
        self.chosen: Choice | None = None
        self._settings = settings
        self._counts: dict[tuple[int, int, int], float] = {}
        self._taken: Counter[tuple[int, int, int]] = Counter()
        self._worth: list[Option] = []
        self._ranked: dict[int, list[Choice]] = {}
        self._yielded: dict[object, tuple[float, float]] = {}  # plan -> tokens foretold, tokens that came
        self._beside, self._counted = 0.0, 0.0  # seconds of a drafting step beside what was timed: now, and in `chosen`
        self._ended: tuple[float, int, int] | None = None  # the last call: when, and with how many prefills and rows
        self._since: Option | None = None  # the plan of all forwards since the last look; None: there were several
        self._scored: dict[int, int] = {}  # id of a text at hand -> how much of it is scored
        self._look, self._due, self._wait = 0, 0, _EVERY
        self._yields, self._planned_for = 1.0, 1.0  # tokens a drafting forward gave a text lately, and at the last plan

    @property
    def rates(self) -> tuple[float, ...]:
        """What is known of the slots now."""
        return slot_rates(self._counts, self._settings.block_size)

    def ranked(self, rows: int) -> list[Choice]:
        """The plans by their speed for so many texts at once, the fastest first."""
        if rows not in self._ranked:
            worth = self._worth or options(self.rates, self.known)
            corrected = [self._corrected(option) for option in worth]
            self._ranked[rows] = choices(self.known.times, corrected, rows, self._counted)
        return self._ranked[rows]

    def _corrected(self, option: Option) -> Option:
        """By what it yielded when it was taken: blocks smaller than trained, above all, do worse than foretold."""
        foretold, came = self._yielded.get(option.key, (0.0, 0.0))
        weight = _TRIED * option.tokens_per_forward
        return replace(option, tokens_per_forward=option.tokens_per_forward * (came + weight) / (foretold + weight))

    def __call__(self, engine: Engine) -> None:
        """Sets the plan, if another has become the fastest."""
        self._time(engine)
        self._choose(engine)
        self._ended = time.perf_counter(), engine.counters.prefills, engine.running

    def _time(self, engine: Engine) -> None:
        """Learns what a step takes beside the forward: bookkeeping, and whatever else the machine does."""
        if self._ended is None or self.chosen is None or self.chosen.option.mode == "ar":
            return
        at, *before = self._ended
        if before == [engine.counters.prefills, engine.running]:
            beside = time.perf_counter() - at - (self.chosen.seconds - self._counted)
            self._beside += _SLOWLY * (min(max(beside, 0.0), _MOST * self.chosen.seconds) - self._beside)

    def _choose(self, engine: Engine) -> None:
        forwards = engine.counters.forwards
        if forwards >= self._look:
            self._look = forwards + _EVERY
            drafted = self._take_in(engine.counters.verified)
            self._since = None if self.chosen is None else self.chosen.option
            if forwards >= self._due or abs(self._yields / self._planned_for - 1) > _MOVED:
                if forwards >= (_FIRST if len(self.known.texts) < _ENOUGH else _LATER):
                    self._score(engine)
                self._worth, self._ranked, self._counted = options(self.rates, self.known), {}, self._beside
                self._wait = min(2 * self._wait, _SELDOM)
                self._due, self._planned_for = forwards + self._wait, self._yields
                if forwards and not drafted:
                    # Plain decoding teaches nothing of drafts: they get another chance until the next look.
                    self._worth = [option for option in self._worth if option.mode != "ar"]
                    self._due = self._look
        best = self.ranked(engine.running)[0]
        if self.chosen is None or best.option.key != self.chosen.option.key:
            engine.plan = plan_of_option(best.option, engine.plan, self._settings)
            self._since = None
        self.chosen = best

    def _score(self, engine: Engine) -> None:
        """Scores what is new of the longest texts at hand: of one, or of as many as make up for knowing few."""
        size, before = self._settings.block_size, self._scored
        self._scored = {id(text): before.get(id(text), 0) for text in engine.texts}
        found = [(len(text.tokens) - self._scored[id(text)], text) for text in engine.texts]
        found = sorted((pair for pair in found if pair[0] > size), key=lambda pair: -pair[0])
        for new, text in found[: max(1, _ENOUGH - len(self.known.texts))]:
            sampling = engine.plan.sampling if text.request.sampling is None else text.request.sampling
            tokens = [*text.request.prompt, *text.tokens]
            self.known.add(score(engine.model, engine.plan, sampling, size, tokens, 1 + min(new, _SCORED)))
            self._scored[id(text)] = len(text.tokens)

    def _take_in(self, verified: Counter[tuple[int, int, int]]) -> bool:
        """Older counts fade as newer ones come; returns whether any did."""
        every = verified - self._taken
        self._taken = Counter(verified)
        if self._since is not None:
            forwards, tokens = sum(every.values()), sum(key[2] * count for key, count in every.items())
            foretold, came = self._yielded.get(self._since.key, (0.0, 0.0))
            before = next((o.tokens_per_forward for o in self._worth if o.key == self._since.key), 0.0)
            self._yielded[self._since.key] = foretold + forwards * before, came + tokens
        new = {key: count for key, count in every.items() if key[1]}  # those with drafts
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
