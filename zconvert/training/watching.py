"""What looks on at a run, by its recipe."""

from __future__ import annotations

from typing import Any

from zconvert.data.packing import Batch, PackedRows
from zconvert.training.loop import Progress, Trainer
from zconvert.training.moe import MoeObserver
from zconvert.training.observers import Observer
from zconvert.training.routing import routers_of


def observers_of(trainer: Trainer, tokenizer: Any) -> list[Observer]:
    """The observers that the recipe asks for.

    Args:
        trainer: with base_model's weights, before its run.
        tokenizer: of the checkpoint.
    """
    recipe, model = trainer.recipe, trainer.layout_model

    def say(text: str) -> None:
        trainer.on_progress(Progress(message=text))

    observers: list[Observer] = []
    if routers_of(model.decoder):
        observers.append(MoeObserver(model, recipe.moe, _probe(trainer), say))
    return observers


def _probe(trainer: Trainer) -> Batch:
    """The first rows of the run's data, whatever the run has read of it."""
    rows = trainer.rows
    return PackedRows(
        rows.documents,
        sequence_len=rows.sequence_len,
        rows=rows.rows,
        seed=rows.seed,
        sample_packing=rows.sample_packing,
        pad_token_id=rows.pad_token_id,
    ).next_batch()
