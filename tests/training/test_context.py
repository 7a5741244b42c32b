"""The extend-context stage: long documents preferred, positions changed, and losses by position told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from tests.contracts.models import MASK, make_model, random_ids
from tests.training.processes import for_processes, launch
from tests.training.runs import make_run, metrics_of
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.data.documents import Document, Documents
from zconvert.errors import UserError
from zconvert.recipe import ExtendContextRecipe
from zconvert.tidar.layout import packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts, TidarSettings
from zconvert.training import stages
from zconvert.training.context import CONTEXT_FILE, ContextExtension, position_losses, prefer_long


def documents(*lengths: int) -> Documents:
    return Documents.of(Document([n] * n, [True] * n) for n in lengths)


def lengths_of(found: Documents) -> list[int]:
    return [found.length(number) for number in range(len(found))]


def test_short_documents_leave_until_long_ones_have_their_share() -> None:
    found = prefer_long(documents(*[5] * 20, 40, 20, 60), longer_than=20, share=0.8, seed=0)
    lengths = lengths_of(found)
    assert sum(n for n in lengths if n > 20) == 100  # all of these stay
    assert 0.8 <= 100 / sum(lengths) < 0.9  # and as many short ones as there is room for
    for number in range(len(found)):
        ids, scored = found.tokens(number)
        assert ids.tolist() == [len(ids)] * len(ids)
        assert scored.all()


def test_which_ones_leave_depends_on_the_seed_alone() -> None:
    all_of_them = Documents.of(Document([n] * 5, [True] * 5) for n in range(40))
    mixed = Documents.of(
        [Document(all_of_them.tokens(n)[0].tolist(), [True] * 5) for n in range(40)] + [Document([7] * 90, [True] * 90)]
    )
    once, again, other = (prefer_long(mixed, 50, 0.7, seed).fingerprint() for seed in (1, 1, 2))
    assert once == again != other


def test_enough_long_documents_or_no_share_leave_all_as_they_are() -> None:
    there = documents(5, 50)
    assert prefer_long(there, 20, 0.9, 0) is there
    assert prefer_long(documents(5, 6), 20, 0.0, 0).token_count == 11
    with pytest.raises(UserError, match="no document is longer than 20"):
        prefer_long(documents(5, 6), 20, 0.5, 0)


def test_losses_by_position_are_those_of_the_plain_model() -> None:
    model = LayoutModel(make_model("zaya"))
    ids = random_ids((1, 20), 3)
    settings = TidarSettings(block_size=4, mask_token_id=MASK)
    rows = position_losses(model, [ids[0], ids[0, :9]], settings, target_len=24, buckets=3)
    with torch.no_grad():
        plain = F.cross_entropy(model.model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
        row = torch.cat([ids, torch.full_like(ids, MASK)], 1)
        slots = model.logits(model.hidden_states(row, packed_layout(torch.zeros_like(ids), 4)))[0, 20:]
        own = F.cross_entropy(slots, ids[0], reduction="none")
    assert [row["tokens"] for row in rows] == [7 + 7, 8 + 1, 4]
    assert rows[0]["loss_ar"] == pytest.approx(plain[:7].mean().item(), abs=1e-5)
    assert rows[1]["loss_ar"] == pytest.approx((plain[7:15].sum() + plain[7]).item() / 9, abs=1e-5)
    assert rows[2]["loss_ar"] == pytest.approx(plain[15:].mean().item(), abs=1e-5)
    assert rows[2]["loss_diffusion"] == pytest.approx(own[16:].mean().item(), abs=1e-5)


def test_parts_that_no_document_reaches_have_no_loss() -> None:
    settings = TidarSettings(block_size=4, mask_token_id=MASK)
    rows = position_losses(LayoutModel(make_model("mixtral")), [random_ids((9,), 0)], settings, 32, 2)
    assert (rows[1]["tokens"], rows[1]["loss_ar"], rows[1]["loss_diffusion"]) == (0, None, None)


def extension_run(folder: Path, model_type: str = "zaya", **changes: Any) -> dict[str, Any]:
    settings = make_run(folder, model_type, max_steps=4, warmup_steps=0, sequence_len=64)
    text = "the cat sat on the mat and seven men sing to the old stone. "
    (folder / "data.jsonl").write_text("".join(json.dumps({"text": text * n}) + "\n" for n in (1, 1, 4, 6, 1)))
    context = {"original_len": 16, "target_len": 64, "buckets": 4, "report_documents": 2}
    return {**settings, "context": {**context, **changes}}


@pytest.mark.parametrize("model_type", ["zaya", "qwen3_moe"])
def test_the_stage_writes_a_checkpoint_with_the_new_positions_and_reports_both_losses(
    tmp_path: Path, model_type: str
) -> None:
    settings = extension_run(tmp_path, model_type, rope="yarn")
    folder = stages.train(ExtendContextRecipe(**settings), lambda _: None)
    source = resolve(folder)
    assert require_converted(source).stages == ("extend-context",)
    rope = json.loads((folder / "config.json").read_text())["rope_parameters"]
    rope = rope["hybrid"] if model_type == "zaya" else rope
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 16)
    base = json.loads((Path(settings["base_model"]) / "config.json").read_text())
    written = json.loads((folder / "config.json").read_text())
    assert {key for key in base if base[key] != written[key]} == {"rope_parameters", "tidar"}
    report = json.loads((folder.parent / CONTEXT_FILE).read_text())
    assert [(row["from"], row["to"]) for row in report["after"]] == [(0, 16), (16, 32), (32, 48), (48, 64)]
    assert all(
        after["loss_ar"] < before["loss_ar"] for before, after in zip(report["before"], report["after"], strict=True)
    )
    assert not (folder.parent / ".base").exists()
    assert not (folder / "model.safetensors").is_symlink()


@pytest.mark.slow
def test_two_processes_extend_and_measure_as_one_does(tmp_path: Path) -> None:
    settings = {**extension_run(tmp_path, "zaya", rope="yarn"), "learning_rate": 1e-3, "save_dtype": "float32"}
    stages.train(ExtendContextRecipe(**for_processes(settings, 1)), lambda _: None)
    (tmp_path / "run").rename(tmp_path / "one")
    done = launch(tmp_path, for_processes(settings, 2), "extend-context")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "run" / "checkpoint"), "one process speaks for all"
    one, two = (json.loads((tmp_path / name / CONTEXT_FILE).read_text()) for name in ("one", "run"))
    for moment, tolerance in (("before", 1e-5), ("after", 1e-3)):  # steps of Adam lie between
        for expected, found in zip(one[moment], two[moment], strict=True):
            assert found == pytest.approx(expected, rel=tolerance), moment
    assert [row["loss"] for row in metrics_of(tmp_path / "run")] == pytest.approx(
        [row["loss"] for row in metrics_of(tmp_path / "one")], rel=1e-4
    )
    configs = [json.loads((tmp_path / name / "checkpoint" / "config.json").read_text()) for name in ("one", "run")]
    assert configs[0] == configs[1]
    assert not (tmp_path / "run" / ".base").exists()


def test_a_run_that_goes_on_keeps_what_was_measured_before(tmp_path: Path) -> None:
    settings = extension_run(tmp_path)
    source = resolve(settings["base_model"])
    section = ExtendContextRecipe(**settings).context
    made: list[int] = []

    def load() -> LayoutModel:
        made.append(1)
        return LayoutModel(make_model("zaya"))

    for _ in range(2):
        extension = ContextExtension(source, require_converted(source), section, tmp_path)
        extension.report_before(load, documents(30, 40), "held out")
    assert made == [1]
    extension.report_before(load, documents(30, 50), "held out")
    assert made == [1, 1]


def test_a_gated_checkpoint_is_refused(tmp_path: Path) -> None:
    settings = extension_run(tmp_path)
    gated = TidarSettings(block_size=4, mask_token_id=4, mode="gated", gated=GatedParts())
    with pytest.raises(UserError, match="gated checkpoint cannot be extended"):
        ContextExtension(resolve(settings["base_model"]), gated, ExtendContextRecipe(**settings).context, tmp_path)
