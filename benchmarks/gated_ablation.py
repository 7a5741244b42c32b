"""Which gated parts and which objective give the longest accepted text: one table, all rows from the same budget.

    OMP_NUM_THREADS=1 python benchmarks/gated_ablation.py --base examples/tiny-zaya/checkpoint \
        --data out/quickstart/train.jsonl --prompts out/quickstart/prompts.jsonl --out out/ablation --steps 250

Each row converts, trains and decodes by the commands that a user types, in processes of their own. Tokens per forward
are those of lossless greedy decoding; `source` counts the prompts whose text is the source's. Rows that `--out` holds
already are kept: started again, it goes on.

`--costs` measures what a step costs instead, all rows in turn, each in a process of its own: the process's CPU time on
one thread, which another job on the machine lengthens little, as the best of windows of ten steps; and the peak of its
memory. Called again, it adds a round.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import resource
import shutil
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from zconvert.checkpoint.headers import read_headers
from zconvert.tidar.settings import GATED_FILE

COST_WINDOW = 10
"""steps"""
DATA, KL, TOTAL_VARIATION = "data", "forward_kl", "total_variation"


@dataclass(frozen=True)
class Row:
    """What is converted, and by which objectives it is trained."""

    diffusion: dict[str, Any]
    """of the convert-init recipe"""
    objective: str = KL
    last_objective: str | None = None
    """of a second midtrain, which has a fifth of the steps and a quarter of the learning rate"""


def gated(objective: str = KL, last_objective: str | None = None, **parts: Any) -> Row:
    """A gated row: the reference's parts but for those that are given."""
    return Row({"mode": "gated", "gated": {"rank": 16, "mlp_width": 384, **parts}}, objective, last_objective)


ROWS = {
    "full, data": Row({}, DATA),
    "full, forward KL": Row({}),
    "gated: rank 16, replace 384, forward KL": gated(),
    "the same, data": gated(DATA),
    "the same, total variation": gated(TOTAL_VARIATION),
    "the same, total variation after KL": gated(KL, TOTAL_VARIATION),
    "the same, KL after KL": gated(KL, KL),
    "rank 32": gated(rank=32),
    "rank 64": gated(rank=64),
    "no low rank": gated(rank=0),
    "replace 128": gated(mlp_width=128),
    "add 384": gated(mlp="add"),
    "add 384, router": gated(mlp="add", router=True),
    "no diffusion expert": gated(mlp="none"),
    "norms": gated(norms=True),
    "no mask embedding": gated(mask_embedding=False),
}


def main() -> None:
    """Runs the rows that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", type=Path, required=True, help="source checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="JSONL to train on")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of held-out prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--length", type=int, default=192, help="clean tokens a row")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--proposals", type=int, nargs="*", default=[1, 3, 5, 8])
    parser.add_argument("--full-lr", type=float, default=1.2e-3)
    parser.add_argument("--gated-lr", type=float, default=4e-3)
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--costs", action="store_true", help="measure time and memory of a step instead")
    parser.add_argument("--only", nargs="*", help="parts of the names of the rows to run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in ROWS if not args.only or any(part in name for part in args.only)]
    for name in names:
        path = result_path(args.out, name)
        figures = json.loads(path.read_text()) if path.exists() else {}
        if args.costs or "steps" not in figures:
            print(f"# {name}", flush=True)
            if args.costs:
                seconds, figures["peak_memory"] = cost(ROWS[name], args)
                figures["step_cpu_seconds"] = [*figures.get("step_cpu_seconds", []), seconds]
            else:
                figures |= measure(ROWS[name], args)
            path.write_text(json.dumps(figures, indent=2) + "\n")
    show(args.out, args.num_prompts)


def result_path(out: Path, name: str) -> Path:
    """Where a row's figures are kept."""
    return out / ("".join(c if c.isalnum() else "-" for c in name) + ".json")


