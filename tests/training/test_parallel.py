"""Several processes compute what one does: losses, gradients, checkpoints, and states that any number of them reads."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.disk import small_disk
from tests.training.processes import TWO, finish, for_processes, launch, make_family_run, record, start
from tests.training.runs import make_run, metrics_of
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe, ParallelRecipe
from zconvert.tidar.settings import GATED_FILE, GatedParts
from zconvert.training import stages
from zconvert.training.parallel import Parallel, check_experts, check_sizes, sharding
from zconvert.training.state import states_in

LAYOUTS: dict[int, dict[str, dict[str, int]]] = {
    2: {"replicas": {"fsdp": 1}, "fsdp": {}, "context": {"context_parallel": 2}, "experts": {"expert_parallel": 2}},
    4: {"hsdp": {"fsdp": 2}, "fsdp and context": {"context_parallel": 2}, "long context": {"context_parallel": 4}},
}
"""by number of processes"""


def assert_same(one: dict[str, Any], other: dict[str, Any], what: str, tolerance: float = 1e-5) -> None:
    assert len(one["metrics"]) == len(other["metrics"]) == len(one["gradients"])
    for first, second in zip(one["metrics"], other["metrics"], strict=True):
        assert second["loss"] == pytest.approx(first["loss"], rel=tolerance), what
        assert second["loss_ar"] == pytest.approx(first["loss_ar"], rel=tolerance), what
        assert second["slot_accuracy"] == pytest.approx(first["slot_accuracy"]), what
        assert second["grad_norm"] == pytest.approx(first["grad_norm"], rel=tolerance), what
    for first, second in zip(one["gradients"], other["gradients"], strict=True):
        assert first.keys() == second.keys(), what
        total = torch.stack([gradient.norm() for gradient in first.values()]).norm()
        for name, expected in first.items():
            difference = (second[name] - expected).norm()
            # A parameter whose gradient is tiny beside the others' carries their rounding.
            assert difference <= tolerance * max(expected.norm(), 1e-2 * total), (what, name, difference)


def compare(
    runs: dict[str, dict[str, Any]], worlds: dict[int, list[str]], folder: Path, tolerance: float = 1e-5
) -> None:
    """Trains each run in one process, and in several in each layout."""
    alone = record({name: for_processes(settings, 1) for name, settings in runs.items()}, 1, folder / "1")
    for world, layouts in worlds.items():
        settings = {
            f"{name}, {layout}": for_processes(run, world, **LAYOUTS[world][layout])
            for name, run in runs.items()
            for layout in layouts
        }
        for name, recorded in record(settings, world, folder / str(world)).items():
            assert_same(alone[name.split(", ")[0]], recorded, name, tolerance)


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    run = make_family_run(tmp_path, "zaya")
    compare({"zaya": run}, {2: ["fsdp", "context"]}, tmp_path)
    # Gathered from the shards: Adam steps of tiny gradients differ, and no more than by a step.
    one, two = (load_file(tmp_path / name / "checkpoint" / "model.safetensors") for name in ("1/zaya", "2/zaya, fsdp"))
    assert one.keys() == two.keys()
    for name, expected in one.items():
        torch.testing.assert_close(two[name], expected, rtol=0, atol=2.5 * run["max_steps"] * run["learning_rate"])
        assert (two[name] - expected).abs().mean() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 4])
def test_every_layout_of_processes_computes_what_one_does(world: int, tmp_path: Path) -> None:
    runs = {family: make_family_run(tmp_path / family, family) for family in ("zaya", "qwen3_moe", "gpt_oss")}
    compare(runs, {world: [name for name in LAYOUTS[world] if name != "experts"]}, tmp_path)


@pytest.mark.slow
def test_context_parallelism_follows_convolutions_chunks_and_positions(tmp_path: Path) -> None:
    families = ("lfm2_moe", "llama4_text", "inkling_text", "deepseek_v3", "mistral")
    runs = {family: make_family_run(tmp_path / family, family) for family in families}
    compare(runs, {2: ["context"]}, tmp_path)


@pytest.mark.slow
def test_processes_that_share_rows_draw_the_same_slots(tmp_path: Path) -> None:
    drawn = {"diffusion": {"block_offset": "random", "diffusion_fraction": 0.5}}
    kinds = {"full": None, "gated": GatedParts(rank=4, mlp_width=16)}
    runs = {name: make_family_run(tmp_path / name, "zaya", parts, **drawn) for name, parts in kinds.items()}
    # Fewer slots, smaller gradients: one of a hundredth of the whole differs by 3e-5 of itself, its rounding.
    compare(runs, {2: ["context"]}, tmp_path, tolerance=5e-5)


@pytest.mark.slow
def test_experts_on_several_processes_compute_the_same_and_are_gathered_in_order(tmp_path: Path) -> None:
    families = ("zaya", "qwen3_moe", "gpt_oss")
    changes = {"learning_rate": 1e-9, "save_dtype": "float32"}
    runs = {family: make_family_run(tmp_path / family, family, **changes) for family in families}
    compare(runs, {2: ["experts"]}, tmp_path)
    for family in families:
        folders = (tmp_path / name / "checkpoint" for name in (f"1/{family}", f"2/{family}, experts"))
        one, two = (load_file(folder / "model.safetensors") for folder in folders)
        assert one.keys() == two.keys()
        for name, expected in one.items():
            torch.testing.assert_close(two[name], expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("family", "size", "found"), [("jetmoe", 2, "has no plan"), ("zaya", 3, "4 experts")])
def test_experts_that_cannot_be_shared_are_told_before_any_weight_is_loaded(
    family: str, size: int, found: str, tmp_path: Path
) -> None:
    run = make_family_run(tmp_path, family)
    with pytest.raises(UserError, match="cannot be shared") as caught:
        check_experts(resolve(run["base_model"]), size)
    assert found in str(caught.value.found)


@pytest.mark.slow
def test_gated_weights_are_trained_alike_beside_a_sharded_source(tmp_path: Path) -> None:
    parts = GatedParts(rank=4, mlp_width=16)
    runs = {family: make_family_run(tmp_path / family, family, parts) for family in ("zaya", "qwen3_moe")}
    compare(runs, {2: ["fsdp", "context"]}, tmp_path)
    one, two = (load_file(tmp_path / name / "checkpoint" / GATED_FILE) for name in ("1/zaya", "2/zaya, fsdp"))
    for name, expected in one.items():
        assert (two[name] - expected).abs().mean() < 1e-5


@pytest.mark.slow
def test_gradients_are_summed_once_a_step_or_after_every_forward_and_are_the_same(tmp_path: Path) -> None:
    run = make_family_run(tmp_path, "qwen3_moe", gradient_checkpointing=True)
    alone = record({"run": for_processes(run, 1)}, 1, tmp_path / "1")["run"]
    runs = {
        f"{size} {each}": for_processes(run, 2, sync_every_forward=each, context_parallel=size)
        for size in (1, 2)
        for each in (False, True)
    }
    assert {settings["gradient_accumulation_steps"] for settings in runs.values()} == {2}
    recorded = record(runs, 2, tmp_path / "2")
    for name, other in recorded.items():
        assert_same(alone, other, name)
    steps, units = run["max_steps"], 4 + 1  # layers, and the rest of the model
    assert recorded["1 False"]["reductions"] == steps * units
    assert recorded["1 True"]["reductions"] == 2 * steps * units


@pytest.mark.slow
def test_a_damaged_newest_state_is_passed_over_by_all_processes_with_a_warning(tmp_path: Path) -> None:
    settings = make_run(tmp_path, micro_batch_size=1, save_dtype="float32", save_steps=2, max_steps=4)
    assert launch(tmp_path, settings).returncode == 0
    run_dir = tmp_path / "run"
    (run_dir / "checkpoint").rename(tmp_path / "whole")
    rows = metrics_of(run_dir)
    shard = sorted((run_dir / "train_state" / "step-00000004").glob("shard-00002-*"))[0]
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    again = launch(tmp_path, settings)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("warning") == 1
    assert "step-00000004 is damaged" in " ".join(again.stderr.split())
    assert "continuing after step 2" in again.stderr
    assert metrics_of(run_dir) == rows
    one, two = (load_file(folder / "model.safetensors") for folder in (run_dir / "checkpoint", tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(tmp_path: Path) -> None:
    run = {**make_family_run(tmp_path, "zaya", save_dtype="float32"), "lr_scheduler": "constant"}
    whole = record({"run": {**for_processes(run, 1), "max_steps": 6}}, 1, tmp_path / "whole")["run"]
    run_dir = tmp_path / "parts" / "run"
    parts: list[tuple[int, dict[str, int]]] = [(2, {}), (1, {}), (4, {"fsdp": 2, "context_parallel": 2})]
    for number, (world, layout) in enumerate(parts, start=1):
        if number > 1:
            (run_dir / "checkpoint").rename(run_dir / f"after-{world}")
        record({"run": {**for_processes(run, world, **layout), "max_steps": 2 * number}}, world, tmp_path / "parts")
    rows = metrics_of(run_dir)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    # Steps of Adam lie between, in which rounding grows.
    assert [row["loss"] for row in rows] == pytest.approx([row["loss"] for row in whole["metrics"]], rel=1e-4)
    one, two = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (tmp_path / "whole/run", run_dir))
    for name, expected in one.items():
        assert (two[name] - expected).abs().mean() < 1e-4, name


def test_a_parallel_section_that_does_not_fit_the_processes_is_refused() -> None:
    for section in ({"fsdp": 2}, {"context_parallel": 2}, {"expert_parallel": 2}):
        with pytest.raises(UserError, match="but there is 1 process"):
            Parallel(ParallelRecipe(**section))
    for section in ({"fsdp": 4}, {"context_parallel": 4}, {"fsdp": 2, "expert_parallel": 6}):
        with pytest.raises(UserError, match="but there are 6 processes"):
            check_sizes(ParallelRecipe(**section), 6)


def test_rows_that_cannot_be_shared_evenly_are_refused(tmp_path: Path) -> None:
    settings = for_processes(make_run(tmp_path, sequence_len=30), 2, context_parallel=2)
    texts = launch(tmp_path, settings)
    assert texts.returncode == 1
    assert texts.stderr.count("Error") == 1
    assert "sequence_len is 30 with parallel.context_parallel 2" in texts.stderr


COMMAND = [sys.executable, "-m", "zconvert", "midtrain"]


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["launcher", "one process"])
def test_a_launched_run_stopped_by_sigterm_saves_and_goes_on(whom: str, tmp_path: Path) -> None:
    settings = make_run(tmp_path, micro_batch_size=1, save_dtype="float32", save_steps=100, max_steps=40)
    whole = launch(tmp_path, {**settings, "output_dir": str(tmp_path / "whole")})
    assert whole.returncode == 0, whole.stderr
    assert whole.stdout.strip() == str(tmp_path / "whole" / "checkpoint"), "one process speaks for all"

    run_dir, recipe = tmp_path / "run", tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    process = subprocess.Popen([*COMMAND, str(recipe), *TWO], stderr=subprocess.PIPE, text=True)
    metrics = run_dir / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and metrics.read_bytes().count(b"\n") >= 5)
    target = process.pid if whom == "launcher" else children_of(process.pid)[-1]
    os.kill(target, signal.SIGTERM)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 143, text
    assert "the same command continues from there" in text
    assert "Error" not in text
    [(step, _)] = states_in(run_dir)
    assert step == len(metrics_of(run_dir)), "the state is of the last step that was done"

    again = launch(tmp_path, settings)
    assert again.returncode == 0, again.stderr
    assert f"continuing after step {step}" in again.stderr
    assert metrics_of(run_dir) == metrics_of(tmp_path / "whole")
    one, two = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (run_dir, tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_a_process_that_is_killed_ends_the_run_with_one_error(tmp_path: Path) -> None:
    settings = make_run(tmp_path, micro_batch_size=1, max_steps=1000)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    process = subprocess.Popen([*COMMAND, str(recipe), *TWO], stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    os.kill(children_of(process.pid)[-1], signal.SIGKILL)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGKILL, text
    assert text.count("rror:") == 1, text
    assert "of the run was killed" in text
    assert "SIGKILL" in text


@pytest.mark.slow
def test_a_run_of_two_processes_killed_at_any_moment_loses_and_repeats_no_step(tmp_path: Path) -> None:
    settings = make_run(tmp_path, micro_batch_size=1, save_dtype="float32", save_steps=1, max_steps=60)
    whole = launch(tmp_path, {**settings, "output_dir": str(tmp_path / "whole")})
    assert whole.returncode == 0, whole.stderr
    recipe, run_dir = tmp_path / "recipe.yaml", tmp_path / "run"
    recipe.write_text(json.dumps(settings))
    moments = random.Random(0)
    kills = 0
    for attempt in range(12):
        before, processes = newest(run_dir), start([*COMMAND, str(recipe)], 2, tmp_path / "log")
        # From the first new step on, which takes seconds; then at any moment of a step or its save.
        while newest(run_dir) == before and processes[0].poll() is None:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.5))
        ended = processes[0].poll() is not None
        processes[attempt % 2].kill()
        finish(processes)
        if ended:
            break
        kills += 1
    assert kills >= 3
    last = launch(tmp_path, settings)
    assert last.returncode == 0, last.stderr
    assert metrics_of(run_dir) == metrics_of(tmp_path / "whole")
    one, two = (load_file(folder / "checkpoint" / "model.safetensors") for folder in (run_dir, tmp_path / "whole"))
    assert all(torch.equal(one[name], two[name]) for name in two)


@pytest.mark.slow
def test_a_full_disk_stops_all_processes_with_one_error_and_the_state_before_goes_on(tmp_path: Path) -> None:
    settings = make_run(tmp_path, micro_batch_size=1, save_dtype="float32", save_steps=2, max_steps=6)
    whole = launch(tmp_path, {**settings, "output_dir": str(tmp_path / "whole")})
    assert whole.returncode == 0, whole.stderr
    state = sum(path.stat().st_size for path in states_in(tmp_path / "whole")[-1][1].iterdir())
    with small_disk(tmp_path / "disk", f"{(state + state // 2) // 1024}k") as disk:
        settings = {**settings, "output_dir": str(disk / "run")}
        full = launch(tmp_path, settings)
        assert full.returncode == 1
        assert full.stderr.count("rror:") == 1, full.stderr
        assert "train state of step 4 could not be written" in " ".join(full.stderr.split())
        assert [step for step, _ in states_in(disk / "run")] == [2]
        assert not list((disk / "run" / "train_state").glob(".*"))
        subprocess.run(["mount", "-o", f"remount,size={9 * state // 1024}k", str(disk)], check=True)
        again = launch(tmp_path, settings)
        assert again.returncode == 0, again.stderr
        assert "continuing after step 2" in again.stderr
        assert metrics_of(disk / "run") == metrics_of(tmp_path / "whole")


def newest(run_dir: Path) -> int:
    return max((step for step, _ in states_in(run_dir)), default=0)


def wait_until(condition: Callable[[], Any], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def children_of(pid: int) -> list[int]:
    """Processes that a process started, oldest first."""
    return sorted(int(number) for number in Path(f"/proc/{pid}/task/{pid}/children").read_text().split())


def test_checkpoints_on_request_are_what_the_run_would_have_ended_with(tmp_path: Path) -> None:
    settings = make_run(tmp_path, max_steps=4, checkpoint_steps=2, save_minutes=1e-6)
    settings |= {"lr_scheduler": "constant", "warmup_steps": 0}
    stages.train(MidtrainRecipe(**settings), lambda _progress: None)
    assert [step for step, _ in states_in(tmp_path / "run")] == [3, 4], "a state after each step: a minute is long past"
    short = {**settings, "max_steps": 2, "output_dir": str(tmp_path / "short")}
    stages.train(MidtrainRecipe(**short), lambda _progress: None)
    one = load_file(tmp_path / "run" / "checkpoint-2" / "model.safetensors")
    two = load_file(tmp_path / "short" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(one[name], two[name]) for name in two)
    assert not (tmp_path / "run" / "checkpoint-4").exists(), "the last is `checkpoint`"


def test_a_transformers_too_old_for_several_processes_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_5_17(fsdp_size: int, ep_size: int) -> None:
        raise AssertionError("it is asked for replicas too")

    monkeypatch.setattr("transformers.distributed.DistributedConfig", of_5_17)
    with pytest.raises(UserError, match="needs a newer transformers") as raised:
        sharding(fsdp=2, replicas=1, experts=1)
    assert "5.23" in str(raised.value.expected)


@pytest.mark.slow
@pytest.mark.parametrize("parallel", [{}, {"context_parallel": 2}], ids=["fsdp", "context"])
def test_evaluation_and_the_load_balancing_loss_run_in_several_processes(
    parallel: dict[str, int], tmp_path: Path
) -> None:
    held_out = {"datasets": [{"path": str(tmp_path / "data.jsonl")}], "rows": 2, "prompts": 1, "new_tokens": 6}
    settings = make_run(tmp_path, "qwen3_moe", micro_batch_size=1, max_steps=4, parallel=parallel)
    done = launch(tmp_path, {**settings, "evaluation": {**held_out, "steps": 2}, "moe": {"aux_loss_coef": 0.1}})
    assert done.returncode == 0, done.stderr
    last = metrics_of(tmp_path / "run")[-1]
    assert last["evaluation"]["tokens_per_forward"] >= 1
    assert last["moe"]["aux_loss"] > 0
