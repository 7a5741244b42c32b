"""Layouts, time and cost of stages."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import yaml

from tests.planning.models import QWEN3_30B, ZAYA_8B, facts
from zconvert.errors import UserError
from zconvert.planning.decoding import Cell
from zconvert.planning.layouts import Layout, layouts
from zconvert.planning.machines import MACHINES
from zconvert.planning.memory import memory_of
from zconvert.planning.plan import plan_stage, summary
from zconvert.planning.step_time import disk_bytes, row_flops, stage_cost, step_time
from zconvert.planning.workload import Workload, workload_of
from zconvert.recipe import MidtrainRecipe, ParallelRecipe
from zconvert.tidar.settings import GatedParts

H100 = MACHINES["h100-80gb"]
ZAYA = facts("zaya", ZAYA_8B)
QWEN = facts("qwen3_moe", QWEN3_30B)


def test_the_layout_taken_fits_and_none_that_fits_is_faster() -> None:
    work = Workload(sequence_len=32_768)
    stage = plan_stage(ZAYA, work, H100, 8, None)
    assert stage.fits
    assert stage.memory.total <= H100.usable_bytes
    for layout, obstacle in layouts(ZAYA, work, 8):
        if obstacle is None and memory_of(ZAYA, work, layout).total <= H100.usable_bytes:
            speed = step_time(ZAYA, work, layout, H100).tokens_per_second
            assert speed <= stage.time.tokens_per_second * 1.0001


def test_a_layout_that_a_recipe_has_to_ask_for_is_told_in_its_words() -> None:
    stage = plan_stage(ZAYA, Workload(sequence_len=131_072), H100, 8, None)
    said = re.search(r"\(by parallel: (\{.*\}) in the recipe\)", summary([stage], H100, 8, [])[0])
    assert said is not None
    section = ParallelRecipe(**yaml.safe_load(said[1]))
    assert Layout.of(section, 8) == stage.layout
    its_own = plan_stage(ZAYA, Workload(sequence_len=131_072, parallel=section), H100, 8, None)
    assert "(the recipe's)" in summary([its_own], H100, 8, [])[0]
    assert "(" not in summary([plan_stage(ZAYA, Workload(), H100, 1, None)], H100, 1, [])[0]


def test_every_other_layout_is_rejected_with_its_reason() -> None:
    stage = plan_stage(QWEN, Workload(sequence_len=32_768), H100, 16, None)
    reasons = {layout.title: reason for layout, reason in stage.rejected}
    assert stage.layout.title not in reasons
    assert reasons["16 replicas"].startswith("needs ")
    assert "GB of 74 GB" in reasons["16 replicas"]
    assert len(reasons) + 1 == len([*layouts(QWEN, Workload(sequence_len=32_768), 16)])


def test_long_rows_are_cut_where_memory_wants_it() -> None:
    stage = plan_stage(ZAYA, Workload(sequence_len=131_072), H100, 8, None)
    assert stage.layout.context_parallel >= 4
    assert stage.fits


@pytest.mark.parametrize(
    ("model", "work", "layout", "reason"),
    [
        (ZAYA, Workload(sequence_len=1000), Layout(8, 8, 2), "1000 tokens do not cut into 4 chunks"),
        (ZAYA, Workload(), Layout(6, 6, 4), "6 devices are not a multiple of CP 4"),
        (facts("zaya", ZAYA_8B | {"num_experts": 10}), Workload(), Layout(8, 8, 1, 4), "10 experts are not a"),
        (ZAYA, Workload(gated=GatedParts()), Layout(8, 8, 1, 2), "mask slots pass no routed expert"),
    ],
)
def test_layouts_that_cannot_be_say_why(model: object, work: Workload, layout: Layout, reason: str) -> None:
    obstacles = dict(layouts(model, work, layout.gpus))  # type: ignore[arg-type]
    assert (obstacles[layout] or "").startswith(reason)


def test_what_does_not_fit_says_how_many_devices_would_do() -> None:
    stage = plan_stage(QWEN, Workload(sequence_len=8192), H100, 2, None)
    assert not stage.fits
    assert stage.least_gpus is not None
    assert stage.least_gpus > 2
    assert plan_stage(QWEN, Workload(sequence_len=8192), H100, stage.least_gpus, None).fits
    assert not plan_stage(QWEN, Workload(sequence_len=8192), H100, stage.least_gpus // 2, None).fits


def test_a_row_takes_six_flop_a_parameter_and_token_and_two_more_run_again() -> None:
    """Short rows, so that attention is little: 2T tokens through all active parameters, head included."""
    short = Workload(sequence_len=64, gradient_checkpointing=False)
    tokens = 2 * 64
    assert row_flops(ZAYA, short) / tokens / ZAYA.active == pytest.approx(6, rel=0.02)
    again = row_flops(ZAYA, Workload(sequence_len=64)) - row_flops(ZAYA, short)
    assert again / tokens / (ZAYA.active - ZAYA.head_parameters) == pytest.approx(2, rel=0.05)


def test_a_packed_row_attends_to_a_quarter_of_its_pairs() -> None:
    length = 65_536
    short, long = (row_flops(ZAYA, Workload(sequence_len=n, gradient_checkpointing=False)) for n in (64, length))
    attention = long - short * length / 64
    pairs = attention / (3 * 2 * ZAYA.score_width * ZAYA.layers)
    assert pairs / (2 * length) ** 2 == pytest.approx(0.25, rel=0.01)


def test_gated_steps_take_less_than_full_ones() -> None:
    full, gated = (row_flops(ZAYA, Workload(gated=parts)) for parts in (None, GatedParts()))
    assert 0.2 < gated / full < 0.6


def test_cost_follows_from_steps_devices_and_price() -> None:
    work, layout = Workload(max_steps=1000), Layout(8, 8)
    time = step_time(ZAYA, work, layout, H100)
    cost = stage_cost(time, work, H100, 8, None)
    assert cost is not None
    assert (cost.steps, cost.tokens) == (1000, 8 * 4096 * 1000)
    assert cost.gpu_hours == pytest.approx(1000 * time.total / 3600 * 8)
    assert cost.dollars == pytest.approx(cost.gpu_hours * 2.5)
    budget = stage_cost(time, work, H100, 8, 1e9)
    assert budget is not None
    assert 1e9 <= budget.tokens < 1e9 + time.tokens
    assert stage_cost(time, Workload(), H100, 8, None) is None


def test_more_devices_never_make_a_step_of_the_same_rows_slower_a_token() -> None:
    speeds = [step_time(ZAYA, Workload(), Layout(n, n), H100).tokens_per_second for n in (2, 4, 8)]
    assert speeds == sorted(speeds)


def test_a_recipe_that_says_how_devices_share_the_work_is_planned_as_it_says() -> None:
    said = ParallelRecipe(fsdp=4, context_parallel=2, expert_parallel=2)
    settings = {"base_model": "x", "output_dir": "y", "datasets": [{"path": "z"}], "max_steps": 1}
    for section, read in ((said, said), ({"sync_every_forward": True}, None), ({}, None)):
        assert workload_of(MidtrainRecipe(**settings, parallel=section), 16, None).parallel == read
    stage = plan_stage(ZAYA, Workload(parallel=said), H100, 8, None)
    assert stage.layout == Layout(8, 4, 2, 2)
    assert stage.layout.title == "FSDP 4, 2 replicas, CP 2, EP 2"
    assert stage.rejected == ()
    whole, parts = (memory_of(ZAYA, Workload(), Layout(8, fsdp)) for fsdp in (8, 4))
    assert parts.optimizer == 2 * whole.optimizer
    with pytest.raises(UserError, match="cannot be") as caught:
        plan_stage(ZAYA, Workload(parallel=said), H100, 6, None)
    assert "6 devices are not a multiple of FSDP 4" in str(caught.value.found)


def test_gradients_that_are_summed_once_in_several_forwards_are_held_whole() -> None:
    work, layout = Workload(gradient_accumulation_steps=4), Layout(8, 8)
    summed_once, each = (replace(work, sync_every_forward=every) for every in (False, True))
    assert memory_of(ZAYA, summed_once, layout).gradients == 4 * ZAYA.total * (1 + 1 / 8)
    assert memory_of(ZAYA, each, layout).gradients == 4 * ZAYA.total / 8
    assert step_time(ZAYA, each, layout, H100).sharding > step_time(ZAYA, summed_once, layout, H100).sharding


def test_slow_networks_show_in_the_step() -> None:
    slow = H100.model_copy(update={"network_gb_s": 1.0})
    fast, held = (step_time(ZAYA, Workload(), Layout(16, 16), machine) for machine in (H100, slow))
    assert held.total > 5 * fast.total
    assert held.sharding > held.compute


def test_train_states_of_full_mode_hold_masters_and_both_means() -> None:
    disk = disk_bytes(ZAYA, Workload(save_total_limit=2))
    assert disk["train_states"] == 3 * 12 * ZAYA.total
    assert disk["source"] == disk["result"] == ZAYA.stored_bytes


def cell(batch: int, context: int, speedup: float) -> Cell:
    return Cell(batch, context, "single", speedup, 1.0, 1.0, 16, (1,), True)


@pytest.mark.parametrize(
    ("speedups", "told"),
    [
        ([2, 2, 2, 2, 2, 2], "pays at every batch and context"),
        ([0.5, 0.9, 0.5, 0.9, 0.5, 0.9], "would not pay anywhere"),
        ([0.5, 0.9, 1.5, 1.5, 2, 2], "pays at batch ≥ 8 whatever the context ("),
        ([0.5, 1.2, 1.5, 1.5, 2, 2], "pays at batch ≥ 8 whatever the context and at batch 1 with contexts ≥ 32,768"),
        ([0.5, 0.9, 1.5, 1.5, 0.9, 2], "pays at batch 8 whatever the context ("),
        ([0.5, 1.2, 0.9, 1.5, 0.9, 2], "pays at batch 1 with contexts ≥ 32,768 ("),
    ],
)
def test_where_decoding_pays_is_told_in_words(speedups: list[float], told: str) -> None:
    """At batches of 1, 8 and 64, each with a short and a long context."""
    places = [(batch, context) for batch in (1, 8, 64) for context in (1024, 32_768)]
    cells = [cell(*place, speedup) for place, speedup in zip(places, speedups, strict=True)]
    stage = plan_stage(ZAYA, Workload(), H100, 8, None)
    assert told in summary([stage], H100, 8, cells)[-1]


def test_the_best_of_the_map_is_the_best_that_fits() -> None:
    cells = [cell(1, 1024, 2.0), replace(cell(64, 1024, 3.0), fits=False)]
    stage = plan_stage(ZAYA, Workload(), H100, 8, None)
    told = "Decoding pays at every batch and context of the map that fits (best 2.0× at batch 1 and 1,024 tokens)."
    assert summary([stage], H100, 8, cells)[-1] == told


def test_half_the_mask_slots_take_three_quarters_of_the_tokens() -> None:
    whole, half = (Workload(sequence_len=64, diffusion_fraction=each) for each in (1.0, 0.5))
    assert half.tokens_per_row / whole.tokens_per_row == 0.75
    assert row_flops(ZAYA, half) / row_flops(ZAYA, whole) == pytest.approx(0.75, rel=0.01)
    gated = (Workload(gated=GatedParts(), diffusion_fraction=each) for each in (1.0, 0.5))
    of_slots, of_half = (memory_of(ZAYA, work, Layout()).activations for work in gated)
    assert of_half == pytest.approx(of_slots / 2)
