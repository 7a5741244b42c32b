"""The display of a training run: everything that is measured, within 80 columns."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from zconvert.cli.training import _line, _view

METRICS: dict[str, Any] = {
    **{"step": 90_000, "max_steps": 100_000, "loss": 12.3456, "loss_ar": 12.3456, "loss_diffusion": 12.3456},
    **{"slot_accuracy": [1.0] * 32, "expected_accepted": 15.55, "tokens_per_second": 123_456.7},
    "evaluation": {
        **{"loss": 12.3456, "loss_ar": 12.3456, "loss_diffusion": 12.3456, "slot_accuracy": [1.0] * 16},
        **{"expected_accepted": 15.55, "tokens_per_forward": 15.55},
    },
    "moe": {
        "clean": {"entropy": [1.0, 0.91], "dead": [0, 1]},
        "mask": {"entropy": [0.2, 0.91], "dead": [100, 0]},
        "drift": 0.123,
    },
}


def test_the_display_shows_all_measurements_within_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    console.print(_view(METRICS, 100_000))
    text = console.file.getvalue()  # type: ignore[attr-defined]
    for part in (
        "90000/100000",
        "15.55 tokens/forward",
        "12.3% drift",
        "clean 91%, 1 dead; mask 20%, 100 dead",
    ):
        assert part in text
    assert "…\n" not in text
    assert max(map(len, text.splitlines())) <= 80


def test_a_log_line_leaves_out_what_was_not_measured() -> None:
    assert "drift" in _line(METRICS, 1)
    plain = {key: value for key, value in METRICS.items() if key not in ("evaluation", "moe")}
    assert _line(plain, 1).endswith("accepted 15.55 | 0:01 left")
