"""Trained weights go back under the names, shards and types of the checkpoint that they came from."""

from __future__ import annotations

import dataclasses
import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.disk import small_disk
from tests.checkpoint.tiny import MODEL_TYPES
from tests.contracts.families import FAMILY_MODELS, make_family_model
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import TensorInfo, read_header, read_headers
from zconvert.checkpoint.source import read_config, resolve
from zconvert.checkpoint.weights import pieces_on_disk, read_chunks, save_trained, shard_size, write_shard
from zconvert.errors import UserError
from zconvert.tidar.settings import TidarSettings

Checkpoint = Callable[..., Path]


@pytest.fixture
def converted(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Callable[..., tuple[Path, TidarSettings]]:
    def make(model_type: str, **options: Any) -> tuple[Path, TidarSettings]:
        folder = tmp_path / "converted"
        settings = convert_init(resolve(tiny_checkpoint(model_type, **options)), folder)
        return folder, dataclasses.replace(settings, stages=("midtrain",))

    return make


def trained(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model with every weight moved, as training moves them."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.01)
    return model


def assert_same_model(one: Any, other: Any) -> None:
    """Equal weights, bit for bit; logits to rounding, which depends on where in memory the weights lie."""
    ours, theirs = one.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        torch.testing.assert_close(one.eval()(ids).logits, other.eval()(ids).logits, rtol=0, atol=1e-6)


def forms(folder: Path) -> dict[str, tuple[str, tuple[int, ...], str]]:
    return {t.name: (t.dtype, t.shape, t.shard) for t in read_headers(folder).tensors.values()}


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_a_trained_model_takes_the_layout_of_its_base(
    converted: Callable[..., Any], tmp_path: Path, model_type: str, shards: int
) -> None:
    from transformers import AutoModelForCausalLM

    base, settings = converted(model_type, shards=shards, dtype="float32")
    model = trained(base)
    save_trained(model, base, tmp_path / "out", settings=settings)
    assert forms(tmp_path / "out") == forms(base)
    assert sorted(os.listdir(tmp_path / "out")) == sorted(os.listdir(base))
    assert read_config(tmp_path / "out") == {**read_config(base), "tidar": settings.to_dict()}
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_each_tensor_keeps_the_type_it_had_on_disk(
    converted: Callable[..., Any], tmp_path: Path, model_type: str
) -> None:
    base, settings = converted(model_type)
    model = trained(base)
    save_trained(model, base, tmp_path / "out", settings=settings)
    assert forms(tmp_path / "out") == forms(base)
    tensor = read_headers(tmp_path / "out").tensors["model.norm.weight"]
    stored = b"".join(read_chunks(tmp_path / "out" / tensor.shard, tensor))
    expected = model.model.norm.weight.detach().bfloat16().view(torch.uint8).numpy().tobytes()
    assert stored == expected


def test_saving_in_float32_is_exact_and_said_in_the_configuration(
    converted: Callable[..., Any], tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base, settings = converted("zaya", shards=3)
    model = trained(base)
    save_trained(model, base, tmp_path / "out", settings=settings, dtype="float32")
    assert {dtype for dtype, _, _ in forms(tmp_path / "out").values()} == {"F32"}
    assert read_config(tmp_path / "out")["dtype"] == "float32"
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.bytes for t in read_headers(tmp_path / "out").tensors.values())
    assert_same_model(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), model)


def test_saving_in_bfloat16_keeps_what_the_base_keeps_wide(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, settings = converted("zaya")
    save_trained(trained(base), base, tmp_path / "out", settings=settings, dtype="bfloat16")
    wide = {name for name, (dtype, _, _) in forms(tmp_path / "out").items() if dtype == "F32"}
    assert wide == {f"model.layers.{i}.mlp.gate.balancing_biases" for i in (0, 1)}


def test_a_model_with_other_tensors_than_its_base_is_refused_with_the_list(
    converted: Callable[..., Any], tmp_path: Path
) -> None:
    base, settings = converted("mixtral")
    model = trained(base)
    model.model.norm.weight = torch.nn.Parameter(torch.ones(31))
    model.model.extra = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="does not have the tensors of its base") as caught:
        save_trained(model, base, tmp_path / "out", settings=settings)
    assert "model.norm.weight has shape [31], [32] in the base" in str(caught.value.found)
    assert "model.extra.weight is not in the base" in str(caught.value.found)
    assert not (tmp_path / "out").exists()


def test_weights_that_are_not_finite_are_refused(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, settings = converted("mixtral")
    model = trained(base)
    with torch.no_grad():
        model.model.norm.weight[3] = float("nan")
    with pytest.raises(UserError, match=r"model\.norm\.weight is not finite"):
        save_trained(model, base, tmp_path / "out", settings=settings)
    assert sorted(p.name for p in tmp_path.iterdir() if "out" in p.name) == []


def test_generation_settings_that_transformers_finds_odd_do_not_lose_a_trained_model(
    converted: Callable[..., Any], tmp_path: Path
) -> None:
    base, settings = converted("mixtral")
    model = trained(base)
    model.generation_config.temperature = 0.6  # with do_sample unset: save_pretrained refuses
    before = model.generation_config
    save_trained(model, base, tmp_path / "out", settings=settings, extra_texts={"summary.json": '{"steps": 5}'})
    assert model.generation_config is before
    assert (tmp_path / "out" / "generation_config.json").read_bytes() == (base / "generation_config.json").read_bytes()
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == {"steps": 5}


def test_a_grown_vocabulary_survives_training(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, settings = converted("mixtral", spare_rows=0, shards=3)
    save_trained(trained(base), base, tmp_path / "out", settings=settings)
    assert forms(tmp_path / "out") == forms(base)
    assert forms(base)["lm_head.weight"][1] == (128, 32)


def test_nothing_is_printed_while_saving(
    converted: Callable[..., Any], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base, settings = converted("mixtral", shards=3)
    model = trained(base)
    capfd.readouterr()
    save_trained(model, base, tmp_path / "out", settings=settings)
    assert capfd.readouterr() == ("", "")


def test_a_full_disk_while_saving_leaves_nothing(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, settings = converted("mixtral")
    model = trained(base)
    with small_disk(tmp_path / "disk", "200k") as disk:
        with pytest.raises(UserError, match="disk is full"):
            save_trained(model, base, disk / "checkpoint", settings=settings)
        assert os.listdir(disk) == []


def test_an_existing_checkpoint_is_not_overwritten(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, settings = converted("mixtral")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists already"):
        save_trained(trained(base), base, tmp_path / "out", settings=settings)


def test_a_written_shard_is_read_by_the_safetensors_library(tmp_path: Path) -> None:
    from safetensors import safe_open

    data = {"b": struct.pack("<3H", 1, 2, 3), "a": struct.pack("<f", 1.5)}
    tensors = [TensorInfo("b", "BF16", (3,), "", 0, 0), TensorInfo("a", "F32", (), "", 0, 0)]
    write_shard(tmp_path / "w.safetensors", tensors, {"format": "pt"}, lambda name: [data[name]])
    found, metadata = read_header(tmp_path / "w.safetensors")
    assert metadata == {"format": "pt"}
    assert all(t.start % 4 == 0 for t in found.values() if t.dtype == "F32"), "items lie at multiples of their size"
    with safe_open(tmp_path / "w.safetensors", framework="pt") as file:
        assert file.get_tensor("a").item() == 1.5
        assert file.get_tensor("b").view(torch.int16).tolist() == [1, 2, 3]


def test_a_tensor_that_comes_short_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="3 bytes written, 4 expected"):
        write_shard(tmp_path / "w", [TensorInfo("a", "F32", (), "", 0, 0)], {}, lambda _: [b"abc"])


def test_the_size_of_a_shard_is_known_before_it_is_written(tmp_path: Path) -> None:
    tensors = [TensorInfo("a", "F32", (3,), "", 0, 0), TensorInfo("bé", "BF16", (5, 2), "", 0, 0)]
    for name, metadata in (("one", {}), ("two", {"format": "pt"})):
        write_shard(tmp_path / name, tensors, metadata, lambda n: [bytes(12 if n == "a" else 20)])
        assert shard_size(tensors, metadata) == (tmp_path / name).stat().st_size


def test_a_trained_checkpoint_keeps_where_its_base_came_from(converted: Callable[..., Any], tmp_path: Path) -> None:
    base, settings = converted("zaya")
    save_trained(trained(base), base, tmp_path / "out", settings=settings)
    before, after = (json.loads((folder / "provenance.json").read_text()) for folder in (base, tmp_path / "out"))
    assert after["stages"] == ["midtrain"]
    assert "rows" in before  # every row is another one after training
    assert {**after, "stages": []} == {key: value for key, value in before.items() if key != "rows"}


@pytest.mark.parametrize("model_type", sorted(FAMILY_MODELS))
def test_a_model_saved_layer_by_layer_is_the_model_saved_whole(model_type: str, tmp_path: Path) -> None:
    model = make_family_model(model_type)
    model.save_pretrained(tmp_path / "whole")
    whole = load_file(tmp_path / "whole" / "model.safetensors")
    pieces = list(pieces_on_disk(model))
    together = {name: tensor for piece in pieces for name, tensor in piece.items()}
    assert len(pieces) > 1
    assert len(together) == sum(len(piece) for piece in pieces)
    assert together.keys() == whole.keys()
    assert all(torch.equal(together[name], whole[name]) for name in whole)
