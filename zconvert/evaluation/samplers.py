"""Names of the columns of an evaluation. No torch here."""

from __future__ import annotations

from collections.abc import Sequence

BASELINE = "baseline"
"""another model, the source say, decoded by plain AR"""
AR = "ar"
LOSSLESS = "lossless"
MIX = "mix:"


def sampler_weights(names: Sequence[str]) -> dict[str, float | None]:
    """What sampler names stand for: name → weight of AR in what drafts are verified against; None: plain AR.

    Raises:
        ValueError: there is no such sampler.

    >>> sampler_weights(["ar", "lossless", "mix:0.50"])
    {'ar': None, 'lossless': 1.0, 'mix:0.5': 0.5}
    """
    weights: dict[str, float | None] = {}
    for name in names:
        if name == AR:
            weights[AR] = None
        elif name == LOSSLESS:
            weights[LOSSLESS] = 1.0
        else:
            try:
                weight = float(name.removeprefix(MIX)) if name.startswith(MIX) else -1.0
            except ValueError:
                weight = -1.0
            if not 0 <= weight <= 1:
                raise ValueError(f"{name!r} is no sampler, expected ar, lossless or mix:<w> with w from 0 to 1")
            weights[f"{MIX}{weight:g}"] = weight
    return weights
