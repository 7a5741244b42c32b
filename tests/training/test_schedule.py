"""Learning-rate schedules against their definitions."""

from __future__ import annotations

import pytest

from zconvert.training.schedule import Schedule, learning_rate_factor


def _factors(schedule: Schedule, decay_steps: int = 0) -> list[float]:
    return [
        learning_rate_factor(
            step, schedule=schedule, max_steps=100, warmup_steps=10, decay_steps=decay_steps, min_lr_ratio=0.1
        )
        for step in range(100)
    ]


@pytest.mark.parametrize(("schedule", "decay"), [("cosine", 0), ("wsd", 20), ("constant", 0)])
def test_every_schedule_warms_up_linearly_to_the_peak(schedule: Schedule, decay: int) -> None:
    assert _factors(schedule, decay)[:10] == pytest.approx([0.1 * n for n in range(1, 11)])


def test_cosine_is_halfway_in_the_middle_and_low_at_the_end() -> None:
    factors = _factors("cosine")
    assert factors[55] == pytest.approx(0.55)
    assert factors[-1] == pytest.approx(0.1, abs=0.001)
    assert factors[10:] == sorted(factors[10:], reverse=True)


def test_wsd_is_flat_and_then_falls_linearly() -> None:
    factors = _factors("wsd", 20)
    assert set(factors[10:81]) == {1.0}
    assert factors[90] == pytest.approx(0.55)
    assert factors[99] == pytest.approx(0.145)


def test_constant_stays_at_the_peak() -> None:
    assert set(_factors("constant")[10:]) == {1.0}
