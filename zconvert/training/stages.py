"""The stages of the recipe: from a checkpoint and a recipe to a run folder with a new checkpoint in it."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.folder import own_folder, write_file
from zconvert.checkpoint.load import end_token_ids, load_model, load_tokenizer
from zconvert.checkpoint.run_folder import RUN_CHECKPOINT
from zconvert.checkpoint.source import Source, fingerprint, require_converted
from zconvert.checkpoint.weights import pieces_on_disk, save_gated, save_trained
from zconvert.data.documents import Documents
from zconvert.data.loading import first_example, load_documents, load_stream, read_template
from zconvert.data.packing import PackedRows
from zconvert.data.self_generated import Writer
from zconvert.data.streams import DocumentStream
from zconvert.errors import UserError
from zconvert.planning.out_of_memory import explained, too_little_for_training
from zconvert.recipe import ExtendContextRecipe, TrainingRecipe, dump_recipe
from zconvert.tidar.bigram import Bigrams
from zconvert.tidar.settings import TidarSettings
from zconvert.training.context import ContextExtension
from zconvert.training.implementations import choose_implementations
from zconvert.training.inputs import base_of, refuse_output, require_data
from zconvert.training.loop import Interrupted, OnProgress, Progress, Trainer
from zconvert.training.observers import Observer
from zconvert.training.parallel import Parallel
from zconvert.training.quantised import pack
from zconvert.training.state import check_start
from zconvert.training.trackers import Trackers
from zconvert.training.watching import observers_of

RECIPE_FILE = "recipe.yaml"
CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""transformers reads it before what tokenizer_config.json says"""


def train(recipe: TrainingRecipe, on_progress: OnProgress, observers: Sequence[Observer] = ()) -> Path:
    """Runs a training stage on a converted checkpoint.

    Args:
        recipe: of the stage.
        on_progress: is told what happens, in the first process.
        observers: look on beside those that the recipe asks for.

    Returns:
        The new checkpoint's folder, `output_dir/checkpoint`.

    Raises:
        UserError: bad input, or another process writes to `output_dir`; nothing is half-written.
        Interrupted: a signal came; the same call continues.
    """
    parallel = Parallel(recipe.parallel)
    run_dir = Path(recipe.output_dir)
    refuse_output(run_dir)
    with contextlib.ExitStack() as stack:
        parallel.together(lambda: stack.enter_context(own_folder(run_dir)) if parallel.first else None)
        parallel.together(lambda: check_start(recipe.resume_from_checkpoint, run_dir) if parallel.first else None)
        with explained(lambda said: too_little_for_training(recipe, parallel.world, said)):
            return _train(recipe, on_progress if parallel.first else _say_nothing, observers, parallel, stack)


