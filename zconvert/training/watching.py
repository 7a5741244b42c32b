"""What looks on at a run, by its recipe."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from zconvert.checkpoint.load import end_token_ids
from zconvert.data.loading import load_documents, read_template
from zconvert.data.packing import Batch
from zconvert.training.evaluating import Evaluator, held_out_prompts, held_out_rows
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
        observers.append(MoeObserver(model, recipe.moe, _probe(trainer), say, trainer.alone))
    if recipe.evaluation.datasets:
        observers.append(_evaluator(trainer, tokenizer, say))
    return observers


def _evaluator(trainer: Trainer, tokenizer: Any, say: Callable[[str], None]) -> Evaluator:
    section, model = trainer.recipe.evaluation, trainer.model
    rows_in_embedding = model.get_input_embeddings().weight.shape[0]
    documents = load_documents(
        section.datasets,
        tokenizer,
        vocabulary_rows=rows_in_embedding,
        sequence_len=trainer.recipe.sequence_len,
        chat_template=read_template(trainer.recipe),
        on_message=say,
    )
    return Evaluator(
        held_out_rows(
            documents,
            rows=section.rows,
            sequence_len=trainer.recipe.sequence_len,
            rows_per_batch=trainer.recipe.micro_batch_size,
            pad=tokenizer.pad_token_id or 0,
        ),
        held_out_prompts(documents, prompts=section.prompts, prompt_tokens=section.prompt_tokens),
        steps=section.steps,
        new_tokens=section.new_tokens,
        eos_token_ids=end_token_ids(model, tokenizer),
    )


def _probe(trainer: Trainer) -> Batch:
    """The run's first rows, which it reads again."""
    start = trainer.rows.state_dict()
    batch = trainer.rows.next_batch()
    trainer.rows.load_state_dict(start)
    return batch
