"""How far `plan --calibrate` is from what the same machine measures in the same run, on the quickstart's model.

    OMP_NUM_THREADS=1 python benchmarks/plan_error.py

Needs a machine with little else to do: times are compared. docs/planning.md has the figures; the aim is 20 %. Steps of
training, by the quickstart's recipes, are compared in processor time; there the aim is a factor of two.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.evaluation.bench import bench, points
from zconvert.planning.calibrate import against_bench, calibrate, errors, measure_machine, training_efficiency
from zconvert.planning.layouts import Layout
from zconvert.planning.model import facts_from_config
from zconvert.planning.step_time import step_time
from zconvert.planning.target import find_target
from zconvert.planning.workload import workload_of
from zconvert.recipe import ConvertInitRecipe, DatasetRecipe, MidtrainRecipe, load_recipe
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.settings import GatedParts
from zconvert.training.stages import train

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "examples" / "tiny-zaya" / "checkpoint"
STEPS = 30


def main() -> None:
    """Calibrates, measures and prints the largest errors."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        converted = Path(folder) / "init"
        convert_init(resolve(SOURCE), converted, block_size=16)
        source = resolve(converted)
        model, tokenizer = load_model(source, dtype="float32", device="cpu")
        config = json.loads((converted / "config.json").read_text())
        shape, layouts = facts_from_config(config, "tiny"), layout_model_of(model)
        calibrated = calibrate(config, whole=layouts)
        prompts = [tokenizer(text)["input_ids"] for text in ("Mia has 27 apples.", "Ben had 8 pens and lost 3.")]
        settings = require_converted(source)
        wanted = points(max_new_tokens=(64,), proposals=((1, 3, 5, 8),), rivals=())
        measured = bench(layouts, prompts, settings, wanted)
        rows = against_bench(shape, calibrated, measured)
    print(f"forwards of 1 to 272 tokens  {worst(errors(shape, calibrated, 4)):.0%}")
    print(f"steps of bench               {worst(rows):.0%}")
    print(f"speedups of bench            {worst(rows, 'speedup_error'):.0%}")
    for recipes in ("quickstart", "quickstart-gated"):
        predicted, trained = training(ROOT / "recipes" / recipes)
        print(f"a step of {recipes:18} {predicted / trained - 1:+.0%} of {trained:.2f} s of the processor")


def worst(rows: Iterable[dict[str, Any]], key: str = "error") -> float:
    """The largest error, whatever its sign; 0 where there is none."""
    return max((abs(row[key]) for row in rows if key in row), default=0.0)


def training(recipes: Path) -> tuple[float, float]:
    """Processor seconds of a step of midtrain on one thread: predicted, and measured."""
    diffusion = load_recipe(recipes / "convert-init.yaml", ConvertInitRecipe).diffusion
    gated = GatedParts(**diffusion.gated.model_dump()) if diffusion.mode == "gated" else None
    with tempfile.TemporaryDirectory() as name, mock.patch("time.perf_counter", time.process_time):
        folder = Path(name)
        convert_init(resolve(SOURCE), folder / "init", block_size=diffusion.block_size, gated=gated)
        (folder / "text.jsonl").write_text(json.dumps({"text": "Mia has 27 apples. " * 8}) + "\n")
        changes = {
            "base_model": str(folder / "init"),
            "output_dir": str(folder / "run"),
            "datasets": [DatasetRecipe(path=str(folder / "text.jsonl"))],
            "max_steps": STEPS,
            "num_threads": 1,
        }
        recipe = load_recipe(recipes / "midtrain.yaml", MidtrainRecipe).model_copy(update=changes)
        facts, work = find_target(recipe.base_model).facts, workload_of(recipe, diffusion.block_size, gated)
        model, _ = load_model(resolve(recipe.base_model), dtype="float32", device="cpu")
        machine = measure_machine("cpu", "float32", facts.stored_bytes)
        reached = training_efficiency(layout_model_of(model), facts, work, machine)
        machine = machine.model_copy(update={"training_efficiency": reached})
        train(recipe, lambda _: None)
        last = json.loads((folder / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    return step_time(facts, work, Layout(), machine).total, last["seconds"] / recipe.logging_steps


if __name__ == "__main__":
    main()
