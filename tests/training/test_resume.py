"""A run that was stopped and started again is the run that never stopped, bit for bit."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.disk import small_disk
from tests.faults.commands import contents
from tests.training.killing import MOMENTS
from tests.training.runs import make_run, metrics_of
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.loop import Progress
from zconvert.training.metrics import metrics_file
from zconvert.training.parallel import Parallel
from zconvert.training.state import check_start, load_latest, load_start, load_state, save_state, states_in


def _train(settings: dict[str, Any]) -> Path:
    return stages.train(MidtrainRecipe(**settings), lambda _progress: None)


def _weights(checkpoint: Path) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / "model.safetensors")


def _same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    settings = make_run(folder, save_dtype="float32")
    # Forwards that draw at random: they go on where they were only if a state holds torch's random numbers.
    config = Path(settings["base_model"]) / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "attention_dropout": 0.1}))
    return settings, _train(settings)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_run_killed_and_started_again_equals_the_uninterrupted_one(
    number: signal.Signals, uninterrupted: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    settings, expected = uninterrupted
    run_dir = tmp_path / "run"
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(json.dumps({**settings, "output_dir": str(run_dir)}))
    command = [sys.executable, "-m", "zconvert", "midtrain", str(recipe)]

    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=_environment())
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        written = (run_dir / "metrics.jsonl").read_bytes().count(b"\n") if (run_dir / "metrics.jsonl").exists() else 0
        if written >= 9:
            process.send_signal(number)
            break
        time.sleep(0.005)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number), errors.decode()
    assert not (run_dir / "checkpoint").exists()
    assert len(metrics_of(run_dir)) < settings["max_steps"]

    again = subprocess.run(command, capture_output=True, env=_environment(), timeout=120)
    assert again.returncode == 0, again.stderr.decode()
    assert b"continuing after step" in again.stderr
    assert metrics_of(run_dir) == metrics_of(expected.parent)
    assert _same(_weights(run_dir / "checkpoint"), _weights(expected))


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a minute where nothing else runs
def test_a_run_killed_twenty_times_at_its_start_in_steps_and_in_saves_equals_the_uninterrupted_one(
    tmp_path: Path,
) -> None:
    command = [sys.executable, "-m", "tests.training.killing", str(tmp_path), "20"]
    killing = subprocess.run(command, capture_output=True, text=True, env=_environment())
    assert killing.returncode == 0, killing.stderr
    met = json.loads(killing.stdout)
    assert min(met[moment] for moment in MOMENTS) >= 3, met
    run_dir, whole = tmp_path / "run", tmp_path / "whole"
    assert not list(run_dir.rglob(".*")), "what a kill left is cleaned up"
    assert metrics_of(run_dir) == metrics_of(whole)
    assert _same(_weights(run_dir / "checkpoint"), _weights(whole / "checkpoint"))


def _environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1"}


def test_another_seed_gives_another_run(uninterrupted: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    settings, expected = uninterrupted
    other = _train({**settings, "seed": 4, "output_dir": str(tmp_path / "run")})
    assert metrics_of(other.parent) != metrics_of(expected.parent)


def test_a_complete_run_is_not_overwritten(uninterrupted: tuple[dict[str, Any], Path]) -> None:
    with pytest.raises(UserError, match="this run is complete"):
        _train(uninterrupted[0])


ALONE = Parallel()


@pytest.mark.parametrize("file", ["state.pt", "shard-00001-model-00001-of-00001.safetensors", "manifest.json"])
@pytest.mark.parametrize("damage", ["cut", "changed", "missing"])
def test_a_damaged_newest_state_falls_back_to_the_one_before(file: str, damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        save_state(tmp_path, step, {"step": step}, {"weight": torch.full((9,), float(step))}, 2, ALONE)
    newest = states_in(tmp_path)[-1][1] / file
    content = newest.read_bytes()
    if damage == "missing":
        newest.unlink()
    else:
        newest.write_bytes(content[:-20] if damage == "cut" else content[:-9] + b"x" + content[-8:])
    warnings: list[str] = []
    state = load_latest(tmp_path, warnings.append, ALONE)
    assert state is not None
    assert state.numbers == {"step": 1}
    weight = torch.zeros(9)
    state.read_into({"weight": weight}, ALONE)
    assert torch.equal(weight, torch.ones(9))
    assert len(warnings) == 1
    assert "damaged" in warnings[0]


def test_only_the_newest_states_are_kept(tmp_path: Path) -> None:
    for step in range(1, 6):
        save_state(tmp_path, step, {"step": step}, {"weight": torch.ones(1)}, 2, ALONE)
    assert [step for step, _ in states_in(tmp_path)] == [4, 5]
    assert not list((tmp_path / "train_state").glob(".*"))


def test_a_run_never_starts_behind_its_own_newest_state(
    uninterrupted: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    settings, checkpoint = uninterrupted
    run_dir = tmp_path / "run"
    shutil.copytree(checkpoint.parent, run_dir, ignore=shutil.ignore_patterns("checkpoint"))
    *_, (_, earlier), (_, newest) = states_in(run_dir)
    before = contents(run_dir)
    for wanted in ("never", str(earlier)):
        with pytest.raises(UserError, match="has later train states") as caught:
            _train({**settings, "output_dir": str(run_dir), "resume_from_checkpoint": wanted})
        assert str(newest) in str(caught.value.found)
    assert contents(run_dir) == before


def test_another_runs_state_counts_until_there_is_one_of_its_own(tmp_path: Path) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    named = str(save_state(one, 5, {"step": 5}, {"weight": torch.ones(1)}, 2, ALONE))
    for step in (5, 6):
        check_start(named, other)
        state = load_start(named, other, pytest.fail, ALONE)
        assert state is not None
        assert state.numbers == {"step": step}
        save_state(other, step + 1, {"step": step + 1}, {"weight": torch.ones(1)}, 2, ALONE)


def test_a_name_without_a_state_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="names no train state: elsewhere/step-00000007"):
        check_start("elsewhere/step-00000007", tmp_path)


def test_a_state_that_holds_code_is_refused(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, {"step": 1}, {"weight": torch.ones(1)}, 1, ALONE)
    torch.save({"step": Path("x")}, folder / "state.pt")
    manifest = json.loads((folder / "manifest.json").read_text())
    content = (folder / "state.pt").read_bytes()
    manifest["state.pt"] = [len(content), zlib.crc32(content)]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    warnings: list[str] = []
    assert load_latest(tmp_path, warnings.append, ALONE) is None
    assert "UnpicklingError" in warnings[0]


def test_a_state_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_state(tmp_path, 1, {"step": 1}, {"weight": torch.ones(1)}, 1, ALONE)
    with pytest.raises(UserError, match="is not of this model"):
        load_state(folder, ALONE).read_into({"other": torch.ones(1)}, ALONE)


def test_a_loss_that_is_not_a_number_stops_the_run_and_keeps_the_last_state(tmp_path: Path) -> None:
    settings = make_run(tmp_path, learning_rate=0.99, warmup_steps=0, max_grad_norm=1e30, max_steps=200)
    settings |= {"adam_epsilon": 1e-30, "weight_decay": 0.0}
    poisoned = tmp_path / "poisoned"
    Path(settings["base_model"]).rename(poisoned)
    weights = load_file(poisoned / "model.safetensors")
    weights["model.norm.weight"].fill_(float("nan"))
    from safetensors.torch import save_file

    save_file(weights, poisoned / "model.safetensors", metadata={"format": "pt"})
    settings["base_model"] = str(poisoned)
    with pytest.raises(UserError, match="the loss is nan"):
        _train(settings)
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_a_full_disk_stops_the_run_with_one_error_and_it_goes_on_once_there_is_space(
    uninterrupted: tuple[dict[str, Any], Path], tmp_path: Path
) -> None:
    settings, checkpoint = uninterrupted
    reference = checkpoint.parent
    state = sum(path.stat().st_size for path in (reference / "train_state" / "step-00000030").iterdir())
    with small_disk(tmp_path / "disk", f"{(2 * state + state // 2) // 1024}k") as disk:
        run_dir = disk / "run"
        settings = {**settings, "output_dir": str(run_dir), "save_total_limit": 3}
        with pytest.raises(UserError, match="could not be written"):
            _train(settings)
        assert [step for step, _ in states_in(run_dir)] == [4, 8]
        assert not list((run_dir / "train_state").glob(".*"))
        assert not (run_dir / "checkpoint").exists()
        subprocess.run(["mount", "-o", f"remount,size={9 * state // 1024}k", str(disk)], check=True)
        _train(settings)
        assert metrics_of(run_dir) == metrics_of(reference)
        assert (run_dir / "checkpoint" / "model.safetensors").exists()


def test_a_row_of_metrics_of_which_the_disk_takes_a_part_is_an_error(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    with metrics_file(tmp_path, 0) as add:
        add({"step": 1})
        size = (tmp_path / "metrics.jsonl").stat().st_size
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limit[1]))
        try:
            with pytest.raises(UserError, match="cannot be written"):
                add({"step": 2})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    with metrics_file(tmp_path, 1) as add:
        add({"step": 2})
    assert metrics_of(tmp_path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("free", ["0k", "12k"])
def test_a_disk_that_is_full_from_the_start_is_said_to_be_so(tmp_path: Path, free: str) -> None:
    settings = make_run(tmp_path)
    with small_disk(tmp_path / "disk", "1m") as disk:
        (disk / "filler").write_bytes(b"x" * (1024**2 - int(free[:-1]) * 1024))
        with pytest.raises(UserError, match=r"(disk is full|could not be written)"):
            _train({**settings, "output_dir": str(disk / "run")})
        assert not (disk / "run" / "checkpoint").exists()


def test_an_output_dir_that_is_a_file_is_refused(tmp_path: Path) -> None:
    settings = make_run(tmp_path)
    Path(settings["output_dir"]).write_text("not a folder")
    with pytest.raises(UserError, match="is a file"):
        _train(settings)


@pytest.mark.parametrize("optimizer", ["muon", pytest.param("adamw_8bit", marks=pytest.mark.slow)])
def test_the_state_of_every_optimizer_resumes_bit_for_bit(optimizer: str, tmp_path: Path) -> None:
    if optimizer == "adamw_8bit":
        pytest.importorskip("torchao")
    settings = make_run(tmp_path, "qwen3_moe", optimizer=optimizer, max_steps=6, save_steps=3, save_dtype="float32")

    def stop_at_four(progress: Progress) -> None:
        if progress.metrics is not None and progress.metrics["step"] == 4:
            raise KeyboardInterrupt

    whole = _train({**settings, "output_dir": str(tmp_path / "whole")})
    with pytest.raises(KeyboardInterrupt):
        stages.train(MidtrainRecipe(**settings), stop_at_four)
    resumed = _train(settings)
    assert metrics_of(resumed.parent) == metrics_of(whole.parent)
    assert _same(_weights(whole), _weights(resumed))