def _train(
    recipe: TrainingRecipe,
    report: OnProgress,
    observers: Sequence[Observer],
    parallel: Parallel,
    at_the_end: contextlib.ExitStack,
) -> Path:
    """Does it in a folder that is held for this run."""
    run_dir = Path(recipe.output_dir)
    final = run_dir / RUN_CHECKPOINT
    trackers = Trackers(recipe)
    require_data(recipe)  # before hours of what comes ahead of some
    source = base_of(recipe)
    settings = require_converted(source)
    _check_parallel(recipe, settings, parallel)
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed + parallel.rank)  # dropout, if there is any, drops other units elsewhere
    extension = None
    if isinstance(recipe, ExtendContextRecipe):
        extension = ContextExtension(source, settings, recipe.context, run_dir, writes=parallel.first)
        _report_before(extension, recipe, parallel, report)
        if parallel.first:
            at_the_end.callback(extension.close)
            extension.make_source()
        parallel.gather(None)  # it is there when any process goes on
        source = extension.source
    model, tokenizer = _load(source, settings, recipe, parallel, report)
    if parallel.first:
        write_file(run_dir / RECIPE_FILE, dump_recipe(recipe))
    documents = _documents(recipe, source, settings, model, tokenizer, extension, report)
    rows = _read_rows(documents(), recipe, tokenizer, parallel)

    def tell(progress: Progress) -> None:
        if progress.metrics is not None and parallel.first:
            trackers.log(progress.metrics)
        report(progress)

    trainer = Trainer(model, rows, recipe, settings, tell, parallel)
    for line in choose_implementations(trainer.layout_model, recipe, parallel.device, parallel.context_parallel):
        report(Progress(message=line))
    trainer.observers += [*observers_of(trainer, tokenizer), *observers]
    trained = dataclasses.replace(
        settings, block_offset=recipe.diffusion.block_offset, stages=(*settings.stages, recipe.stage)
    )
    # Whoever talks to the new checkpoint writes conversations as it was trained on them.
    texts = {CHAT_TEMPLATE_FILE: template} if (template := read_template(recipe)) is not None else {}

    @cache
    def bigrams() -> Bigrams | None:
        if recipe.diffusion.bigram_tokens == 0:
            return None
        return count_bigrams(documents(), model.get_input_embeddings().weight.shape[0], recipe.diffusion.bigram_tokens)

    def save_checkpoint(folder: Path) -> None:
        report(Progress(message=f"writing {folder}"))
        entry = {
            "stage": recipe.stage,
            "recipe": recipe.model_dump(mode="json"),
            "steps": trainer.step,
            "tokens_seen": trainer.tokens_seen,
        }
        pieces = pieces_on_disk(model, parallel.gathered) if trainer.gated is None else iter(())
        if not parallel.first:
            collections.deque(pieces, maxlen=0)  # every process gives its shards
        elif trainer.gated is not None:
            save_gated(
                trainer.gated,
                source.folder,
                folder,
                settings=trained,
                extra_texts=texts,
                bigrams=bigrams(),
                entry=entry,
            )
        else:
            save_trained(
                model,
                source.folder,
                folder,
                settings=trained,
                dtype=recipe.save_dtype,
                extra_texts=texts,
                pieces=pieces,
                bigrams=bigrams(),
                entry=entry,
            )
        parallel.gather(None)  # it is there when any process goes on

    trainer.save_checkpoint = save_checkpoint
    try:
        trainer.run()
    except Interrupted:  # all processes together
        parallel.close()
        raise
    finally:
        trackers.finish()
    if extension is not None:
        after = extension
        measured = _measured_documents(recipe, tokenizer)
        trainer.alone(lambda: after.report_after(trainer.layout_model, measured))
    save_checkpoint(final)
    parallel.close()
    return final


def example(recipe: TrainingRecipe) -> tuple[str, list[tuple[str, bool]]]:
    """What a stage would train on first; nothing is written and no weights are loaded. See `first_example`."""
    return first_example(recipe, load_tokenizer(base_of(recipe, weights=False)))


def _load(
    source: Source, settings: TidarSettings, recipe: TrainingRecipe, parallel: Parallel, report: OnProgress
) -> tuple[Any, Any]:
    """The model to train, on its device, and its tokenizer."""
    if recipe.quantization is None:
        # What is trained is float32; a frozen source needs no more than the forward pass does.
        stored = settings.mode == "gated" and recipe.dtype == "bfloat16"
        model, tokenizer = parallel.load(source, "auto" if stored else "float32")
    else:
        _require_gated(source, settings)
        model, tokenizer = load_model(source, device="cpu")
        report(Progress(message=str(pack(model, recipe.quantization, parallel.device))))
    model.config.use_cache = False
    return model, tokenizer


def _documents(
    recipe: TrainingRecipe,
    source: Source,
    settings: TidarSettings,
    model: Any,
    tokenizer: Any,
    extension: ContextExtension | None,
    report: OnProgress,
) -> Callable[[], DocumentStream]:
    """Opens what the stage trains on, from its first document."""
    report(Progress(message=f"reading {', '.join(dataset.label for dataset in recipe.datasets)}"))
    generating = any(dataset.self_generated is not None for dataset in recipe.datasets)
    return lambda: load_stream(
        recipe,
        tokenizer,
        vocabulary_rows=model.get_input_embeddings().weight.shape[0],
        writer=_writer(source, model, tokenizer, settings) if generating else None,
        choose=None if extension is None else lambda documents: extension.choose(documents, recipe.seed),
        on_message=lambda text: report(Progress(message=text)),
    )


