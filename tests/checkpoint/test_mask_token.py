"""The mask token: which one is chosen, and that transformers' tokenizers know it afterwards by name and id."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import ROWS
from zconvert.checkpoint.headers import Headers, TensorInfo
from zconvert.checkpoint.mask_token import MaskToken, choose_mask_token, read_vocabulary, tokenizer_patches
from zconvert.errors import UserError

TEXT = "ten tall trees and seven more men"
Checkpoint = Callable[..., Path]


def headers(rows: int = ROWS) -> Headers:
    name = "model.embed_tokens.weight"
    return Headers({name: TensorInfo(name, "BF16", (rows, 32), "model.safetensors", 0, rows * 64)}, ())


def choose(folder: Path, wanted: str | int | None = None, rows: int = ROWS, **config: Any) -> MaskToken:
    return choose_mask_token(folder, headers(rows), {"vocab_size": rows, "hidden_size": 32, **config}, wanted)


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


def apply(folder: Path, mask: MaskToken) -> dict[str, str]:
    patches = tokenizer_patches(folder, mask)
    for name, text in patches.items():
        (folder / name).write_text(text)
    return patches


def load(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_an_existing_mask_token_is_preferred(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("zaya", mask_token=True)
    assert choose(folder) == MaskToken(4, "<mask>", "existing", ROWS)
    assert tokenizer_patches(folder, choose(folder)) == {}


@pytest.mark.parametrize("text", ["[MASK]", "<|mask|>", "<|mask_token|>", "<mask>"])
def test_an_added_token_of_a_usual_name_counts_as_existing(tiny_checkpoint: Checkpoint, text: str) -> None:
    folder = tiny_checkpoint("mixtral")
    added = {"id": 60, "content": text, "special": True, "lstrip": False, "rstrip": False}
    added |= {"single_word": False, "normalized": False}
    edit(folder / "tokenizer.json", lambda d: d["added_tokens"].append(added))
    assert choose(folder) == MaskToken(60, text, "existing", ROWS)
    assert set(apply(folder, choose(folder))) == {"tokenizer_config.json"}
    assert load(folder).mask_token_id == 60


def test_the_mask_token_that_the_configuration_declares_comes_first(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("zaya", mask_token=True)
    edit(folder / "tokenizer_config.json", lambda d: d.update(mask_token={"content": "x"}))
    assert choose(folder).text == "x"


def test_without_one_the_first_spare_row_is_taken(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral", spare_rows=4)
    assert choose(folder) == MaskToken(60, "<mask>", "spare_row", ROWS)
    before = load(folder)
    patches = apply(folder, choose(folder))
    after = load(folder)
    assert set(patches) == {"tokenizer.json", "tokenizer_config.json"}
    assert after.mask_token_id == 60
    assert after.mask_token == "<mask>"
    assert len(after) == 61
    assert after.encode(f"{TEXT}<mask>")[: len(before.encode(TEXT)) + 1] == [*before.encode(TEXT), 60]
    assert after.encode(TEXT) == before.encode(TEXT)
    assert after.get_vocab() == {**before.get_vocab(), "<mask>": 60}
    assert after.decode([60], skip_special_tokens=True) == ""
    assert (after.eos_token_id, after.bos_token_id, after.pad_token_id) == (1, 2, 0)


def test_patching_the_tokenizer_keeps_every_other_byte(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    before = (folder / "tokenizer.json").read_text()
    after = tokenizer_patches(folder, choose(folder))["tokenizer.json"]
    cut = after.index('"id": 60') - len(",\n    {\n      ")
    added = len(after) - len(before)
    assert after[:cut] + after[cut + added :] == before


def test_without_a_spare_row_the_embedding_grows_to_a_multiple_of_64(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral", spare_rows=0)
    assert choose(folder) == MaskToken(64, "<mask>", "grown", 128)
    apply(folder, choose(folder))
    assert load(folder).mask_token_id == 64
    assert len(load(folder)) == 65


def test_a_name_or_an_id_overrides_the_choice(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("zaya", mask_token=True)
    assert choose(folder, "<|blank|>") == MaskToken(60, "<|blank|>", "spare_row", ROWS)
    assert choose(folder, "x").source == "existing"
    assert choose(folder, 60) == MaskToken(60, "<|mask_0|>", "spare_row", ROWS)  # <mask> is the text of 4
    assert choose(folder, 4) == MaskToken(4, "<mask>", "existing", ROWS)


def test_an_ordinary_entry_can_be_named_and_becomes_a_special_token(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    mask = choose(folder, "z")
    apply(folder, mask)
    tokenizer = load(folder)
    assert tokenizer.mask_token_id == mask.id < 60
    assert len(tokenizer) == 60


@pytest.mark.parametrize("wanted", ["<eos>", "<pad>", "<bos>", 1])
def test_a_token_with_another_duty_is_refused(tiny_checkpoint: Checkpoint, wanted: str | int) -> None:
    with pytest.raises(UserError, match="cannot be the mask token"):
        choose(tiny_checkpoint("mixtral"), wanted)


@pytest.mark.parametrize("wanted", [61, 64, 1000])
def test_an_id_that_would_leave_a_gap_is_refused(tiny_checkpoint: Checkpoint, wanted: int) -> None:
    with pytest.raises(UserError, match=f"id {wanted} cannot") as caught:
        choose(tiny_checkpoint("mixtral"), wanted)
    assert "--mask-token 60" in str(caught.value.fix)


def test_an_empty_name_is_refused(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="no text"):
        choose(tiny_checkpoint("mixtral"), "  ")


def test_the_older_files_of_a_tokenizer_are_patched_where_they_are(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    entry = {"special": True, "lstrip": False, "rstrip": False, "single_word": False, "normalized": False}
    names = ["<pad>", "<eos>", "<bos>", "<unk>"]
    edit(
        folder / "tokenizer_config.json",
        lambda d: d.update(
            added_tokens_decoder={str(i): {"content": n, **entry} for i, n in enumerate(names)},
            tokenizer_class="PreTrainedTokenizerFast",
        ),
    )
    (folder / "special_tokens_map.json").write_text('{"eos_token": "<eos>"}')
    (folder / "added_tokens.json").write_text("{}")
    patches = apply(folder, choose(folder))
    assert set(patches) == {"tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"}
    assert json.loads(patches["special_tokens_map.json"]) == {"eos_token": "<eos>", "mask_token": "<mask>"}
    assert json.loads(patches["added_tokens.json"]) == {"<mask>": 60}
    config = json.loads(patches["tokenizer_config.json"])
    assert config["mask_token"] == "<mask>"
    assert config["added_tokens_decoder"]["60"] == {"content": "<mask>", **entry}
    tokenizer = load(folder)
    assert (tokenizer.mask_token_id, len(tokenizer), tokenizer.eos_token_id) == (60, 61, 1)


def test_the_count_of_entries_is_the_one_that_transformers_has(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral", spare_rows=7)
    assert len(read_vocabulary(folder)) == len(load(folder)) == ROWS - 7


def test_a_unigram_vocabulary_is_counted_by_its_places(tmp_path: Path) -> None:
    model = {"type": "Unigram", "vocab": [["<unk>", 0.0], ["a", -1.0]]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model, "added_tokens": [{"id": 2, "content": "b"}]}))
    assert read_vocabulary(tmp_path).ids == {"<unk>": 0, "a": 1, "b": 2}


def test_a_tokenizer_larger_than_the_embedding_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral", spare_rows=0)
    with pytest.raises(UserError, match="does not fit the model") as caught:
        choose(folder, rows=48)
    assert "id 63" in str(caught.value.found)


def test_gaps_are_no_harm_to_an_existing_mask_token_but_forbid_a_new_one(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("zaya", mask_token=True)
    edit(folder / "tokenizer.json", lambda d: d["model"]["vocab"].update(z=62))
    assert choose(folder).id == 4
    with pytest.raises(UserError, match="ids have gaps"):
        choose(folder, "<new>")


def test_two_tokens_of_one_id_are_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    edit(folder / "tokenizer.json", lambda d: d["model"]["vocab"].update(z=5))
    with pytest.raises(UserError, match="one id to two tokens"):
        choose(folder)


def test_a_missing_or_malformed_tokenizer_is_refused(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    (folder / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        choose(folder)
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(UserError, match="malformed"):
        choose(folder)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match="has no tokenizer"):
        choose(folder)


def test_an_embedding_is_needed_that_agrees_with_the_configuration(tiny_checkpoint: Checkpoint) -> None:
    folder = tiny_checkpoint("mixtral")
    with pytest.raises(UserError, match="no input embedding"):
        choose_mask_token(folder, Headers({}, ()), {"vocab_size": ROWS, "hidden_size": 32})
    with pytest.raises(UserError, match="does not agree"):
        choose_mask_token(folder, headers(), {"vocab_size": ROWS + 1, "hidden_size": 32})
