"""A checkpoint of every family goes the whole way: saved, converted, loaded, and decoded as its own AR text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.checkpoint.tiny import make_tokenizer
from tests.contracts.families import COMPOSITE_MODELS, FAMILY_MODELS, make_composite_model, make_family_model
from tests.contracts.models import VOCAB, random_ids
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.checkpoint.weights import save_trained
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, decode
from zconvert.tidar.families import FAMILIES
from zconvert.tidar.generate import settings_of
from zconvert.tidar.model import LayoutModel

MOE = sorted(name for name in FAMILY_MODELS if not FAMILIES[name].dense)
DENSE = sorted(set(FAMILY_MODELS) - set(MOE))


@pytest.mark.parametrize("model_type", MOE)
def test_a_converted_checkpoint_is_its_source_and_decodes(model_type: str, tmp_path: Path) -> None:
    _convert_and_decode(model_type, tmp_path, entries=VOCAB - 4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", DENSE)
def test_a_dense_checkpoint_does_too(model_type: str, tmp_path: Path) -> None:
    _convert_and_decode(model_type, tmp_path, entries=VOCAB - 4)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MOE)
def test_a_grown_embedding_works_too(model_type: str, tmp_path: Path) -> None:
    _convert_and_decode(model_type, tmp_path, entries=VOCAB)


@torch.no_grad()
def _convert_and_decode(model_type: str, folder: Path, entries: int) -> None:
    model = make_family_model(model_type)
    model.save_pretrained(folder / "source")
    make_tokenizer(entries).save_pretrained(folder / "source")
    convert_init(resolve(folder / "source"), folder / "out", block_size=4)
    converted = resolve(folder / "out")
    settings = require_converted(converted)
    assert settings.mask_token_id == entries
    loaded, _ = load_model(converted, dtype="float32", device="cpu")

    ids = random_ids((1, 20), seed=1) % entries
    before, after = model(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits
    assert float((after[..., :entries] - before[..., :entries]).abs().max()) < 1e-6

    prompt, texts = ids[0, :10].tolist(), []
    for plan in (
        DecodePlan.tidar(settings, Sampling(), frozenset()),
        DecodePlan.autoregressive(settings.mask_token_id, Sampling(), frozenset()),
    ):
        texts.append([token for step in decode(LayoutModel(loaded), prompt, plan, 12) for token in step.tokens])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("model_type", list(COMPOSITE_MODELS))
@pytest.mark.parametrize("entries", [VOCAB - 4, VOCAB], ids=["spare row", "grown"])
@torch.no_grad()
def test_a_composite_model_is_converted_and_trained_whole(model_type: str, entries: int, tmp_path: Path) -> None:
    model = make_composite_model(model_type)
    model.save_pretrained(tmp_path / "source")
    make_tokenizer(entries).save_pretrained(tmp_path / "source")
    convert_init(resolve(tmp_path / "source"), tmp_path / "out", block_size=4)
    converted = resolve(tmp_path / "out")
    settings = require_converted(converted)
    loaded, _ = load_model(converted, dtype="float32", device="cpu")
    assert type(loaded) is type(model)
    assert settings_of(loaded) == settings
    ids = random_ids((1, 20), seed=1) % entries
    before, after = model(input_ids=ids, use_cache=False).logits, loaded(input_ids=ids, use_cache=False).logits
    assert float((after[..., :entries] - before[..., :entries]).abs().max()) < 1e-5
    plan = DecodePlan.tidar(settings, Sampling(), frozenset())
    assert sum(len(step.tokens) for step in decode(LayoutModel(loaded), ids[0, :10].tolist(), plan, 12)) == 12

    save_trained(loaded, converted.folder, tmp_path / "trained", settings=settings)
    source, trained = read_headers(converted.folder), read_headers(tmp_path / "trained")
    assert {n: t.shape for n, t in trained.tensors.items()} == {n: t.shape for n, t in source.tensors.items()}
    assert require_converted(resolve(tmp_path / "trained")) == settings
