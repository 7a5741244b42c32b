"""An export is run by transformers alone before it gets its name, and one that does something else is refused."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.checkpoint.tiny import make_tokenizer
from tests.contracts.families import make_family_model
from tests.contracts.models import VOCAB
from zconvert.checkpoint import export as exporting
from zconvert.checkpoint import verify_export as verifying
from zconvert.checkpoint.export import export
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import Source, require_converted, resolve
from zconvert.checkpoint.verify_export import check_files
from zconvert.checkpoint.weights import save_gated
from zconvert.errors import UserError
from zconvert.tidar.generate import layout_model_of
from zconvert.tidar.settings import GatedParts

Checkpoint = Callable[..., Path]
TIERS = {"full attention": "qwen3_moe", "sliding": "afmoe", "latent": "deepseek_v3", "sinks": "gpt_oss", "CCA": "zaya"}
"""families by what their attention does"""


def convert(source: Path, folder: Path, **choices: Any) -> Source:
    convert_init(resolve(source), folder / "converted", block_size=4, **choices)
    return resolve(folder / "converted")


@torch.no_grad()
def trained_gated(source: Path, folder: Path, seed: int = 0) -> Source:
    """A gated checkpoint whose added weights are random ones, that are felt."""
    torch.manual_seed(seed)
    converted = convert(source, folder, gated=GatedParts(rank=2, mlp_width=8))
    model, _ = load_model(converted, dtype="float32", device="cpu")
    weights = layout_model_of(model).gated
    assert weights is not None
    for parameter in weights.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    settings = dataclasses.replace(require_converted(converted), stages=("midtrain",))
    save_gated(weights, converted.folder, folder / "trained", settings=settings)
    return resolve(folder / "trained")


@pytest.mark.parametrize("mode", ["full", "gated"])
def test_an_export_decodes_by_tidar_where_zconvert_cannot_be_imported(
    tiny_checkpoint: Checkpoint, tmp_path: Path, mode: str
) -> None:
    source = tiny_checkpoint("zaya" if mode == "full" else "mixtral", dtype="float32")
    checkpoint = convert(source, tmp_path) if mode == "full" else trained_gated(source, tmp_path)
    verified = export(checkpoint, tmp_path / "out", verify=True)["verified"]
    assert verified["skipped"] is None
    assert verified["positions"] > 10
    assert verified["difference"] < 1e-4
    assert verified["prompts"] == 3


@pytest.mark.slow
@pytest.mark.parametrize("model_type", TIERS.values(), ids=TIERS)
def test_an_export_of_every_kind_of_attention_does(tmp_path: Path, model_type: str) -> None:
    make_family_model(model_type).save_pretrained(tmp_path / "source")
    make_tokenizer(VOCAB - 4).save_pretrained(tmp_path / "source")
    verified = export(convert(tmp_path / "source", tmp_path), tmp_path / "out", verify=True)["verified"]
    assert (verified["prompts"], verified["skipped"]) == (3, None)


def test_another_type_is_decoded_too_and_its_logits_are_not_compared(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    checkpoint = convert(tiny_checkpoint("qwen3_moe", dtype="float32"), tmp_path)
    verified = export(checkpoint, tmp_path / "out", dtype="bfloat16", verify=True)["verified"]
    assert (verified["positions"], verified["difference"], verified["prompts"]) == (0, None, 3)


def test_code_that_writes_something_else_leaves_no_export(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_code = exporting._write_code

    def careless(folder: Path) -> None:
        write_code(folder)
        path = folder / "decoding.py"
        path.write_text(path.read_text() + "\nraise ImportError('no such thing here')\n")

    monkeypatch.setattr(exporting, "_write_code", careless)
    with pytest.raises(UserError, match="does not do what the checkpoint does") as error:
        export(convert(tiny_checkpoint("mixtral"), tmp_path), tmp_path / "out", verify=True)
    assert "no such thing here" in str(error.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["logits", "text"])
def test_what_comes_out_elsewhere_is_held_against_the_checkpoint(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    checkpoint = convert(tiny_checkpoint("mixtral", dtype="float32"), tmp_path)

    def elsewhere(folder: Path, kind: str, ids: list[int]) -> tuple[dict[str, Any], torch.Tensor]:
        model, _ = load_model(resolve(folder), dtype="float32", device="cpu")
        assert kind == type(model).__name__
        logits = verifying._logits(model, ids)
        gaps = [0.5] if wrong == "text" else [None]
        answer = {"module": "transformers_modules.x", "plain": [[1]], "tidar": [[2]], "gaps": gaps}
        return answer, logits.roll(1, 0) if wrong == "logits" else logits

    monkeypatch.setattr(verifying, "_run_outside", elsewhere)
    with pytest.raises(UserError, match="does not do what") as error:
        export(checkpoint, tmp_path / "out", verify=True)
    assert {"logits": "logits that differ", "text": "[2] by TiDAR"}[wrong] in str(error.value)
    assert not (tmp_path / "out").exists()


def test_logits_that_differ_are_refused() -> None:
    expected = torch.tensor([[1.0, -20.0]])
    assert verifying._compare(expected, expected + 1e-4) == pytest.approx(1e-4, rel=0.1)
    for found in (expected + 3e-3, expected * math.nan, expected[:, :1]):
        with pytest.raises(UserError, match="does not do what"):
            verifying._compare(expected, found)


def test_texts_may_part_at_a_tie_and_nowhere_else() -> None:
    answer = {"module": "transformers_modules.x.generate", "plain": [[1, 2]], "tidar": [[1, 3]], "gaps": [1e-4]}
    verifying._check_texts(answer, scale=10.0)
    for change in ({"gaps": [0.2]}, {"gaps": [math.inf]}, {"module": "zconvert.tidar.generate"}, {"module": None}):
        with pytest.raises(UserError, match="does not do what"):
            verifying._check_texts({**answer, **change}, scale=10.0)


def remove_from(name: str, text: str) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = (folder / name).read_text()
        assert text in content
        (folder / name).write_text(content.replace(text, ""))

    return edit


def other_settings(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["tidar"]["block_size"] = 8
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (other_settings, "config.json has the checkpoint's settings"),
        (remove_from("generation_config.json", "60"), "never sampled"),
        (remove_from("README.md", "library_name: transformers\n"), "metadata can be read"),
        (remove_from("tokenizer_config.json", ',\n  "mask_token": "<mask>"'), "the tokenizer's files agree"),
    ],
)
def test_files_that_do_not_agree_are_told(
    tiny_checkpoint: Checkpoint, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    checkpoint = convert(tiny_checkpoint("mixtral"), tmp_path)
    export(checkpoint, tmp_path / "out")
    settings = require_converted(checkpoint)
    check_files(tmp_path / "out", settings)
    damage(tmp_path / "out")
    with pytest.raises(UserError) as error:
        check_files(tmp_path / "out", settings)
    assert message in str(error.value)


def test_a_model_too_large_to_run_is_told_and_its_files_are_checked(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verifying, "too_large_to_run", lambda _: "the model is large: 120 GB in float32")
    verified = export(convert(tiny_checkpoint("mixtral"), tmp_path), tmp_path / "out", verify=True)["verified"]
    assert verified["skipped"] == "the model is large: 120 GB in float32"
    assert verified["prompts"] == 0
