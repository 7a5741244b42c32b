"""The stages of the recipe: from a checkpoint and a recipe to a run folder with a new checkpoint in it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.folder import writing
from zconvert.checkpoint.load import end_token_ids, load_model, load_tokenizer
from zconvert.checkpoint.source import Source, fingerprint, require_converted, resolve
from zconvert.checkpoint.weights import save_gated, save_trained
from zconvert.data.documents import Documents
from zconvert.data.loading import first_example, load_documents, load_stream, read_template
from zconvert.data.packing import PackedRows
from zconvert.data.self_generated import Writer
from zconvert.errors import UserError
from zconvert.recipe import ExtendContextRecipe, TrainingRecipe, dump_recipe
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings
from zconvert.training.context import ContextExtension
from zconvert.training.implementations import choose_implementations
from zconvert.training.loop import OnProgress, Progress, Trainer
from zconvert.training.quantised import pack
from zconvert.training.trackers import Trackers
from zconvert.training.watching import observers_of

CHAT_TEMPLATE_FILE = "chat_template.jinja"
"""transformers reads it before what tokenizer_config.json says"""


def train(recipe: TrainingRecipe, on_progress: OnProgress) -> Path:
    """Runs a training stage on a converted checkpoint.

    Args:
        recipe: of the stage.
        on_progress: is told what happens.

    Returns:
        The new checkpoint's folder, `output_dir/checkpoint`.

    Raises:
        UserError: bad input; nothing is half-written.
        Interrupted: a signal came; the same call continues.
    """
    run_dir = Path(recipe.output_dir)
    final = run_dir / "checkpoint"
    if final.exists():
        raise UserError(
            f"{final} exists already: this run is complete",
            fix="choose another output_dir, or remove that folder to train anew or further",
        )
    trackers = Trackers(recipe)
    source = resolve(recipe.base_model, revision=recipe.revision)
    settings = require_converted(source)
    if recipe.num_threads is not None:
        torch.set_num_threads(recipe.num_threads)
    torch.manual_seed(recipe.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    extension = None
    if isinstance(recipe, ExtendContextRecipe):
        extension = ContextExtension(source, settings, recipe.context, run_dir)
        _report_before(extension, recipe, device, on_progress)
        source = extension.source()
    model, tokenizer = _load(source, settings, recipe, device, on_progress)
    _write_recipe(run_dir, recipe)
    rows = _read_rows(recipe, source, settings, model, tokenizer, extension, on_progress)

    def tell(progress: Progress) -> None:
        if progress.metrics is not None:
            trackers.log(progress.metrics)
        on_progress(progress)

    trainer = Trainer(model, rows, recipe, settings, tell)
    for line in choose_implementations(trainer.layout_model, recipe, device):
        on_progress(Progress(message=line))
    trainer.observers += observers_of(trainer, tokenizer)
    try:
        trainer.run()
    finally:
        trackers.finish()
    if extension is not None:
        extension.report_after(trainer.layout_model, _measured_documents(recipe, tokenizer))
    on_progress(Progress(message=f"writing {final}"))
    trained = dataclasses.replace(
        settings, block_offset=recipe.diffusion.block_offset, stages=(*settings.stages, recipe.stage)
    )
    # Whoever talks to the new checkpoint writes conversations as it was trained on them.
    texts = {CHAT_TEMPLATE_FILE: template} if (template := read_template(recipe)) is not None else {}
    if trainer.gated is not None:
        save_gated(trainer.gated, source.folder, final, settings=trained, extra_texts=texts)
    else:
        save_trained(model, source.folder, final, settings=trained, dtype=recipe.save_dtype, extra_texts=texts)
    if extension is not None:
        extension.close()
    return final


def example(recipe: TrainingRecipe) -> tuple[str, list[tuple[str, bool]]]:
    """What a stage would train on first; nothing is written and no weights are loaded. See `first_example`."""
    return first_example(recipe, load_tokenizer(resolve(recipe.base_model, revision=recipe.revision, weights=False)))


def _load(
    source: Source, settings: TidarSettings, recipe: TrainingRecipe, device: torch.device, on_progress: OnProgress
) -> tuple[Any, Any]:
    """The model to train, on its device, and its tokenizer."""
    if recipe.quantization is None:
        model, tokenizer = load_model(source, dtype="float32", device=device.type)
    else:
        _require_gated(source, settings)
        model, tokenizer = load_model(source, device="cpu")
        on_progress(Progress(message=str(pack(model, recipe.quantization, device))))
    model.config.use_cache = False
    return model, tokenizer


def _read_rows(
    recipe: TrainingRecipe,
    source: Source,
    settings: TidarSettings,
    model: Any,
    tokenizer: Any,
    extension: ContextExtension | None,
    on_progress: OnProgress,
) -> PackedRows:
    on_progress(Progress(message=f"reading {', '.join(dataset.label for dataset in recipe.datasets)}"))
    generating = any(dataset.self_generated is not None for dataset in recipe.datasets)
    documents = load_stream(
        recipe,
        tokenizer,
        vocabulary_rows=model.get_input_embeddings().weight.shape[0],
        writer=_writer(source, model, tokenizer, settings) if generating else None,
        choose=None if extension is None else lambda documents: extension.choose(documents, recipe.seed),
        on_message=lambda text: on_progress(Progress(message=text)),
    )
    return PackedRows(
        documents,
        sequence_len=recipe.sequence_len,
        rows=recipe.micro_batch_size,
        seed=recipe.seed,
        sample_packing=recipe.sample_packing,
        pad_token_id=tokenizer.pad_token_id or 0,
    )


def _writer(source: Source, model: Any, tokenizer: Any, settings: TidarSettings) -> Writer:
    """The checkpoint as it writes training text of its own: causally, and never the mask token."""
    return Writer(
        load=lambda: model,
        fingerprint=fingerprint(source),
        end_ids=end_token_ids(model, tokenizer),
        suppressed_ids=frozenset({settings.mask_token_id}),
    )


def _report_before(
    extension: ContextExtension, recipe: TrainingRecipe, device: torch.device, on_progress: OnProgress
) -> None:
    """Measures base_model as it is, with its old positions."""
    on_progress(Progress(message=f"config.json changes: {json.dumps(extension.changes)}"))
    model, tokenizer = load_model(extension.original, dtype="float32", device=device.type)
    measured_on = ", ".join(dataset.label for dataset in recipe.evaluation.datasets or recipe.datasets)
    documents = _measured_documents(recipe, tokenizer)
    _write_recipe(Path(recipe.output_dir), recipe)
    extension.report_before(lambda: LayoutModel(model), documents, measured_on)


def _measured_documents(recipe: TrainingRecipe, tokenizer: Any) -> Documents:
    """Held-out documents where there are some, else those that are trained on."""
    return load_documents(
        recipe.evaluation.datasets or recipe.datasets,
        tokenizer,
        sequence_len=recipe.sequence_len,
        chat_template=read_template(recipe),
    )


def _require_gated(source: Source, settings: TidarSettings) -> None:
    if settings.mode != "gated":
        raise UserError(
            f"{source.name} cannot be trained with quantised weights",
            found="mode full, in which every weight is trained",
            expected="a gated checkpoint, whose source is frozen",
            fix="quantization: null, or convert the source with --mode gated",
        )


def _write_recipe(run_dir: Path, recipe: TrainingRecipe) -> None:
    """Puts the recipe, every setting written out, into the run's folder."""
    if run_dir.exists() and not run_dir.is_dir():
        raise UserError(
            f"output_dir {run_dir} is a file", expected="a folder, new or of this run", fix="choose another name"
        )
    with writing(run_dir):
        run_dir.mkdir(parents=True, exist_ok=True)
        partial = run_dir / "recipe.yaml.partial"
        partial.write_text(dump_recipe(recipe))
        partial.replace(run_dir / "recipe.yaml")