def measure(row: Row, args: argparse.Namespace) -> dict[str, Any]:
    """Converts, trains and decodes one row."""
    folder = args.out / "run"
    last_steps = args.steps // 5 if row.last_objective else 0
    recipe = convert(row, folder, args)
    command("midtrain", write(recipe, max_steps=args.steps - last_steps))
    run = Path(recipe["output_dir"])
    if row.last_objective:
        recipe |= {"base_model": str(run / "checkpoint"), "output_dir": str(folder / "last"), "seed": 1}
        recipe["learning_rate"] /= 4
        recipe["diffusion"]["objective"] = row.last_objective
        command("midtrain", write(recipe, max_steps=last_steps))
        run = folder / "last"
    bench = json.loads(
        command(
            *("bench", run, "--prompts", args.prompts, "--num-prompts", args.num_prompts, "--threads", 1),
            *("--baseline", args.base, "--json"),
        )
    )
    lossless = next(entry for entry in bench["results"] if entry["sampler"] == "lossless")
    return {
        "tokens_per_forward": lossless["tokens_per_forward"],
        "speedup": lossless["speedup"],
        "identical_to_source": lossless["identical_to_baseline"],
        "identical_to_ar": lossless["identical_prompts"],
        "trained_weights": trained_weights(run),
        "steps": args.steps,
    }


def convert(row: Row, folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Converts a row's model in an emptied folder; returns the recipe that trains it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    initial = {
        "base_model": str(args.base),
        "output_dir": str(folder / "init"),
        "diffusion": {"block_size": args.block_size, "proposals": args.proposals, **row.diffusion},
    }
    command("convert-init", write(initial))
    is_gated = row.diffusion.get("mode") == "gated"
    return {
        "base_model": str(folder / "init"),
        "output_dir": str(folder / "run"),
        "datasets": [{"path": str(args.data)}],
        "sequence_len": args.length,
        "micro_batch_size": args.rows,
        "learning_rate": args.gated_lr if is_gated else args.full_lr,
        "warmup_steps": 20,
        "min_lr_ratio": 0.01,
        "weight_decay": 0.0 if is_gated else 0.05,
        "save_steps": args.steps,
        "num_threads": 1,
        "diffusion": {"block_offset": "random", "objective": row.objective},
    }


def cost(row: Row, args: argparse.Namespace) -> tuple[float, int]:
    """CPU seconds of a step, and the peak of memory in bytes of a process that trains and does nothing else."""
    recipe = convert(row, args.out / "costs", args) | {"max_steps": 3 * COST_WINDOW, "logging_steps": COST_WINDOW}
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(train_and_measure, recipe).result()


def train_and_measure(recipe: dict[str, Any]) -> tuple[float, int]:
    """Trains in this process; the first window does not count."""
    from zconvert.recipe import MidtrainRecipe
    from zconvert.training.stages import train

    clocks: list[float] = []

    def note(progress: Any) -> None:
        if progress.metrics is not None:
            clocks.append(time.process_time())

    train(MidtrainRecipe(**recipe), note)
    seconds = min(after - before for before, after in pairwise(clocks)) / COST_WINDOW
    return seconds, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def trained_weights(run: Path) -> int:
    """Numbers that training moves."""
    checkpoint = run / "checkpoint"
    path = checkpoint / GATED_FILE
    if path.exists():
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return sum(math.prod(tensor.shape) for tensor in read_headers(checkpoint).tensors.values())


def write(recipe: dict[str, Any], **more: Any) -> Path:
    """Writes a recipe beside its output."""
    recipe = recipe | more
    path = Path(recipe["output_dir"]).with_suffix(".yaml")
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(*arguments: object) -> str:
    """Runs one command; returns its stdout."""
    words = [sys.executable, "-m", "zconvert", *map(str, arguments)]
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(words)}\n{done.stderr}")
    return done.stdout


def show(out: Path, prompts: int) -> None:
    """Prints what was measured as a Markdown table."""
    print("| | trained weights | tokens per forward | against AR | as the source | step, CPU s | peak memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in ROWS:
        path = result_path(out, name)
        r = json.loads(path.read_text()) if path.exists() else {}
        if "steps" not in r:
            continue
        seconds, peak = "–", "–"
        if "step_cpu_seconds" in r:
            seconds, peak = f"{min(r['step_cpu_seconds']):.2f}", f"{r['peak_memory'] / 1e6:.0f}"
        print(
            f"| {name} | {r['trained_weights'] / 1e6:.2f} M | {r['tokens_per_forward']:.2f} | {r['speedup']:.2f}× "
            f"| {r['identical_to_source']}/{prompts} | {seconds} | {peak} |"
        )


if __name__ == "__main__":
    main()
