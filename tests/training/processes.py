"""Runs of several processes on one machine, started as torchrun starts them, and what their steps computed.

python -m tests.training.processes RECIPE.json RECORD.pt     (one process; the environment says which)
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.checkpoint.tiny import make_tokenizer
from tests.contracts.families import make_family_model
from tests.contracts.models import VOCAB
from tests.training.runs import make_data
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.settings import GatedParts
from zconvert.training import stages
from zconvert.training.loop import Trainer
from zconvert.training.observers import Observer

GLOBAL_ROWS = 4
"""rows of a step, however many processes share them"""
TWO = ["--", "--nproc_per_node=2"]


def make_family_run(folder: Path, model_type: str, gated: GatedParts | None = None, **changes: Any) -> dict[str, Any]:
    """A converted checkpoint of a family, its sliding windows and scales binding, and a recipe for two steps."""
    folder.mkdir(parents=True, exist_ok=True)
    model = make_family_model(model_type)
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):
            buffer[-1] = -1.0  # as ZAYA has it; transformers sets it so when it loads a model that is not sharded
    model.save_pretrained(folder / "source")
    make_tokenizer(VOCAB - 4).save_pretrained(folder / "source")
    convert_init(resolve(str(folder / "source")), folder / "init", block_size=4, gated=gated)
    return {
        "base_model": str(folder / "init"),
        "output_dir": str(folder / "run"),
        "datasets": [{"path": str(make_data(folder))}],
        "sequence_len": 32,
        "max_steps": 2,
        "learning_rate": 0.001,
        "loss_chunk_size": 20,
        "logging_steps": 1,
        "save_steps": 100,
        "diffusion": {"block_offset": "random", "bigram_tokens": 500},
        **changes,
    }


def for_processes(settings: dict[str, Any], world: int, **parallel: Any) -> dict[str, Any]:
    """The settings with the same rows in each step for so many processes."""
    readers = world // parallel.get("context_parallel", 1)
    micro = 1 if readers > 1 else 2
    return {
        **settings,
        # The load-balancing loss of a forward is over its own tokens: no two numbers of processes agree on it.
        "moe": {"aux_loss_coef": 0.0},
        "parallel": parallel,
        "micro_batch_size": micro,
        "gradient_accumulation_steps": GLOBAL_ROWS // (readers * micro),
    }


def start(command: list[str], world: int, log: Path) -> list[subprocess.Popen[bytes]]:
    """Starts the processes of a run as torchrun would; what they say goes into `log`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = []
    with log.open("wb") as file:
        for rank in range(world):
            env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            env |= {"WORLD_SIZE": str(world), "RANK": str(rank), "LOCAL_RANK": str(rank)}
            processes.append(subprocess.Popen(command, env=env, stdout=file, stderr=file))
    return processes


def finish(processes: list[subprocess.Popen[bytes]], seconds: float = 240) -> list[int | None]:
    """Waits until all have ended, or one has failed, whom the others would wait for; their exit codes."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code is not None for code in codes) or any(codes):
            break
        time.sleep(0.02)
    for process in processes:
        process.kill()
        process.wait()
    return codes


def launch(folder: Path, settings: dict[str, Any], stage: str = "midtrain") -> subprocess.CompletedProcess[str]:
    """Runs a stage in two processes, as a user would start them."""
    recipe = folder / "recipe.yaml"
    recipe.write_text(json.dumps(settings))
    command = [sys.executable, "-m", "zconvert", stage, str(recipe), *TWO]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def record(runs: dict[str, dict[str, Any]], world: int, folder: Path) -> dict[str, Any]:
    """Trains in so many processes, one run after another: starting them takes longer than tiny models take to train.

    Args:
        runs: settings by name.
        world: processes.
        folder: of the runs' folders.

    Returns:
        By name, the metrics and the whole gradients of each step, and how often gradients were reduced in all.
    """
    folder.mkdir(parents=True, exist_ok=True)
    recipes = folder / "recipes.json"
    recipes.write_text(
        json.dumps({name: {**settings, "output_dir": str(folder / name)} for name, settings in runs.items()})
    )
    if world == 1:
        train_all(recipes, folder)
        return {name: torch.load(folder / f"{name}.pt") for name in runs}
    log = folder / "log"
    codes = finish(start([sys.executable, "-m", "tests.training.processes", str(recipes), str(folder)], world, log))
    assert codes == [0] * world, log.read_text()
    return {name: torch.load(folder / f"{name}.pt") for name in runs}


class _Recorder(Observer):
    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.reductions = 0
        """of sharded gradients, by FSDP"""
        name = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"
        reduce_scatter = getattr(dist, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.reductions += 1
            return reduce_scatter(*args, **kwargs)

        setattr(dist, name, counted)

    def on_step(self, trainer: Trainer) -> None:  # type: ignore[override]
        named = trainer.trained.named_parameters()
        self.gradients.append({n: trainer.parallel.gathered(p.grad) for n, p in named if p.grad is not None})


def train_all(recipes: Path, folder: Path) -> None:
    """Trains one run after another, as one of their processes."""
    for name, settings in json.loads(recipes.read_text()).items():
        recorder, metrics = _Recorder(), []
        stages.train(MidtrainRecipe(**settings), lambda p, to=metrics: to.append(p.metrics), observers=[recorder])
        if os.environ.get("RANK", "0") == "0":
            rows = [row for row in metrics if row is not None]
            recorded = {"gradients": recorder.gradients, "metrics": rows, "reductions": recorder.reductions}
            torch.save(recorded, folder / f"{name}.pt")


if __name__ == "__main__":
    dist.init_process_group("gloo")  # once for all runs
    train_all(Path(sys.argv[1]), Path(sys.argv[2]))
    dist.destroy_process_group()
