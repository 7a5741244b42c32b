"""Gated conversion from end to end: the source's bytes, its logits and its text, and weights that learn beside it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.checkpoint.tiny import ROWS, make_checkpoint
from tests.contracts.models import random_ids
from tests.training.runs import make_run, metrics_of, train_until
from zconvert.checkpoint.export import export
from zconvert.checkpoint.folder import sha256
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.merge import merge_to_ar
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.engine import decode
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GATED_FILE, GatedParts
from zconvert.training import stages
from zconvert.training.loop import Trainer
from zconvert.training.observers import Observer

PARTS = GatedParts(rank=4, mlp_width=16)


def gated_run(
    folder: Path, model_type: str = "zaya", *, mask_token: str | None = None, spare_rows: int = 4, **changes: Any
) -> dict[str, Any]:
    settings = make_run(folder, model_type, spare_rows=spare_rows, **changes)
    convert_init(resolve(folder / "source"), folder / "gated", block_size=4, gated=PARTS, mask_token=mask_token)
    return {**settings, "base_model": str(folder / "gated")}


def train(settings: dict[str, Any]) -> Path:
    return stages.train(MidtrainRecipe(**settings), lambda _progress: None)


def hashes(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): sha256(path) for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(
    ("model_type", "how"),
    [
        ("zaya", {}),
        ("qwen3_moe", {"spare_rows": 0}),
        ("mixtral", {"mask_token": "<mask>"}),
    ],
)
@torch.no_grad()
def test_a_trained_gated_checkpoint_is_its_source_wherever_it_is_not_asked_to_draft(
    model_type: str, how: dict[str, Any], tmp_path: Path
) -> None:
    # From the data: the AR distribution of random weights holds little to learn.
    settings = gated_run(tmp_path, model_type, **how, diffusion={"objective": "data"})
    with torch.enable_grad():
        trained = train(settings)
    source = tmp_path / "source"
    for shard in source.glob("*.safetensors"):
        assert sha256(trained / shard.name) == sha256(shard), "the source's weights, byte for byte"
    losses = [row["loss_diffusion"] for row in metrics_of(Path(settings["output_dir"]))]
    assert losses[-1] < losses[0] - 0.1, "mask slots must have learnt what a frozen random head can say"

    merge_to_ar(resolve(trained), tmp_path / "merged")
    assert hashes(tmp_path / "merged") == hashes(source), "and all of it can be had back"

    plain, _ = load_model(resolve(source), dtype="float32", device="cpu")
    loaded, _ = load_model(resolve(trained), dtype="float32", device="cpu")
    layout, ids = layout_model_of(loaded), random_ids((1, 20), seed=1) % 50
    assert layout.gated is not None
    expected = plain(ids, use_cache=False).logits
    assert torch.equal(loaded(ids, use_cache=False).logits, expected), "exactly, not nearly"

    tidar, prompt = require_converted(resolve(trained)), ids[0, :6].tolist()
    lossless = DecodePlan.tidar(tidar, Sampling(), frozenset())
    causal = DecodePlan.autoregressive(tidar.mask_token_id, Sampling(), frozenset())
    text = [token for step in decode(layout, prompt, lossless, 24) for token in step.tokens]
    assert text == [token for step in decode(LayoutModel(plain), prompt, causal, 24) for token in step.tokens]


def test_a_gated_run_learns_what_its_source_says_unless_told_otherwise(tmp_path: Path) -> None:
    train(gated_run(tmp_path, "mixtral", max_steps=1, warmup_steps=0))
    (row,) = metrics_of(tmp_path / "run")
    # A divergence from the source's distribution, where the data's cross-entropy is about log 64, and that alone.
    assert row["loss"] == row["loss_diffusion"] < 1 < row["loss_ar"]


def test_a_gated_run_stopped_and_started_again_equals_the_uninterrupted_one(tmp_path: Path) -> None:
    settings = gated_run(tmp_path, max_steps=8)
    whole = train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(MidtrainRecipe(**settings), 5)
    state = load_file(next((tmp_path / "run" / "train_state" / "step-00000004").glob("*.safetensors")))
    weights = [name.removeprefix("model.") for name in state if name.startswith("model.")]
    assert weights
    assert all(name.startswith(("modules_by_name", "mask_embedding")) for name in weights), "gated weights only"
    resumed = train(settings)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert sha256(resumed / GATED_FILE) == sha256(whole / GATED_FILE)


def test_activation_checkpointing_changes_nothing(tmp_path: Path) -> None:
    settings = gated_run(tmp_path, max_steps=3)
    folders = []
    for name, on in (("plain", False), ("again", True)):
        folders.append(train({**settings, "output_dir": str(tmp_path / name), "gradient_checkpointing": on}))
    losses = [[row["loss_diffusion"] for row in metrics_of(folder.parent)] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_an_export_drafts_with_its_gated_weights_where_zconvert_is_unknown(tmp_path: Path) -> None:
    trained = train(gated_run(tmp_path, "mixtral", max_steps=40))
    export(resolve(trained), tmp_path / "exported")
    code = f"""
