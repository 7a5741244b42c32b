"""The datasets of a recipe -> documents: tokenised once into a folder, streamed, or written by the checkpoint."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import Any

from zconvert.checkpoint.folder import writing
from zconvert.data.documents import Document, Documents, read_documents, write_documents
from zconvert.data.reading import open_dataset
from zconvert.data.self_generated import Writer, identity, read_prompts, write_texts
from zconvert.data.streams import DocumentStream, Mixture, Shuffled, Streamed, check_ids
from zconvert.data.tokenising import BadRows, OnMessage, Rules, Workers
from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe, TrainingRecipe

PREPARED = "prepared"
"""in a run's folder: the tokenised datasets"""
_ROWS_TOLD = 100_000
"""progress is told so often"""


def load_documents(
    datasets: Sequence[DatasetRecipe],
    tokenizer: Any,
    *,
    vocabulary_rows: int | None = None,
    sequence_len: int | None = None,
    chat_template: str | None = None,
    on_message: OnMessage | None = None,
) -> Documents:
    """Reads and tokenises every document of several datasets into memory, in order.

    Args:
        datasets: entries of a recipe's `datasets:`; none of them self-generated.
        tokenizer: a transformers tokenizer.
        vocabulary_rows: embedding rows of the model; ids at or above it are refused here rather than in a forward.
        sequence_len: see `Rules`.
        chat_template: Jinja text; the tokenizer's own where None.
        on_message: is told of bad rows that are left out.

    Raises:
        UserError: a file is missing, a row is bad (with file and line), or there is no document at all.
    """

    def documents() -> Iterator[Document]:
        for dataset in datasets:
            rules = Rules(dataset, tokenizer, sequence_len, chat_template)
            yield from _tokenised(rules, Workers([rules], 0), 0, on_message)

    loaded = Documents.of(documents())
    _refuse_none(len(loaded), datasets)
    check_ids(int(loaded.ids.max()), vocabulary_rows)
    return loaded


def load_stream(
    recipe: TrainingRecipe,
    tokenizer: Any,
    *,
    vocabulary_rows: int | None = None,
    writer: Writer | None = None,
    choose: Callable[[Documents], Documents] | None = None,
    on_message: OnMessage | None = None,
) -> DocumentStream:
    """The documents that a stage trains on, in their order.

    What is not streamed is tokenised into `dataset_prepared_path` first, unless it lies there already.

    Args:
        recipe: of the stage.
        tokenizer: a transformers tokenizer.
        vocabulary_rows: see `load_documents`.
        writer: the checkpoint, for self-generated data.
        choose: takes some documents of a dataset; streams are read whole.
        on_message: is told what is done.

    Raises:
        UserError: data cannot be read or written.
    """
    template = read_template(recipe)
    rules = [Rules(dataset, tokenizer, recipe.sequence_len, template) for dataset in recipe.datasets]
    workers = Workers(rules, recipe.dataset_num_proc)
    prepared = Path(recipe.dataset_prepared_path or Path(recipe.output_dir) / PREPARED).expanduser()
    weights = [dataset.weight for dataset in recipe.datasets if dataset.weight is not None]

    def whole(number: int) -> Documents:
        if recipe.datasets[number].self_generated is not None:
            assert writer is not None, "the caller gives the checkpoint that writes"
            documents, highest = _generated(rules[number], writer, prepared, on_message)
        else:
            documents, highest = _prepared(rules[number], workers, number, prepared, on_message)
        check_ids(highest, vocabulary_rows)
        return documents if choose is None else choose(documents)

    def streamed(number: int, seed: int | str) -> DocumentStream:
        dataset = recipe.datasets[number]
        return Streamed(
            lambda: open_dataset(dataset),
            number,
            workers,
            BadRows(dataset, on_message),
            block_rows=dataset.shuffle_buffer_size,
            seed=seed,
            identity=_key(rules[number].identity(), open_dataset(dataset).identity),
            vocabulary_rows=vocabulary_rows,
        )

    def one(number: int) -> DocumentStream:
        seed = f"{recipe.seed}-{number}"
        return streamed(number, seed) if recipe.datasets[number].streaming else Shuffled([whole(number)], seed)

    numbers = range(len(rules))
    streaming = any(dataset.streaming for dataset in recipe.datasets)
    try:
        if weights:
            return Mixture([one(number) for number in numbers], weights)
        if streaming:
            return streamed(0, recipe.seed)
        return Shuffled([whole(number) for number in numbers], recipe.seed)
    finally:
        if not streaming:
            workers.close()


