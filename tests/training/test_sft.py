"""Training on conversations: what is scored counts in both losses, the rest in none, and answers get better."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from tests.contracts.models import make_model
from tests.training.runs import make_run, metrics_of, train_until
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import require_converted, resolve
from zconvert.data.loading import load_stream
from zconvert.data.packing import Batch, PackedRows
from zconvert.errors import UserError
from zconvert.recipe import SftRecipe
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts
from zconvert.training import stages
from zconvert.training.objective import Targets, packed_losses

TEMPLATE = """{% for m in messages %}{{ m.role }}<bos>{{ m.content }}{{ eos_token }}{% endfor %}"""
TEMPLATE += """{% if add_generation_prompt %}assistant<bos>{% endif %}"""
BLOCK, MASK = 4, 63


def conversation(*contents: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[n % 2], "content": c} for n, c in enumerate(contents)]}


def make_sft(folder: Path, **changes: Any) -> SftRecipe:
    """A recipe for a tiny checkpoint: the answer to a word is the word after it."""
    settings = make_run(folder)
    rows = [conversation("ten", "tall trees"), conversation("seven", "more men", "the", "old stone")] * 8
    (folder / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "chat.jinja").write_text(TEMPLATE)
    return SftRecipe.model_validate(
        {
            **settings,
            "datasets": [{"path": str(folder / "chat.jsonl"), "type": "chat"}],
            "chat_template": str(folder / "chat.jinja"),
            "sequence_len": 64,
            **changes,
        }
    )


def batch_of(recipe: SftRecipe, tokenizer: Any) -> Batch:
    stream = load_stream(recipe, tokenizer)
    return PackedRows(
        stream, sequence_len=recipe.sequence_len, rows=2, seed=0, sample_packing=True, pad_token_id=0
    ).next_batch()


def test_a_mask_slot_is_scored_exactly_where_its_clean_token_is(tmp_path: Path) -> None:
    recipe = make_sft(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(recipe.base_model)
    batch = batch_of(recipe, tokenizer)
    targets = Targets.of(batch)
    for ids, numbers, ar, diffusion in zip(
        batch.input_ids, batch.document_ids, targets.ar, targets.diffusion, strict=True
    ):
        said = []
        for number in range(int(numbers.max()) + 1):
            here = numbers == number
            # In both halves: the mask slot of a token, and the clean slot before that token.
            assert torch.equal(ids[here & diffusion], ids[1:][(here & ar)[:-1]])
            said.append(tokenizer.decode(ids[here & diffusion]))
        assert set(said) <= {"tall trees<eos>", "more men<eos> old stone<eos>"}
        assert not diffusion[numbers == -1].any()


@pytest.mark.parametrize("changed", ["labels that are not scored", "padding"])
def test_what_is_not_scored_adds_nothing_to_either_loss(changed: str, tmp_path: Path) -> None:
    """Losses are those summed by hand over scored tokens, from the logits of a plain forward of each half."""
    recipe = make_sft(tmp_path)
    batch = batch_of(recipe, AutoTokenizer.from_pretrained(recipe.base_model))
    model = LayoutModel(make_model("qwen3_moe"))
    sums = packed_losses(model, batch, mask_token_id=MASK, block_size=BLOCK)
    counts = batch.loss_mask.sum()
    assert int(sums.slot_count.sum()) == int(counts)
    if changed == "padding":
        other = torch.where(batch.document_ids == -1, 7, batch.input_ids)
        same = packed_losses(model, dataclasses.replace(batch, input_ids=other), mask_token_id=MASK, block_size=BLOCK)
        torch.testing.assert_close((same.ar, same.diffusion), (sums.ar, sums.diffusion))
        return
    # The sums fall apart into one token's each: unscored ones have none.
    for number in range(batch.loss_mask.shape[1]):
        one = torch.zeros_like(batch.loss_mask)
        one[0, number] = True
        part = packed_losses(
            model, dataclasses.replace(batch, loss_mask=one & batch.loss_mask), mask_token_id=MASK, block_size=BLOCK
        )
        scored = bool(batch.loss_mask[0, number])
        assert (part.diffusion.item() > 0) == scored
        assert (part.ar.item() > 0) == scored
        if number > 24:
            break


def test_the_stage_teaches_answers_and_the_checkpoint_says_how_to_ask(tmp_path: Path) -> None:
    recipe = make_sft(tmp_path, max_steps=100, learning_rate=0.01, weight_decay=0.0)
    checkpoint = stages.train(recipe, lambda _progress: None)
    first, last = metrics_of(Path(recipe.output_dir))[0], metrics_of(Path(recipe.output_dir))[-1]
    assert last["loss_ar"] < 0.1 < first["loss_ar"]
    assert require_converted(resolve(checkpoint)).stages == ("sft",)
    model, tokenizer = load_model(resolve(checkpoint), dtype="float32", device="cpu")
    for question, answer in (("ten", "tall trees"), ("seven", "more men")):
        asked = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        said = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
        assert tokenizer.decode(said, skip_special_tokens=True).strip() == answer


def test_a_run_of_conversations_that_was_stopped_goes_on_as_if_it_had_not_been(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    streamed = {"path": str(tmp_path / "chat.jsonl"), "type": "chat", "streaming": True, "shuffle_buffer_size": 3}
    recipe = make_sft(tmp_path, datasets=[streamed], max_steps=12, save_steps=5)
    stages.train(recipe, lambda _progress: None)
    again = recipe.model_copy(update={"output_dir": str(tmp_path / "again")})
    train_until(again, 7)
    stages.train(again, lambda _progress: None)
    assert metrics_of(Path(again.output_dir)) == metrics_of(Path(recipe.output_dir))


@pytest.mark.parametrize("gated", [None, GatedParts(rank=4, mlp_width=16)], ids=["full", "gated"])
def test_a_run_can_be_trained_on_text_of_its_own(gated: GatedParts | None, tmp_path: Path) -> None:
    (tmp_path / "prompts.jsonl").write_text('{"messages": [{"role": "user", "content": "ten"}]}\n' * 3)
    generated = {"prompts": str(tmp_path / "prompts.jsonl"), "max_new_tokens": 8}
    recipe = make_sft(tmp_path, datasets=[{"self_generated": generated, "type": "chat"}], max_steps=2, warmup_steps=0)
    if gated is not None:
        convert_init(resolve(tmp_path / "source"), tmp_path / "gated", block_size=4, gated=gated)
        recipe = recipe.model_copy(update={"base_model": str(tmp_path / "gated")})
    told: list[str | None] = []
    assert stages.train(recipe, lambda progress: told.append(progress.message)).is_dir()
    assert any(text is not None and "text of its own" in text for text in told)


def test_text_alone_is_refused_for_sft(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one entry with type: chat"):
        make_sft(tmp_path, datasets=[{"path": "x.jsonl"}])


def test_the_example_is_the_first_good_conversation_with_its_scored_stretches(tmp_path: Path) -> None:
    recipe = make_sft(tmp_path)
    path = tmp_path / "chat.jsonl"
    path.write_text("{broken\n" + path.read_text())
    name, stretches = stages.example(recipe)
    assert name == str(path)
    assert [text.strip() for text, scored in stretches if scored] == ["tall trees<eos>"]
    assert "".join(text for text, _ in stretches).startswith("user<bos> ten<eos>")
    path.write_text("{broken\n")
    with pytest.raises(UserError, match="is not JSON"):
        stages.example(recipe)
    path.write_text("")
    with pytest.raises(UserError, match="no conversation to show"):
        stages.example(recipe)