import json, sys
sys.modules["zconvert"] = None
import torch
from transformers import AutoModelForCausalLM
folder = {str(tmp_path / "exported")!r}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32)
ids = torch.tensor([[5, 6, 7, 8]])
text = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=[])
layout = model.__dict__["_tidar_layout_model"]
total = sum(float(p.abs().sum()) for p in layout.gated.parameters())
print(json.dumps([text[0].tolist(), total]))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    text, total = json.loads(done.stdout.splitlines()[-1])
    model, _ = load_model(resolve(trained), dtype="float32", device="cpu")
    layout = layout_model_of(model)
    assert layout.gated is not None
    assert total == pytest.approx(sum(float(p.detach().abs().sum()) for p in layout.gated.parameters()), rel=1e-5)
    plain, _ = load_model(resolve(tmp_path / "source"), dtype="float32", device="cpu")
    ids = torch.tensor([[5, 6, 7, 8]])
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": []}
    suppressed = model.generation_config.suppress_tokens
    expected = plain.generate(ids, attention_mask=torch.ones_like(ids), suppress_tokens=suppressed, **options)
    assert text == expected[0].tolist()


@pytest.mark.parametrize("model_type", ["zaya", "gpt_oss"])
def test_in_bfloat16_the_source_is_as_stored_and_what_is_trained_is_float32(model_type: str, tmp_path: Path) -> None:
    class Look(Observer):
        def on_step(self, trainer: Trainer) -> None:  # type: ignore[override]
            dtypes.append((trainer.model.dtype, {p.dtype for p in trainer.trained.parameters()}))

    dtypes: list[tuple[torch.dtype, set[torch.dtype]]] = []
    settings = gated_run(tmp_path, model_type, dtype="bfloat16", diffusion={"objective": "data"}, max_steps=12)
    trained = stages.train(MidtrainRecipe(**settings), lambda _progress: None, observers=[Look()])
    assert set(map(str, dtypes)) == {str((torch.bfloat16, {torch.float32}))}
    losses = [row["loss_diffusion"] for row in metrics_of(Path(settings["output_dir"]))]
    assert losses[-1] < losses[0]
    for name, tensor in load_file(trained / GATED_FILE).items():
        assert tensor.dtype == torch.float32, name


def test_trained_gated_weights_that_are_missing_are_not_made_up(tmp_path: Path) -> None:
    trained = train(gated_run(tmp_path, "mixtral", max_steps=3))
    model, _ = load_model(resolve(trained), dtype="float32", device="cpu")
    (trained / GATED_FILE).unlink()
    with pytest.raises(UserError, match="gated weights of run are missing"):
        load_model(resolve(trained), dtype="float32", device="cpu")
    with pytest.raises(ValueError, match="lacks tidar/gated"):
        layout_model_of(model)


def test_an_untrained_gated_checkpoint_is_not_exported(tmp_path: Path) -> None:
    gated_run(tmp_path)
    with pytest.raises(UserError, match="no gated weights yet"):
        export(resolve(tmp_path / "gated"), tmp_path / "exported")


@pytest.mark.parametrize("spare_rows", [0, 4])
def test_a_virtual_mask_token_changes_no_file_of_the_source_but_its_config(tmp_path: Path, spare_rows: int) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral", spare_rows=spare_rows, shards=3)
    settings = convert_init(resolve(source), tmp_path / "out", verify="logits", block_size=4, gated=PARTS)
    assert (settings.mask_token_id, settings.mask_token, settings.mask_token_source) == (ROWS, "", "virtual")
    for path in source.iterdir():
        if path.name != "config.json":
            assert sha256(tmp_path / "out" / path.name) == sha256(path)
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert after == {**before, "tidar": settings.to_dict()}


def test_a_named_mask_token_of_a_gated_checkpoint_has_a_row_of_the_source(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral")
    settings = convert_init(resolve(source), tmp_path / "out", block_size=4, gated=PARTS, mask_token="<gap>")
    assert (settings.mask_token_id, settings.mask_token, settings.mask_token_source) == (60, "<gap>", "spare_row")


@pytest.mark.parametrize(
    "choices",
    [{"gated": PARTS, "mask_token": "<gap>"}, {"gated": replace(PARTS, mask_embedding=False)}],
    ids=["named", "no embedding of its own"],
)
def test_a_mask_token_that_is_not_virtual_needs_a_row(tmp_path: Path, choices: dict[str, Any]) -> None:
    make_checkpoint(tmp_path / "full", "mixtral", spare_rows=0)
    with pytest.raises(UserError, match="no row left"):
        convert_init(resolve(tmp_path / "full"), tmp_path / "out", block_size=4, **choices)
    assert not (tmp_path / "out").exists()


def test_a_virtual_mask_token_that_is_a_token_of_the_model_is_refused(tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "source", "mixtral")
    convert_init(resolve(source), tmp_path / "out", block_size=4, gated=PARTS)
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    config["tidar"]["mask_token_id"] = ROWS - 1
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match="does not fit the model"):
        require_converted(resolve(tmp_path / "out"))
