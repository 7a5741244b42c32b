"""Every kind of dataset gives, after any position, what it gave there before: mixed, streamed, by workers, by ranks."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.tiny import make_tokenizer
from zconvert.data.documents import Document, Documents
from zconvert.data.loading import load_stream
from zconvert.data.packing import Batch, PackedRows
from zconvert.data.reading import open_dataset
from zconvert.data.streams import Mixture, Shuffled
from zconvert.errors import UserError
from zconvert.recipe import DatasetRecipe, MidtrainRecipe

WORDS = ["ten", "tall", "trees", "stand", "there", "and", "then", "they", "rest", "seven"]


def texts(start: int, count: int) -> list[str]:
    """Texts of 1 to 30 words that differ from one another; some are longer than a row."""
    return [" ".join(WORDS[(n * n + k) % 10] for k in range(1 + (7 * n) % 30)) for n in range(start, start + count)]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(60)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from datasets import Dataset

    folder = tmp_path_factory.mktemp("data")
    (folder / "mixed").mkdir()
    for name, start in (("a.jsonl", 0), ("mixed/b.jsonl", 40), ("mixed/d.jsonl", 60)):
        (folder / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(start, 40)))
    for name, start in (("c.parquet", 100), ("mixed/c.parquet", 140)):
        Dataset.from_dict({"text": texts(start, 30)}).to_parquet(str(folder / name))
    (folder / "mixed" / "e.txt").write_text("seven more men enter the tent")
    return folder


STREAM: dict[str, Any] = {"streaming": True, "shuffle_buffer_size": 7}
DATASETS: dict[str, list[dict[str, Any]]] = {
    "two files": [{"path": "a.jsonl"}, {"path": "c.parquet"}],
    "weights": [{"path": "a.jsonl", "weight": 1.0}, {"path": "c.parquet", "weight": 2.5}],
    "streamed lines": [{"path": "a.jsonl", **STREAM}],
    "streamed tables": [{"path": "c.parquet", **STREAM}],
    "streamed folder": [{"path": "mixed", **STREAM}],
    "everything": [
        {"path": "a.jsonl", "weight": 1.0},
        {"path": "mixed", "weight": 0.5, **STREAM},
        {"path": "c.parquet", "weight": 2.0, "split_long": "paragraph", **STREAM},
    ],
}


def rows_of(
    data: Path, tokenizer: Any, datasets: list[dict[str, Any]], *, processes: int = 0, **options: Any
) -> PackedRows:
    recipe = MidtrainRecipe(
        base_model="x",
        output_dir=str(data / "run"),
        max_steps=1,
        seed=5,
        sequence_len=24,
        datasets=[DatasetRecipe(**{**entry, "path": str(data / entry["path"])}) for entry in datasets],
        dataset_num_proc=processes,
    )
    stream = load_stream(recipe, tokenizer, vocabulary_rows=64)
    options = {"rows": 2, "sample_packing": True, **options}
    return PackedRows(stream, sequence_len=24, seed=5, pad_token_id=0, **options)


def equal(a: Batch, b: Batch) -> bool:
    return all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("input_ids", "document_ids", "loss_mask"))


def through_file(state: dict[str, Any]) -> dict[str, Any]:
    """As a train state keeps it: read back with `weights_only`."""
    file = BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


@pytest.mark.parametrize("sample_packing", [True, False])
@pytest.mark.parametrize("name", DATASETS)
def test_batches_after_any_position_are_those_of_an_uninterrupted_run(
    name: str, sample_packing: bool, data: Path, tokenizer: Any
) -> None:
    uninterrupted = rows_of(data, tokenizer, DATASETS[name], sample_packing=sample_packing)
    states, batches = [], []
    for _ in range(60):  # several epochs of each
        states.append(through_file(uninterrupted.state_dict()))
        batches.append(uninterrupted.next_batch())
    for at in (0, 1, 5, 17, 18, 40):
        resumed = rows_of(data, tokenizer, DATASETS[name], sample_packing=sample_packing)
        resumed.next_batch()  # whatever it did before does not matter
        resumed.load_state_dict(states[at])
        assert all(equal(resumed.next_batch(), batch) for batch in batches[at : at + 15])


def test_workers_in_the_background_change_nothing_not_even_across_a_resume(data: Path, tokenizer: Any) -> None:
    alone, helped = (rows_of(data, tokenizer, DATASETS["everything"], processes=count) for count in (0, 2))
    for _ in range(20):
        assert equal(alone.next_batch(), helped.next_batch())
    helped.load_state_dict(through_file(alone.state_dict()))
    state = through_file(helped.state_dict())
    for _ in range(20):
        assert equal(alone.next_batch(), helped.next_batch())
    alone.load_state_dict(state)
    helped.load_state_dict(state)
    assert equal(alone.next_batch(), helped.next_batch())


def test_ranks_of_a_streamed_mixture_share_its_rows_and_any_number_of_them_goes_on(data: Path, tokenizer: Any) -> None:
    datasets = DATASETS["everything"]
    alone = rows_of(data, tokenizer, datasets, rows=4)
    two = [rows_of(data, tokenizer, datasets, rank=rank, world=2) for rank in range(2)]
    for _ in range(6):
        whole, parts = alone.next_batch(), [rank.next_batch() for rank in two]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)
    four = [rows_of(data, tokenizer, datasets, rows=1, rank=rank, world=4) for rank in range(4)]
    for rank in four:
        rank.load_state_dict(through_file(two[1].state_dict()))
    for _ in range(6):
        whole, parts = alone.next_batch(), [rank.next_batch() for rank in four]
        assert torch.equal(torch.cat([part.input_ids for part in parts]), whole.input_ids)


@pytest.mark.parametrize("name", ["streamed lines", "streamed tables", "streamed folder", "two files"])
def test_an_epoch_reads_every_document_once_and_the_next_in_another_order(
    name: str, data: Path, tokenizer: Any
) -> None:
    def documents(count: int) -> Iterator[tuple[int, ...]]:
        stream = rows_of(data, tokenizer, DATASETS[name]).stream
        for _ in range(count):
            yield tuple(stream.next_document().ids.tolist())

    count = {"streamed lines": 40, "streamed tables": 30, "streamed folder": 111, "two files": 70}[name]
    found = list(documents(2 * count))
    assert Counter(found[:count]) == Counter(found[count:])
    assert found[:count] != found[count:]


def test_a_position_in_the_middle_of_a_file_goes_on_with_the_next_row(data: Path) -> None:
    dataset = DatasetRecipe(path=str(data / "mixed"))
    expected = [row.where for row in open_dataset(dataset).rows()]
    for count in (1, 39, 40, 41, 71, 110, 111):
        first = open_dataset(dataset)
        rows = first.rows()
        for _ in range(count):
            next(rows)
        position = json.loads(json.dumps(first.position))
        assert [row.where for row in open_dataset(dataset).rows(position)] == expected[count:]


def test_shares_of_tokens_follow_the_weights_at_every_moment() -> None:
    lengths = {0: [3, 9, 4], 1: [17, 2], 2: [5]}
    parts = [Documents.of(Document([part + 1] * n, [True] * n) for n in lengths[part]) for part in range(len(lengths))]
    mixture, read = Mixture([Shuffled([part], 0) for part in parts], [1.0, 2.0, 0.5]), Counter[int]()
    for _ in range(300):
        piece = mixture.next_document()
        read[int(piece.ids[0]) - 1] += len(piece)
        total = sum(read.values())
        for part, weight in enumerate([1.0, 2.0, 0.5]):
            assert abs(read[part] - total * weight / 3.5) <= 2 * 17


def test_a_stream_that_changed_is_refused(data: Path, tokenizer: Any) -> None:
    state = rows_of(data, tokenizer, DATASETS["streamed lines"]).state_dict()
    for change in ({"path": "c.parquet"}, {"shuffle_buffer_size": 8}, {"add_eos": False}):
        changed = rows_of(data, tokenizer, [{**DATASETS["streamed lines"][0], **change}])
        with pytest.raises(UserError, match="cannot be resumed"):
            changed.load_state_dict(state)


def test_bad_rows_of_a_stream_are_named_and_fatal_or_left_out(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    lines = [json.dumps({"text": text}) for text in texts(0, 10)]
    (tmp_path / "x.jsonl").write_text("\n".join([*lines, "{broken", *lines]))
    entry = {"path": str(tmp_path / "x.jsonl"), **STREAM}
    rows = rows_of(tmp_path, tokenizer, [entry])
    with pytest.raises(UserError, match=r"line 11 of .*x\.jsonl is not JSON"):
        [rows.next_batch() for _ in range(30)]
    rows = rows_of(tmp_path, tokenizer, [{**entry, "on_bad_row": "skip"}])
    assert [rows.next_batch() for _ in range(30)]
    (tmp_path / "x.jsonl").write_text("{}\n" * 20)
    with pytest.raises(UserError, match="holds no documents"):
        rows_of(tmp_path, tokenizer, [{**entry, "on_bad_row": "skip"}]).next_batch()


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_dataset_is_read_as_the_file_that_it_holds(
    streaming: bool, data: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import datasets

    asked: list[Any] = []
    real = datasets.load_dataset

    def load_dataset(name: str, config: str | None = None, **options: Any) -> Any:
        asked.append((name, config, options.pop("revision"), options["split"], options["streaming"]))
        options["split"] = "train"
        return real("parquet", data_files=str(data / "c.parquet"), cache_dir=str(tmp_path), **options)

    expected = rows_of(data, tokenizer, [{"path": "c.parquet", **(STREAM if streaming else {})}])
    batches = [expected.next_batch() for _ in range(8)]
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    entry = {"path": "org/name", "name": "en", "split": "test", "revision": "abc", **(STREAM if streaming else {})}
    recipe = MidtrainRecipe(
        base_model="x", output_dir=str(tmp_path / "run"), max_steps=1, seed=5, datasets=[DatasetRecipe(**entry)]
    )
    rows = PackedRows(
        load_stream(recipe, tokenizer), sequence_len=24, rows=2, seed=5, sample_packing=True, pad_token_id=0
    )
    assert all(equal(rows.next_batch(), batch) for batch in batches)
    assert asked[0] == ("org/name", "en", "abc", "test", streaming)


def test_a_hub_dataset_that_cannot_be_had_is_a_clear_error(tokenizer: Any, tmp_path: Path) -> None:
    recipe = MidtrainRecipe(
        base_model="x", output_dir=str(tmp_path / "run"), max_steps=1, datasets=[DatasetRecipe(path="org/name")]
    )
    with pytest.raises(UserError, match="dataset org/name: no file or folder here has that name"):
        load_stream(recipe, tokenizer)


def test_what_was_tokenised_once_is_not_read_again_until_it_changes(
    data: Path, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zconvert.data import tokenising

    path, calls = tmp_path / "x.jsonl", []
    real = tokenising.tokenise
    monkeypatch.setattr(tokenising, "tokenise", lambda rules, rows: calls.append(len(rows)) or real(rules, rows))
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(0, 9)))
    first, again = (rows_of(tmp_path, tokenizer, [{"path": "x.jsonl"}]) for _ in range(2))
    assert calls == [9]
    assert equal(first.next_batch(), again.next_batch())
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(0, 10)))
    changed = rows_of(tmp_path, tokenizer, [{"path": "x.jsonl"}])
    assert calls == [9, 10]
    with pytest.raises(UserError, match="its documents changed"):
        changed.load_state_dict(first.state_dict())


def test_processes_that_start_together_prepare_the_data_once(data: Path, tokenizer: Any, tmp_path: Path) -> None:
    from threading import Barrier, Thread

    from zconvert.data import loading

    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(0, 9)))
    start, found, written = Barrier(3), [], []
    real = loading.write_documents

    def slowly(*arguments: Any) -> None:
        written.append(arguments[0])
        real(*arguments)

    def run() -> None:
        start.wait()
        found.append(rows_of(tmp_path, tokenizer, [{"path": "a.jsonl"}]).next_batch())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loading, "write_documents", slowly)
        threads = [Thread(target=run) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(written) == 1
    assert all(equal(batch, found[0]) for batch in found)
    assert len(found) == 3
