"""A checkpoint tells every stage that it went through, with its recipe and the tokens it saw."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.training.runs import make_run
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.loop import Interrupted, Progress


def test_a_run_that_was_interrupted_tells_all_the_tokens_that_it_saw(tmp_path: Path) -> None:
    settings = make_run(tmp_path, "mixtral", max_steps=5, save_steps=2)
    recipe = MidtrainRecipe.model_validate(settings)

    def stop(progress: Progress) -> None:
        if progress.metrics is not None and progress.metrics["step"] == 3:
            raise KeyboardInterrupt

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        stages.train(recipe, stop)
    final = stages.train(recipe, lambda _: None)
    document = json.loads((final / "provenance.json").read_text())
    before, entry = document["history"]
    assert (before["stage"], entry["stage"]) == ("convert-init", "midtrain")
    assert entry["steps"] == 5
    assert entry["tokens_seen"] == 5 * 2 * 2 * 32  # rows of 32 tokens: two a batch, two batches a step
    assert MidtrainRecipe.model_validate(entry["recipe"]) == recipe
