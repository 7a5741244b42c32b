"""A checkpoint of every family goes the whole way: saved, converted, loaded, and decoded as its own AR text."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.tiny import make_tokenizer
from tests.contracts.families import COMPOSITE_MODELS, FAMILY_MODELS, make_composite_model, make_family_model
from tests.contracts.models import VOCAB, random_ids
from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import Source, require_converted, resolve
from zconvert.checkpoint.weights import save_gated, save_trained
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Engine, decode, run
from zconvert.tidar.families import FAMILIES
from zconvert.tidar.generate import layout_model_of, settings_of
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts, TidarSettings

MOE = sorted(name for name in FAMILY_MODELS if not FAMILIES[name].dense)
DENSE = sorted(set(FAMILY_MODELS) - set(MOE))
PARTS = GatedParts(rank=2, mlp_width=8)


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


@pytest.mark.parametrize("model_type", ["dbrx", "deepseek_v3", "gemma4_text", "gpt_oss", "inkling_text", "zaya"])
def test_a_gated_checkpoint_without_a_row_to_spare_decodes_its_sources_text(model_type: str, tmp_path: Path) -> None:
    _convert_gated_and_decode(model_type, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", list(FAMILY_MODELS))
def test_and_so_does_one_of_every_family(model_type: str, tmp_path: Path) -> None:
    _convert_gated_and_decode(model_type, tmp_path)


@torch.no_grad()
def _convert_gated_and_decode(model_type: str, folder: Path) -> None:
    converted = _convert(make_family_model(model_type), folder, entries=VOCAB, gated=PARTS)
    settings = replace(require_converted(converted), stages=("midtrain",))
    assert settings.virtual
    model, _ = load_model(converted, dtype="float32", device="cpu")
    weights = layout_model_of(model).gated
    assert weights is not None
    torch.manual_seed(5)
    for parameter in weights.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    save_gated(weights, converted.folder, folder / "trained", settings=settings)

    loaded, _ = load_model(resolve(folder / "trained"), dtype="float32", device="cpu")
    source, _ = load_model(resolve(folder / "source"), dtype="float32", device="cpu")
    layout, prompt = layout_model_of(loaded), random_ids((10,), seed=1).tolist()
    assert layout.gated is not None
    assert all(torch.equal(p, layout.gated.state_dict()[name]) for name, p in weights.state_dict().items())
    for shard in (folder / "source").glob("*.safetensors"):
        assert sha256(folder / "trained" / shard.name) == sha256(shard)
    ids = random_ids((1, 20), seed=2)
    assert torch.equal(loaded(ids, use_cache=False).logits, source(ids, use_cache=False).logits), "exactly, not nearly"
    plan, causal = _plans(settings)
    stock = LayoutModel(source)
    expected = [_text(stock, prompt[i:], causal) for i in range(3)]
    assert _text(layout, prompt, plan) == expected[0]
    # Rows of a batch have unlike numbers of drafts: what fills them up must be a token with an embedding.
    engine = Engine(layout, plan, max_batch=3)
    together = {r.request.key: r.tokens for r in run(engine, [Request(prompt[i:], 12, key=i) for i in range(3)])}
    assert [together[i] for i in range(3)] == expected


@torch.no_grad()
def _convert_and_decode(model_type: str, folder: Path, entries: int) -> None:
    model = make_family_model(model_type)
    converted = _convert(model, folder, entries)
    settings = require_converted(converted)
    assert settings.mask_token_id == entries
    loaded, _ = load_model(converted, dtype="float32", device="cpu")

    ids = random_ids((1, 20), seed=1) % entries
    before, after = model(ids, use_cache=False).logits, loaded(ids, use_cache=False).logits
    assert float((after[..., :entries] - before[..., :entries]).abs().max()) < 1e-6

    drafted, one_by_one = (_text(LayoutModel(loaded), ids[0, :10].tolist(), plan) for plan in _plans(settings))
    assert drafted == one_by_one


def _convert(model: Any, folder: Path, entries: int, **choices: Any) -> Source:
    """The checkpoint that a model and a tokenizer of so many entries are converted to."""
    model.save_pretrained(folder / "source")
    make_tokenizer(entries).save_pretrained(folder / "source")
    convert_init(resolve(folder / "source"), folder / "out", block_size=4, **choices)
    return resolve(folder / "out")


def _plans(settings: TidarSettings) -> tuple[DecodePlan, DecodePlan]:
    """Greedy decoding with drafts, and without."""
    return (
        DecodePlan.tidar(settings, Sampling(), frozenset()),
        DecodePlan.autoregressive(settings.mask_token_id, Sampling(), frozenset()),
    )


def _text(layout: LayoutModel, prompt: list[int], plan: DecodePlan) -> list[int]:
    return [token for step in decode(layout, prompt, plan, 12) for token in step.tokens]


@pytest.mark.parametrize("model_type", list(COMPOSITE_MODELS))
@pytest.mark.parametrize("entries", [VOCAB - 4, VOCAB], ids=["spare row", "grown"])
@torch.no_grad()
def test_a_composite_model_is_converted_and_trained_whole(model_type: str, entries: int, tmp_path: Path) -> None:
    model = make_composite_model(model_type)
    converted = _convert(model, tmp_path, entries)
    settings = require_converted(converted)
    loaded, _ = load_model(converted, dtype="float32", device="cpu")
    assert type(loaded) is type(model)
    assert settings_of(loaded) == settings
    ids = random_ids((1, 20), seed=1) % entries
    before, after = model(input_ids=ids, use_cache=False).logits, loaded(input_ids=ids, use_cache=False).logits
    assert float((after[..., :entries] - before[..., :entries]).abs().max()) < 1e-5
    assert len(_text(LayoutModel(loaded), ids[0, :10].tolist(), _plans(settings)[0])) == 12

    save_trained(loaded, converted.folder, tmp_path / "trained", settings=settings)
    source, trained = read_headers(converted.folder), read_headers(tmp_path / "trained")
    assert {n: t.shape for n, t in trained.tensors.items()} == {n: t.shape for n, t in source.tensors.items()}
    assert require_converted(resolve(tmp_path / "trained")) == settings
