"""Which gated parts and which objective give the longest accepted text: one table, all rows from the same budget.

    python benchmarks/gated_ablation.py --base examples/tiny-zaya/checkpoint --data out/quickstart/train.jsonl \
        --prompts out/quickstart/prompts.jsonl --out out/ablation --steps 300

Each row converts, trains and decodes by the commands that a user types, in processes of their own. Tokens per forward
are those of lossless greedy decoding; `source` counts the prompts whose text is the source's. A step's time is the best
of the windows between two reports, so that another job on the machine does not count. Rows that `--out` holds already
are kept: started again, it goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from safetensors import safe_open

from zconvert.checkpoint.headers import read_headers
from zconvert.tidar.settings import GATED_FILE

KL = {"objective": "forward_kl"}


def gated(**parts: Any) -> dict[str, Any]:
    """The `diffusion:` section of a convert-init recipe."""
    return {"mode": "gated", "gated": parts}


ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "full, data": ({}, {}),
    "full, forward KL": ({}, KL),
    "gated: rank 16, replace 384, forward KL": (gated(), {}),
    "the same, data": (gated(), {"objective": "data"}),
    "the same, total variation": (gated(), {"objective": "total_variation"}),
    "rank 32": (gated(rank=32), {}),
    "no low rank": (gated(rank=0), {}),
    "replace 128": (gated(mlp_width=128), {}),
    "add 384": (gated(mlp="add"), {}),
    "add 384, router": (gated(mlp="add", router=True), {}),
    "no diffusion expert": (gated(mlp="none"), {}),
    "norms": (gated(norms=True), {}),
    "no mask embedding": (gated(mask_embedding=False), {}),
}
"""what is converted, and how it is trained"""


def main() -> None:
    """Runs the rows that are missing and prints the table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--base", type=Path, required=True, help="source checkpoint")
    parser.add_argument("--data", type=Path, required=True, help="JSONL to train on")
    parser.add_argument("--prompts", type=Path, required=True, help="JSONL of held-out prompts")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rows", type=int, default=8, help="rows a step")
    parser.add_argument("--length", type=int, default=192, help="clean tokens a row")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--proposals", type=int, nargs="*", default=[1, 3, 5, 8])
    parser.add_argument("--full-lr", type=float, default=1.2e-3)
    parser.add_argument("--gated-lr", type=float, default=4e-3)
    parser.add_argument("--num-prompts", type=int, default=50)
    parser.add_argument("--only", nargs="*", help="parts of the names of the rows to run")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for name in ROWS:
        path = result_path(args.out, name)
        if not path.exists() and (not args.only or any(part in name for part in args.only)):
            print(f"# {name}", flush=True)
            path.write_text(json.dumps(measure(name, args), indent=2) + "\n")
    show(args.out, args.num_prompts)


def result_path(out: Path, name: str) -> Path:
    """Where a row's figures are kept."""
    return out / ("".join(c if c.isalnum() else "-" for c in name) + ".json")


def measure(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Converts, trains and decodes one row."""
    diffusion, training = ROWS[name]
    folder = args.out / "run"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    initial = {
        "base_model": str(args.base),
        "output_dir": str(folder / "init"),
        "diffusion": {"block_size": args.block_size, "proposals": args.proposals, **diffusion},
    }
    is_gated = diffusion.get("mode") == "gated"
    midtrain = {
        "base_model": str(folder / "init"),
        "output_dir": str(folder / "run"),
        "datasets": [{"path": str(args.data)}],
        "sequence_len": args.length,
        "micro_batch_size": args.rows,
        "max_steps": args.steps,
        "learning_rate": args.gated_lr if is_gated else args.full_lr,
        "warmup_steps": 20,
        "min_lr_ratio": 0.01,
        "weight_decay": 0.0 if is_gated else 0.05,
        "save_steps": args.steps,
        "num_threads": 1,
        "diffusion": {"block_offset": "random", **training},
    }
    command("convert-init", write(folder / "init.yaml", initial))
    peak = command("midtrain", write(folder / "midtrain.yaml", midtrain))[1]
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    bench = json.loads(
        command(
            *("bench", folder / "run", "--prompts", args.prompts, "--num-prompts", args.num_prompts, "--threads", 1),
            *("--baseline", args.base, "--json"),
        )[0]
    )
    lossless = next(entry for entry in bench["results"] if entry["sampler"] == "lossless")
    return {
        "tokens_per_forward": lossless["tokens_per_forward"],
        "speedup": lossless["speedup"],
        "identical_to_source": lossless["identical_to_baseline"],
        "identical_to_ar": lossless["identical_prompts"],
        "trained_weights": trained_weights(folder / "run"),
        "step_seconds": min(b["seconds"] / (b["step"] - a["step"]) for a, b in pairwise(lines)),
        "peak_memory": peak,
        "steps": args.steps,
    }


def trained_weights(run: Path) -> int:
    """Numbers that training moves."""
    checkpoint = run / "checkpoint"
    path = checkpoint / GATED_FILE
    if path.exists():
        with safe_open(path, framework="np") as file:
            return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return sum(math.prod(tensor.shape) for tensor in read_headers(checkpoint).tensors.values())


def write(path: Path, recipe: dict[str, Any]) -> Path:
    """Writes a recipe."""
    path.write_text(yaml.safe_dump(recipe))
    return path


def command(*arguments: object) -> tuple[str, int]:
    """Runs one command; returns its stdout and its peak memory in bytes."""
    words = [sys.executable, "-m", "zconvert", *map(str, arguments)]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert process.stdout is not None
        stdout = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            errors.seek(0)
            sys.exit(f"{' '.join(words)}\n{errors.read()}")
    return stdout, usage.ru_maxrss * 1024


def show(out: Path, prompts: int) -> None:
    """Prints what was measured as a Markdown table."""
    print("| | trained weights | tokens per forward | against AR | as the source | step, s | peak memory, MB |")
    print("|---|---|---|---|---|---|---|")
    for name in ROWS:
        path = result_path(out, name)
        if path.exists():
            r = json.loads(path.read_text())
            print(
                f"| {name} | {r['trained_weights'] / 1e6:.2f} M | {r['tokens_per_forward']:.2f} | {r['speedup']:.2f}× "
                f"| {r['identical_to_source']}/{prompts} | {r['step_seconds']:.2f} | {r['peak_memory'] / 1e6:.0f} |"
            )


if __name__ == "__main__":
    main()
