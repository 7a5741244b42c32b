"""`zconvert inspect`: the view for people at 80 columns, and one JSON document for programs."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.sparse import write_sparse, write_sparse_file
from tests.checkpoint.tiny import make_checkpoint
from tests.commands import run_command


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("made") / "zaya", "zaya")


run = partial(run_command, "inspect")


def changed(checkpoint: Path, folder: Path, **changes: Any) -> Path:
    """A folder with the same weights and another config.json."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        (folder / path.name).hardlink_to(path)
    config = {**json.loads((checkpoint / "config.json").read_text()), **changes}
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_the_view_has_the_facts_and_fits_80_columns(checkpoint: Path) -> None:
    result = run(checkpoint)
    assert result.exit_code == 0
    assert "Can be converted" in result.stdout
    assert "60 tokens in 64 embedding rows (4 spare), tied to the head" in result.stdout
    assert "<mask>, id 60: a spare embedding row" in result.stdout
    assert "4 a layer, 1 for a token" in result.stdout
    *view, command, _ = result.stdout.split("\n")
    assert max(map(len, view)) <= 80
    assert command == f"Next: zconvert convert-init {checkpoint} --out zaya-tidar-init"
    assert result.stderr == ""


def test_the_view_names_router_attention_and_cache(checkpoint: Path) -> None:
    stdout = run(checkpoint).stdout
    assert "Router      softmax, balancing bias" in stdout
    assert "Attention   compressed convolutional (CCA): 2 heads of 16" in stdout
    assert "1 layer: all keys and values, 32 numbers a token" in stdout
    assert "1 layer: keys and values of the last 16 tokens, 32 numbers a token" in stdout
    assert "2 layers: the convolutions' state (CCA), 104 numbers" in stdout


def test_a_dense_model_is_called_dense(checkpoint: Path, tmp_path: Path) -> None:
    folder = tmp_path / "dense"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": 1, "vocab_size": 64}))
    write_sparse_file(folder / "model.safetensors", {"model.embed_tokens.weight": ("BF16", (64, 32))})
    (folder / "tokenizer.json").hardlink_to(checkpoint / "tokenizer.json")
    stdout = run(folder).stdout
    assert "Can be converted" in stdout
    assert "Model       llama, dense" in stdout
    assert "Experts     none: dense" in stdout


def test_a_quantised_checkpoint_is_shown_with_what_to_do(checkpoint: Path, tmp_path: Path) -> None:
    result = run(changed(checkpoint, tmp_path / "q", quantization_config={"quant_method": "gptq", "bits": 4}))
    assert result.exit_code == 0
    assert "Cannot be converted: its weights are quantised by GPTQ in 4 bits" in result.stdout
    assert "Quantised   gptq in 4 bits" in result.stdout


def test_many_shards_are_told_in_a_few_lines_and_the_index_with_its_faults(tmp_path: Path) -> None:
    shapes = {f"model.layers.{number}.mlp.up_proj.weight": (1000, 1000) for number in range(6)}
    folder = write_sparse(tmp_path / "many", shapes, {"model_type": "llama", "num_hidden_layers": 6}, shards=6)
    stdout = run(folder).stdout
    assert "Weights     12.0 MB in 6 files: BF16 12.0 MB" in stdout
    assert "model-00004-of-00006.safetensors  2.0 MB" in stdout
    assert "… and 2 more, 4.0 MB" in stdout
    assert "Index       agrees with the shards" in stdout
    assert max(map(len, stdout.split("\n"))) <= 80
    (folder / "model-00002-of-00006.safetensors").unlink()
    stdout = run(folder).stdout
    assert "Parameters  unknown, as weights are missing" in stdout
    assert "1 tensors missing, 0 extra" in stdout
    assert "missing: model-00002-of-00006.safetensors" in stdout


def test_json_is_one_document_and_nothing_else(checkpoint: Path) -> None:
    result = run(checkpoint, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["mask_token"]["id"] == 60
    assert result.stderr == ""


def test_a_refused_checkpoint_is_shown_with_the_reason_and_exit_0(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "mamba", layer_types=["full_attention", "mamba"])
    result = run(folder)
    assert result.exit_code == 0
    assert "Cannot be converted: layers of type mamba" in result.stdout
    assert "Next:" not in result.stdout
    assert json.loads(run(folder, "--json").stdout)["verdict"] == "refused"


def test_a_converted_checkpoint_shows_its_settings(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"block_size": 4, "mask_token_id": 60, "base_model": "org/base", "proposals": [1, 3]}
    result = run(changed(checkpoint, tmp_path / "run", tidar=settings))
    assert "Converted from org/base, not trained yet" in result.stdout
    assert "blocks of 4, proposals after 1, 3 accepted tokens" in result.stdout
    trained = run(changed(checkpoint, tmp_path / "trained", tidar={**settings, "stages": ["midtrain"]}))
    assert "trained by midtrain" in trained.stdout
    assert "Next: zconvert generate" in trained.stdout


def test_a_gated_checkpoint_shows_what_is_frozen_and_what_is_added(checkpoint: Path, tmp_path: Path) -> None:
    parts = {"rank": 4, "mlp": "replace", "mlp_width": 16, "mask_embedding": True}
    settings = {"block_size": 4, "mask_token_id": 64, "mask_token": "", "mask_token_source": "virtual"}
    section = {**settings, "mode": "gated", "gated": parts, "stages": ["midtrain"]}
    folder = changed(checkpoint, tmp_path / "run", tidar=section)
    assert "tidar/gated.safetensors is missing" in run(folder).stdout
    (folder / "tidar").mkdir()
    (folder / "tidar" / "gated.safetensors").write_bytes(bytes(1200))
    shown = " ".join(run(folder).stdout.split())
    assert "1.2 kB in tidar/gated.safetensors" in shown
    assert "id 64, beyond the vocabulary: without a row" in shown
    assert "gated, the source is frozen: low rank 4, diffusion expert of 16 in place of the routed ones" in shown


def test_what_a_stranger_wrote_is_shown_as_text(checkpoint: Path, tmp_path: Path) -> None:
    settings = {"block_size": 4, "mask_token_id": 60, "mask_token": "[MASK]", "base_model": "\x1b[31m[red]x"}
    result = run(changed(checkpoint, tmp_path / "odd", tidar=settings, architectures=["[bold]A\x07"]))
    strange = changed(checkpoint, tmp_path / "strange", layer_types=["{odd}", "[red]b"])
    assert "1 layer: {odd}" in run(strange).stdout
    assert "[MASK], id 60" in result.stdout
    assert "[red]x" in result.stdout
    assert "[bold]A" in result.stdout
    assert not {"\x1b", "\x07"} & set(result.stdout)


def test_a_config_that_says_nothing_is_still_shown(checkpoint: Path, tmp_path: Path) -> None:
    folder = changed(checkpoint, tmp_path / "bare")
    (folder / "config.json").write_text("{}")
    result = run(folder)
    assert result.exit_code == 0
    assert "Layers      unknown" in result.stdout


def test_a_mistake_is_one_message_on_stderr_and_exit_1(tmp_path: Path) -> None:
    result = run(tmp_path / "missing", "--json")
    assert result.exit_code == 1
    assert result.stdout == ""
    assert "no such folder" in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_checkpoint_must_be_named() -> None:
    assert run().exit_code == 2