def first_example(recipe: TrainingRecipe, tokenizer: Any) -> tuple[str, list[tuple[str, bool]]]:
    """The first conversation of a recipe's datasets, as it is trained on; bad rows before it are passed over.

    Returns:
        The dataset that it comes from, and its text in stretches, each with whether it is scored.

    Raises:
        UserError: there is none; where all rows are bad, what is wrong with the first one.
    """
    template = read_template(recipe)
    chats = [dataset for dataset in recipe.datasets if dataset.type == "chat" and dataset.path is not None]
    for on_bad_row in ("skip", "error"):
        for dataset in chats:
            rules = Rules(
                dataset.model_copy(update={"on_bad_row": on_bad_row}), tokenizer, recipe.sequence_len, template
            )
            document = next(_tokenised(rules, Workers([rules], 0), 0, None), None)
            if document is not None:
                runs = groupby(zip(document.ids, document.loss_mask, strict=True), key=lambda token: token[1])
                return dataset.label, [(tokenizer.decode([i for i, _ in run]), scored) for scored, run in runs]
    raise UserError(
        "there is no conversation to show",
        found=", ".join(dataset.label for dataset in chats) or "no dataset of type chat with a path",
        fix="check datasets in the recipe",
    )


def read_template(recipe: TrainingRecipe) -> str | None:
    """The chat template that the recipe names, or None.

    Raises:
        UserError: the file cannot be read.
    """
    if recipe.chat_template is None:
        return None
    path = Path(recipe.chat_template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the chat template {path} cannot be read", found=error, fix="check chat_template in the recipe"
        ) from None


def _tokenised(rules: Rules, workers: Workers, number: int, on_message: OnMessage | None) -> Iterator[Document]:
    bad_rows = BadRows(rules.dataset, on_message)
    rows = open_dataset(rules.dataset).rows()
    for count, documents in enumerate(bad_rows.good(workers.outcomes(number, rows)), start=1):
        yield from documents
        if count % _ROWS_TOLD == 0 and on_message is not None:
            on_message(f"tokenised {count:,} rows of {rules.dataset.label}")
    bad_rows.summary()


def _prepared(
    rules: Rules, workers: Workers, number: int, prepared: Path, on_message: OnMessage | None
) -> tuple[Documents, int]:
    """The tokenised documents of one dataset, from disk, and their highest id."""
    dataset = rules.dataset
    reader = open_dataset(dataset)
    folder = prepared / _key(rules.identity(), reader.identity, reader.version)
    return _stored(folder, dataset, lambda: _tokenised(rules, workers, number, on_message))


def _generated(rules: Rules, writer: Writer, prepared: Path, on_message: OnMessage | None) -> tuple[Documents, int]:
    """The same of text that the checkpoint writes itself."""
    settings = rules.dataset.self_generated
    assert settings is not None
    prompts = read_prompts(rules, on_message)
    key = identity(settings, prompts, writer)
    partial = prepared / f"{_key(key)}.generated.jsonl"
    stored = _stored(
        prepared / _key(key), rules.dataset, lambda: write_texts(settings, prompts, writer, partial, on_message)
    )
    partial.unlink(missing_ok=True)
    return stored


def _key(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:20]


def _stored(folder: Path, dataset: DatasetRecipe, documents: Callable[[], Iterator[Document]]) -> tuple[Documents, int]:
    with _alone(folder.parent):
        try:
            if not folder.exists():
                write_documents(folder, documents(), {"dataset": dataset.label})
        except UserError:
            if not folder.exists():  # where there are no locks, another process may have been first: with the same
                raise
    read, facts = read_documents(folder)
    _refuse_none(len(read), [dataset])
    return read, int(facts["highest_id"])


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keeps other processes, such as the other ranks of a run, waiting: what one has prepared all can read."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder, os.O_RDONLY)
    try:
        with suppress(OSError):  # a file system without locks: each prepares its own, and the first is taken
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _refuse_none(count: int, datasets: Sequence[DatasetRecipe]) -> None:
    if not count:
        raise UserError(
            "the datasets hold no documents",
            found=", ".join(dataset.label for dataset in datasets),
            fix="check datasets[].path in the recipe",
        )
