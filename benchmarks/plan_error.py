"""How far `plan --calibrate` is from what the same machine measures in the same run, on the quickstart's model.

    OMP_NUM_THREADS=1 python benchmarks/plan_error.py

Needs a machine with little else to do: times are compared. docs/planning.md has the figures; the aim is 20 %.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.evaluation.bench import bench, points
from zconvert.planning.calibrate import against_bench, calibrate, errors
from zconvert.planning.model import facts_from_config
from zconvert.tidar.generate import layout_model_of

SOURCE = Path(__file__).parent.parent / "examples" / "tiny-zaya" / "checkpoint"


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


def worst(rows: Iterable[dict[str, Any]], key: str = "error") -> float:
    """The largest error, whatever its sign; 0 where there is none."""
    return max((abs(row[key]) for row in rows if key in row), default=0.0)


if __name__ == "__main__":
    main()
