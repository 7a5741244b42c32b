"""A tiny converted checkpoint and a recipe for it: a run of some seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import make_checkpoint
from tests.contracts.models import random_ids
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.recipe import TrainingRecipe
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.engine import decode
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.model import LayoutModel
from zconvert.training import stages
from zconvert.training.loop import Progress

TIMINGS = ("seconds", "tokens_per_second")


def make_run(folder: Path, model_type: str = "zaya", *, spare_rows: int = 4, **changes: Any) -> dict[str, Any]:
    """Makes source, data and converted checkpoint in `folder`; returns the recipe's settings."""
    folder.mkdir(parents=True, exist_ok=True)
    source = folder / "source"
    make_checkpoint(source, model_type, spare_rows=spare_rows)
    convert_init(resolve(str(source)), folder / "init", block_size=4)
    return {
        "base_model": str(folder / "init"),
        "output_dir": str(folder / "run"),
        "seed": 3,
        "datasets": [{"path": str(make_data(folder))}],
        "sequence_len": 32,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "max_steps": 30,
        "learning_rate": 0.01,
        "warmup_steps": 3,
        "loss_chunk_size": 50,
        "logging_steps": 1,
        "save_steps": 4,
        "diffusion": {"block_offset": "random", "bigram_tokens": 500},
        **changes,
    }


def make_data(folder: Path) -> Path:
    """Eight documents of different lengths."""
    texts = ["the cat sat on the mat. " * n for n in (1, 2, 3, 1, 2, 1, 3, 2)]
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def metrics_of(run_dir: Path) -> list[dict[str, Any]]:
    """The rows of metrics.jsonl without what depends on the clock."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in rows]


def train_until(recipe: TrainingRecipe, step: int) -> None:
    """Trains; the power is cut as the metrics of a step are told."""

    class PowerCut(Exception):
        pass

    def cut(progress: Progress) -> None:
        if progress.metrics is not None and progress.metrics["step"] == step:
            raise PowerCut

    with pytest.raises(PowerCut):
        stages.train(recipe, cut)


def assert_decodes_the_text_of(source: Path, trained: Path) -> None:
    """Lossless decoding of a gated checkpoint gives the text that its source gives by itself."""
    plain, _ = load_model(resolve(source), dtype="float32", device="cpu")
    model, _ = load_model(resolve(trained), dtype="float32", device="cpu")
    tidar, prompt = require_converted(resolve(trained)), random_ids((6,), seed=1).tolist()
    lossless = DecodePlan.tidar(tidar, Sampling(), frozenset())
    causal = DecodePlan.autoregressive(tidar.mask_token_id, Sampling(), frozenset())
    text = [token for step in decode(layout_model_of(model), prompt, lossless, 16) for token in step.tokens]
    assert text == [token for step in decode(LayoutModel(plain), prompt, causal, 16) for token in step.tokens]
