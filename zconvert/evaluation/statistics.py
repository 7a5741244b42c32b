"""pass@k without bias, how sure one can be of it, and what a difference to another column is worth. Needs only numpy.

A column is one way to decode; of each problem it has n samples, c of them right. Problems are what intervals are drawn
over: they are what another test of the same kind would have others of. The columns share them, so a difference is taken
problem by problem.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

RESAMPLES = 10_000

Interval = tuple[float, float]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Probability that at least one of k samples is right, unbiased from n samples with c right ones.

    Source: arXiv 2107.03374, 1 − C(n − c, k) / C(n, k).

    Raises:
        ValueError: k is not 1 … n, or c not 0 … n.

    >>> round(pass_at_k(4, 2, 1), 3), round(pass_at_k(4, 2, 2), 3)
    (0.5, 0.833)
    """
    if not 1 <= k <= n:
        raise ValueError(f"k is {k}, expected 1 to n, the {n} samples of a problem")
    if not 0 <= c <= n:
        raise ValueError(f"c is {c}, expected 0 to n, the {n} samples of a problem")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def interval_of_mean(values: Sequence[float], *, low: float, high: float, seed: int = 0) -> Interval:
    """Where the mean over problems lies, with 95 % confidence: bootstrap percentiles, widened for few problems.

    Percentiles alone are too narrow by the factor √((m − 1) / m) and by what Student's t is wider than the normal
    distribution; both are put back (Hesterberg 2015, "expanded percentiles"). Where all values are alike there is
    nothing to draw from: then 3 / m, the rule of three, says what m problems may have missed.

    Args:
        values: one for each problem.
        low: the least that a value can be.
        high: the most.
        seed: of the resampling.
    """
    array = np.asarray(values, dtype=float)
    count = len(array)
    if count == 0:
        return low, high
    mean = float(array.mean())
    if np.ptp(array) < 1e-12:
        return max(low, mean - 3 / count), min(high, mean + 3 / count)
    rng = np.random.default_rng(seed)
    rows = max(1, 10_000_000 // count)  # at a time, so that memory stays below 200 MB
    drawn = (
        array[rng.integers(count, size=(min(rows, RESAMPLES - done), count))].mean(axis=1)
        for done in range(0, RESAMPLES, rows)
    )
    means = np.concatenate(list(drawn))
    tail = _normal_cdf(-math.sqrt(count / (count - 1)) * _student_quantile(count - 1))
    ends = np.quantile(means, [tail, 1 - tail])
    return max(low, float(ends[0])), min(high, float(ends[1]))


def _normal_cdf(x: float) -> float:
    return 0.5 * math.erfc(-x / math.sqrt(2))


def _student_quantile(freedom: int) -> float:
    """The 97.5 % point of Student's t, by the expansion of Cornish and Fisher; to 0.1 % from 4 degrees on."""
    z = 1.959963984540054
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


@dataclass(frozen=True)
class Difference:
    """A column's pass@k less another's on the same problems."""

    mean: float
    interval: Interval
    verdict: Literal["no difference found", "better", "worse", "too few samples to tell"]
    problems_needed: int | None
    """of the same kind, with as many samples, that would tell if the difference is what it looks like; None: enough"""

    def to_dict(self) -> dict[str, Any]:
        """For results.json."""
        return {
            "mean": self.mean,
            "interval": list(self.interval),
            "verdict": self.verdict,
            "problems_needed": self.problems_needed,
        }


def difference(own: Sequence[float], other: Sequence[float], *, margin: float, seed: int = 0) -> Difference:
    """Compares two columns by their pass@k of each problem, in pairs.

    Better or worse: the interval leaves 0 out. No difference found: it has 0 and stays within the margin on both sides.
    Else the problems are too few to tell.

    Args:
        own: pass@k of each problem.
        other: the same of the other column, for the same problems in the same order.
        margin: a difference that would matter, such as 0.02 for two points.
        seed: of the resampling.
    """
    paired = [a - b for a, b in zip(own, other, strict=True)]
    low, high = interval_of_mean(paired, low=-1.0, high=1.0, seed=seed)
    mean = float(np.mean(paired)) if paired else 0.0
    needed: int | None = None
    if low > 0:
        verdict = "better"
    elif high < 0:
        verdict = "worse"
    elif -margin <= low and high <= margin:
        verdict = "no difference found"
    else:
        verdict = "too few samples to tell"
        # It would leave 0 out, or stay within the margin, whichever is nearer, if the difference is what it looks like.
        wanted = min(margin, max(abs(mean), margin - abs(mean)))
        needed = _problems_needed(len(paired), (high - low) / 2, wanted, alike=low == -high and mean == 0)
    return Difference(mean, (low, high), verdict, needed)  # type: ignore[arg-type]  # one of the four


def _problems_needed(count: int, half_width: float, wanted: float, *, alike: bool) -> int | None:
    """Problems at which an interval would be so narrow; None where there is nothing to go by.

    >>> _problems_needed(100, 0.04, 0.02, alike=False)
    400
    """
    if count == 0:
        return None
    needed = 3 / wanted if alike else count * (half_width / wanted) ** 2
    return max(count + 1, math.ceil(needed - 1e-9))