def _read_rows(documents: DocumentStream, recipe: TrainingRecipe, tokenizer: Any, parallel: Parallel) -> PackedRows:
    return PackedRows(
        documents,
        sequence_len=recipe.sequence_len,
        rows=recipe.micro_batch_size,
        seed=recipe.seed,
        sample_packing=recipe.sample_packing,
        pad_token_id=tokenizer.pad_token_id or 0,
        rank=parallel.data_rank,
        world=parallel.data_world,
    )


def count_bigrams(documents: DocumentStream, vocabulary: int, tokens: int) -> Bigrams:
    """Counts which token follows which in the first documents, until so many tokens are read."""
    read, pieces = 0, []
    while read < tokens:
        pieces.append(documents.next_document().ids)
        read += len(pieces[-1])
    return Bigrams.count(pieces, vocabulary)


def _writer(source: Source, model: Any, tokenizer: Any, settings: TidarSettings) -> Writer:
    """The checkpoint as it writes training text of its own: causally, and never the mask token."""
    return Writer(
        load=lambda: model,
        fingerprint=fingerprint(source),
        end_ids=end_token_ids(model, tokenizer),
        suppressed_ids=frozenset({settings.mask_token_id}),
    )


def _report_before(extension: ContextExtension, recipe: TrainingRecipe, parallel: Parallel, report: OnProgress) -> None:
    """Measures base_model as it is, with its old positions."""
    report(Progress(message=f"config.json changes: {extension.told or 'nothing'}"))
    model, tokenizer = parallel.load(extension.original)
    measured_on = ", ".join(dataset.label for dataset in recipe.evaluation.datasets or recipe.datasets)
    documents = _measured_documents(recipe, tokenizer)
    if parallel.first:
        write_file(Path(recipe.output_dir) / RECIPE_FILE, dump_recipe(recipe))
    made = parallel.layout_model(model, gated=False)
    parallel.alone(made, lambda: extension.report_before(lambda: made, documents, measured_on))


def _measured_documents(recipe: TrainingRecipe, tokenizer: Any) -> Documents:
    """Held-out documents where there are some, else those that are trained on."""
    return load_documents(
        recipe.evaluation.datasets or recipe.datasets,
        tokenizer,
        sequence_len=recipe.sequence_len,
        chat_template=read_template(recipe),
    )


def _check_parallel(recipe: TrainingRecipe, settings: TidarSettings, parallel: Parallel) -> None:
    """What several processes cannot share yet, and rows that cannot be cut among them."""
    if parallel.world > 1 and (recipe.optimizer == "adamw_8bit" or recipe.quantization is not None):
        what = "optimizer: adamw_8bit" if recipe.optimizer == "adamw_8bit" else f"quantization: {recipe.quantization}"
        raise UserError(
            f"{what} works in one process alone so far",
            found=f"{parallel.world} processes",
            fix="leave it out: sharding over the processes saves more",
        )
    # Rows are cut into twice as many chunks as there are processes to share them; none is shorter than a block.
    chunks = 2 * recipe.parallel.context_parallel
    if chunks == 2:
        return
    if recipe.sequence_len % chunks or recipe.sequence_len // chunks < max(4, settings.block_size):
        raise UserError(
            f"sequence_len is {recipe.sequence_len} with parallel.context_parallel {chunks // 2}",
            expected=f"a multiple of {chunks}, and at least {chunks * max(4, settings.block_size)}",
            fix="change sequence_len, or let fewer processes share a row",
        )


def _say_nothing(_progress: Progress) -> None:
    pass


def _require_gated(source: Source, settings: TidarSettings) -> None:
    if settings.mode != "gated":
        raise UserError(
            f"{source.name} cannot be trained with quantised weights",
            found="mode full, in which every weight is trained",
            expected="a gated checkpoint, whose source is frozen",
            fix="quantization: null, or convert the source with --mode gated",
        )
