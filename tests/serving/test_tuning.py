"""Plans that follow the machine and the text: the arithmetic by hand, and the engine under it."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.models import MASK
from tests.contracts.training import trained_pair
from zconvert.checkpoint.folder import TUNING_FILE
from zconvert.planning.acceptance import flat_curve
from zconvert.serving import timing, tuning
from zconvert.serving.hindsight import Scored
from zconvert.serving.timing import Known, Times, known_of
from zconvert.serving.tuning import AutoPlan, choices, options, plan_of_option, slot_rates
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.settings import TidarSettings

SETTINGS = TidarSettings(4, MASK)


def times(per_forward: float, per_token: float, per_row: float = 0.0) -> Times:
    """A machine whose forwards take so long; straight lines, so that two points say it all."""
    table = {rows: {n: per_forward + rows * (per_row + per_token * n) for n in (1, 16, 272)} for rows in (1, 8)}
    return Times("here", table)


def test_times_lie_on_straight_lines_between_what_was_measured() -> None:
    machine = times(3.0, 0.5, 0.25)
    assert machine.of(1, 16) == pytest.approx(3 + 0.25 + 8)
    assert machine.of(4, 100) == pytest.approx(3 + 4 * (0.25 + 50))
    assert machine.of(8, 300) == pytest.approx(3 + 8 * (0.25 + 150)), "beyond the last point too"


def test_rates_are_the_share_of_drafts_that_were_right_where_they_were_reached() -> None:
    # Of 1000 blocks of drafts from slots 1, 2, 3: 500 fail at the first, 300 at the second, 200 are all right.
    rates = slot_rates({(1, 3, 1): 500e6, (1, 3, 2): 300e6, (1, 3, 4): 200e6}, 4)
    assert rates == pytest.approx((1.0, 0.5, 0.4, 1.0), rel=1e-5)
    # The same slots reached from an anchor further right.
    assert slot_rates({(3, 1, 1): 1e9, (3, 1, 2): 3e9}, 4)[3] == pytest.approx(0.75, rel=1e-5)
    assert slot_rates({}, 3) == pytest.approx((1.0, 0.7, 0.7)), "nothing is known"


def test_where_tokens_cost_nothing_every_proposal_pays_and_where_they_cost_all_none_does() -> None:
    worth = options(flat_curve(8.0, 16).rates)
    free, dear = choices(times(1.0, 1e-9), worth, 1), choices(times(1e-9, 1.0), worth, 1)
    assert free[0].option.mode == "single"
    assert len(free[0].option.proposals) == max(len(each.proposals) for each in worth)
    assert free[0].option.block_size == 16
    assert dear[0].option.mode == "ar"
    assert [each.tokens_per_second for each in free] == sorted((e.tokens_per_second for e in free), reverse=True)
    # One token a forward is one token a forward.
    plain = next(each for each in dear if each.option.mode == "ar")
    assert plain.tokens_per_second == pytest.approx(1.0, rel=1e-6)


def test_every_option_is_a_plan_that_the_engine_takes() -> None:
    plan = DecodePlan.tidar(SETTINGS, Sampling(temperature=0.5), frozenset({3}))
    for option in options((1.0, 0.5, 0.5, 0.5)):
        made = plan_of_option(option, plan, SETTINGS)
        assert (made.sampling, made.eos_token_ids) == (plan.sampling, plan.eos_token_ids)
        assert made.two_forwards == (option.mode == "two")
        assert made.proposals == option.proposals


@pytest.mark.parametrize(("machine", "mode"), [(times(1.0, 1e-6), "single"), (times(1e-6, 1.0), "ar")])
def test_the_engine_takes_the_plan_that_suits_the_machine_and_its_text_stays(machine: Times, mode: str) -> None:
    pair, prompt = trained_pair("mixtral"), list(range(8))
    requests = [Request(prompt[: 2 + i], 40, key=i) for i in range(6)]
    texts = {}
    for auto in (False, True):
        engine = Engine(pair.layout, DecodePlan.tidar(SETTINGS, Sampling(), frozenset()), max_batch=3)
        if auto:
            engine.replan = AutoPlan(Known(machine), SETTINGS)
        texts[auto] = {result.request.key: result.tokens for result in run(engine, requests)}
    assert texts[True] == texts[False]
    assert isinstance(engine.replan, AutoPlan)
    assert engine.replan.chosen is not None
    assert engine.replan.chosen.option.mode == mode


def test_drafts_get_another_chance_where_plain_decoding_was_faster() -> None:
    pair, machine = trained_pair("mixtral"), times(1e-6, 1.0)
    engine = Engine(pair.layout, DecodePlan.tidar(SETTINGS, Sampling(), frozenset()), max_batch=1)
    engine.replan = AutoPlan(Known(machine), SETTINGS)
    result = engine.add(Request([0, 1, 2], 400))
    drafted = []
    while not engine.idle:
        before = len(result.accepted)
        engine.step()
        drafted += [bool(engine.plan.proposals)] * (len(result.accepted) - before)
    assert drafted.count(False) > 300
    assert any(drafted[100:]), "the plan was tried again"


def test_what_steps_take_beside_their_forwards_counts_against_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, machine = trained_pair("mixtral"), times(1.0, 1e-6)
    drafted = {}
    for step in (1.0, 9.0):  # seconds, by a clock of our own
        monkeypatch.setattr(tuning.time, "perf_counter", itertools.count(0.0, step).__next__)
        engine = Engine(pair.layout, DecodePlan.tidar(SETTINGS, Sampling(), frozenset()), max_batch=1)
        engine.replan = AutoPlan(Known(machine), SETTINGS)
        engine.add(Request([0, 1, 2], 300))
        told = []
        while not engine.idle:
            engine.step()
            told.append(bool(engine.plan.proposals))
        drafted[step] = sum(told[100:]) / max(1, len(told[100:])) if len(told) > 100 else sum(told) / len(told)
    assert drafted[1.0] == 1, "forwards take what they were timed at"
    assert drafted[9.0] < 0.5, "drafting takes four times as long, for less than four tokens"


def test_what_is_known_is_found_out_once_and_kept_beside_the_checkpoint(tmp_path: Path, monkeypatch: Any) -> None:
    model = trained_pair("mixtral").layout
    first = known_of(model, SETTINGS, 2, tmp_path)
    assert set(first.times.seconds) == {1, 2}
    assert set(first.times.seconds[1]) == {1, 4, 5, 8, 12, 16, 20}
    assert all(s > 0 for row in first.times.seconds.values() for s in row.values())
    assert [path.name for path in tmp_path.iterdir()] == [TUNING_FILE]
    for number in range(20):
        first.add(Scored([[0, 0, 0, 0], [number % 3, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0]]))
    assert [text.runs[1][0] for text in first.texts[:2]] == [4 % 3, 5 % 3], "the latest 16"

    def never(*_: Any, **__: Any) -> Times:
        raise AssertionError("measured again")

    with monkeypatch.context() as patch:
        patch.setattr(timing, "measure", never)
        assert known_of(model, SETTINGS, 2, tmp_path) == first
        with pytest.raises(AssertionError):
            known_of(model, SETTINGS, 4, tmp_path)  # more rows than were timed
    # Texts of other blocks say nothing.
    assert known_of(model, replace(SETTINGS, block_size=3), 2, tmp_path).texts == []


@pytest.mark.parametrize(
    "content",
    ["{", "[]", '{"forwards": {"here": 3}}', '{"forwards": {}, "block_size": 4, "texts": [[[9, 0, 0, 0]]]}', "\0"],
)
def test_a_broken_file_is_no_reason_to_fail(content: str, tmp_path: Path) -> None:
    (tmp_path / TUNING_FILE).write_text(content)
    known = known_of(trained_pair("mixtral").layout, SETTINGS, 1, tmp_path)
    assert known.times.seconds.keys() == {1}
    assert known.texts == []
    document = json.loads((tmp_path / TUNING_FILE).read_text())
    assert document["forwards"].keys() == {known.times.machine}


def test_other_machines_times_stay(tmp_path: Path) -> None:
    other = {"forwards": {"another machine": {"1": {"1": 0.5}}}, "block_size": 0, "texts": []}
    (tmp_path / TUNING_FILE).write_text(json.dumps(other))
    known_of(trained_pair("mixtral").layout, SETTINGS, 1, tmp_path)
    assert json.loads((tmp_path / TUNING_FILE).read_text())["forwards"]["another machine"] == {"1": {"1": 0.5}}
