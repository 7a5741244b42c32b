"""The graft: what it changes, that it changes nothing else, and that a failure leaves nothing behind."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import zconvert
from tests.checkpoint.tiny import MODEL_TYPES, ROWS
from tests.commands import run_command
from zconvert.checkpoint.folder import BASE_CARD
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import TensorInfo, read_headers
from zconvert.checkpoint.source import Source, resolve, tidar_settings
from zconvert.checkpoint.weights import write_shard
from zconvert.errors import UserError

Checkpoint = Callable[..., Path]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    found: dict[str, torch.Tensor] = {}
    for shard in folder.glob("*.safetensors"):
        found |= load_file(shard)
    return found


def logits(folder: Path, rows: int = ROWS, without: int = 60) -> torch.Tensor:
    """Causal logits of a plain model, on ids that leave out the mask token's."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.tensor([[i for i in range(ROWS) if i != without]])
    with torch.inference_mode():
        return model(ids).logits[..., [i for i in range(rows) if i != without]]


def json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


def edit(path: Path, **members: Any) -> None:
    path.write_text(json.dumps({**json_of(path), **members}, indent=2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_only_the_mask_tokens_row_differs_from_the_source(
    tiny_checkpoint: Checkpoint, tmp_path: Path, model_type: str, dtype: str
) -> None:
    source, out = tiny_checkpoint(model_type, dtype=dtype), tmp_path / "out"
    settings = convert_init(resolve(source), out, block_size=8, proposals=[5, 1, 3])
    assert (settings.mask_token_id, settings.mask_token_source, settings.proposals) == (60, "spare_row", (1, 3, 5))
    before, after = tensors(source), tensors(out)
    assert before.keys() == after.keys()
    mean = before[EMBEDDING][:60].float().mean(0).to(before[EMBEDDING].dtype)
    torch.testing.assert_close(after[EMBEDDING][60], mean)
    before[EMBEDDING][60] = after[EMBEDDING][60]
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare_rows", [4, 0])
@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_the_converted_folder_computes_the_sources_logits_on_every_id_but_the_masks(
    tiny_checkpoint: Checkpoint, tmp_path: Path, model_type: str, spare_rows: int, tied: bool
) -> None:
    source = tiny_checkpoint(model_type, tied=tied, spare_rows=spare_rows, shards=3)
    mask = convert_init(resolve(source), tmp_path / "out").mask_token_id
    assert mask == ROWS - spare_rows
    # To rounding, which depends on where in memory the weights lie; that these are equal is tested above.
    torch.testing.assert_close(logits(source, without=mask), logits(tmp_path / "out", without=mask), rtol=0, atol=1e-6)


def test_the_source_is_untouched_even_where_its_files_are_links(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "snapshot"
    snapshot.mkdir()
    shutil.copytree(tiny_checkpoint("qwen3_moe", shards=3), blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(path)
    before = hashes(blobs)
    convert_init(resolve(snapshot), tmp_path / "out")
    assert hashes(blobs) == before
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_untouched_shards_cost_no_bytes_and_edited_files_are_nobody_elses(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source, out = tiny_checkpoint("mixtral", shards=3), tmp_path / "out"
    convert_init(resolve(source), out)
    edited = read_headers(out).tensors[EMBEDDING].shard
    for path in out.iterdir():
        if path.suffix != ".safetensors" or path.name == edited:
            assert path.stat().st_nlink == 1, f"{path.name} could be edited and is the source's file too"
        else:
            assert hashes(path.parent)[path.name] == hashes(source)[path.name]


def test_json_files_keep_every_other_byte(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = tiny_checkpoint("zaya"), tmp_path / "out"
    (source / "config.json").write_text((source / "config.json").read_text().replace("1e-05", "0.000010"))
    settings = convert_init(resolve(source), out)
    before, after = (source / "config.json").read_text(), (out / "config.json").read_text()
    assert after.startswith(before.rstrip("}\n") + ',\n  "tidar": {\n')
    assert tidar_settings(json_of(out / "config.json")) == settings
    assert (settings.base_model, settings.stages) == ("zaya", ())


def test_the_ar_path_is_kept_from_the_mask_token(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import GenerationConfig

    source = tiny_checkpoint("mixtral")
    edit(source / "generation_config.json", suppress_tokens=[7], _from_model_config=True)
    convert_init(resolve(source), tmp_path / "out")
    loaded = GenerationConfig.from_pretrained(tmp_path / "out")
    assert loaded.suppress_tokens == [7, 60]
    assert "_from_model_config" not in json_of(tmp_path / "out" / "generation_config.json")


def test_a_checkpoint_without_generation_config_still_stops_at_its_eos(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    source = tiny_checkpoint("mixtral")
    (source / "generation_config.json").unlink()
    convert_init(resolve(source), tmp_path / "out")
    plain, ours = (AutoModelForCausalLM.from_pretrained(f).generation_config for f in (source, tmp_path / "out"))
    assert ours.suppress_tokens == [60]
    for key in ("eos_token_id", "bos_token_id", "pad_token_id", "do_sample", "temperature", "max_length"):
        assert getattr(ours, key) == getattr(plain, key)


def test_the_tokenizer_knows_the_mask_token(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    convert_init(resolve(tiny_checkpoint("qwen3_moe")), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert (tokenizer.mask_token, tokenizer.mask_token_id, len(tokenizer)) == ("<mask>", 60, 61)


@pytest.mark.parametrize("tied", [True, False])
def test_growth_adds_rows_everywhere_they_belong(tiny_checkpoint: Checkpoint, tmp_path: Path, tied: bool) -> None:
    from transformers import AutoModelForCausalLM

    source, out = tiny_checkpoint("qwen3_moe", tied=tied, spare_rows=0, shards=3), tmp_path / "out"
    settings = convert_init(resolve(source), out, mask_init="zero")
    assert (settings.mask_token_id, settings.mask_token_source) == (64, "grown")
    before, after = tensors(source), tensors(out)
    assert json_of(out / "config.json")["vocab_size"] == 128
    mean = before[EMBEDDING].float().mean(0).bfloat16()
    assert after[EMBEDDING].shape == (128, 32)
    assert torch.equal(after[EMBEDDING][:64], before[EMBEDDING])
    assert not after[EMBEDDING][64].any()
    torch.testing.assert_close(after[EMBEDDING][65:], mean.expand(63, 32))
    if not tied:
        torch.testing.assert_close(after[HEAD][64:], before[HEAD].float().mean(0).bfloat16().expand(64, 32))
    old, new = (json_of(folder / "model.safetensors.index.json")["metadata"] for folder in (source, out))
    added = 64 * 32 * (1 if tied else 2)
    assert new["total_size"] - old["total_size"] == 2 * added
    assert new["total_parameters"] - old["total_parameters"] == added
    assert json_of(out / "generation_config.json")["suppress_tokens"] == list(range(64, 128))
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size == 128


def test_rows_that_growth_adds_never_win_over_the_tokenizers(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("zaya", spare_rows=0)
    convert_init(resolve(source), tmp_path / "out")
    assert int(logits(tmp_path / "out", rows=128, without=64).argmax(-1).max()) < ROWS


@pytest.mark.parametrize("shape", ["declared", "undeclared"])
def test_a_tied_head_that_is_on_disk_stays_equal_to_the_embedding(
    tiny_checkpoint: Checkpoint, tmp_path: Path, shape: str
) -> None:
    from safetensors.torch import load_file, save_file

    source, out = tiny_checkpoint("zaya", tied=True), tmp_path / "out"
    weights = load_file(source / "model.safetensors")
    save_file({**weights, HEAD: weights[EMBEDDING].clone()}, source / "model.safetensors", {"format": "pt"})
    if shape == "undeclared":
        config = json_of(source / "config.json")
        del config["tie_word_embeddings"]
        (source / "config.json").write_text(json.dumps(config, indent=2))
    convert_init(resolve(source), out)
    after = tensors(out)
    assert torch.equal(after[HEAD], after[EMBEDDING])
    assert not torch.equal(after[HEAD], weights[EMBEDDING])


def test_an_untied_head_is_left_alone(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral", tied=False)
    convert_init(resolve(source), tmp_path / "out")
    assert torch.equal(tensors(source)[HEAD], tensors(tmp_path / "out")[HEAD])


def test_each_start_value_is_what_its_name_says(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    table = tensors(source)[EMBEDDING]

    def row(mask_init: str, seed: int = 0) -> torch.Tensor:
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        convert_init(resolve(source), tmp_path / "out", mask_init=mask_init, seed=seed)
        return tensors(tmp_path / "out")[EMBEDDING][60]

    assert not row("zero").any()
    assert torch.equal(row("copy:a"), table[resolve_id(source, "a")])
    assert torch.equal(row("copy:7"), table[resolve_id(source, "7")])  # a text comes before an id
    assert torch.equal(row("copy:42"), table[42])
    assert torch.equal(row("random", 1), row("random", 1))
    assert not torch.equal(row("random", 1), row("random", 2))
    spread = table[:60].float().std()
    assert 0.5 * spread < row("random").float().std() < 2 * spread


def test_the_mean_that_an_existing_entry_starts_from_is_that_of_the_others(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral", mask_token=True)
    settings = convert_init(resolve(source), tmp_path / "out")
    assert settings.mask_token_source == "existing"
    others = torch.arange(60) != settings.mask_token_id
    mean = tensors(source)[EMBEDDING][:60][others].float().mean(0).bfloat16()
    torch.testing.assert_close(tensors(tmp_path / "out")[EMBEDDING][settings.mask_token_id], mean, rtol=0.01, atol=1e-5)


def resolve_id(folder: Path, token: str) -> int:
    return json_of(folder / "tokenizer.json")["model"]["vocab"][token]


@pytest.mark.parametrize("mask_init", ["median", "copy:", "copy:nothing of the sort", "copy:64", "copy:-1", ""])
def test_an_unknown_start_value_is_a_users_error(tiny_checkpoint: Checkpoint, tmp_path: Path, mask_init: str) -> None:
    with pytest.raises(UserError):
        convert_init(resolve(tiny_checkpoint("mixtral")), tmp_path / "out", mask_init=mask_init)
    assert not (tmp_path / "out").exists()


def test_bfloat16_is_rounded_as_torch_rounds_it() -> None:
    from zconvert.checkpoint.rows import as_floats, as_stored

    values = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    values[:4] = torch.tensor([0.0, -0.0, 1.00390625, 3.0e38])  # zeros, a tie, nearly the largest
    stored = torch.frombuffer(bytearray(as_stored(values.numpy(), "BF16")), dtype=torch.bfloat16)
    assert torch.equal(stored, values.bfloat16())
    assert torch.equal(torch.from_numpy(as_floats(stored.view(torch.uint16).numpy(), "BF16")), stored.float())


def test_what_belongs_to_the_source_goes_along(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source = tiny_checkpoint("mixtral")
    for name in ("LICENSE", "README.md", "chat_template.jinja"):
        (source / name).write_text(name)
    convert_init(resolve(source), tmp_path / "out")
    assert {"LICENSE", BASE_CARD, "chat_template.jinja"} <= set(os.listdir(tmp_path / "out"))
    assert "README.md" not in os.listdir(tmp_path / "out")


def test_a_family_that_cannot_work_is_refused_with_the_reason_before_weights_are_read(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("mixtral")
    edit(source / "config.json", model_type="jamba")
    (source / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be converted") as caught:
        convert_init(resolve(source), tmp_path / "out")
    assert "Mamba" in str(caught.value.found)


def test_a_converted_checkpoint_is_not_converted_again(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    convert_init(resolve(tiny_checkpoint("mixtral")), tmp_path / "one")
    with pytest.raises(UserError, match="converted already"):
        convert_init(resolve(tmp_path / "one"), tmp_path / "two")


@pytest.mark.parametrize(("settings"), [{"block_size": 0}, {"block_size": 4, "proposals": [5]}, {"proposals": []}])
def test_settings_that_cannot_work_are_users_errors(
    tiny_checkpoint: Checkpoint, tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match="settings cannot work"):
        convert_init(resolve(tiny_checkpoint("mixtral")), tmp_path / "out", **settings)


def test_an_existing_output_is_refused_and_left_alone(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        convert_init(resolve(tiny_checkpoint("mixtral")), tmp_path / "out")
    assert os.listdir(tmp_path / "out") == ["mine"]


@pytest.mark.parametrize("spare_rows", [4, 0])
def test_the_folder_says_what_it_was_made_of_and_with_which_choices(
    tiny_checkpoint: Checkpoint, tmp_path: Path, spare_rows: int
) -> None:
    source = Source(tiny_checkpoint("zaya", spare_rows=spare_rows, tied=False), "org/zaya", "c0ffee")
    convert_init(source, tmp_path / "out", block_size=8, proposals=[2, 1], mask_init="random", seed=7)
    told = json_of(tmp_path / "out" / "provenance.json")
    assert (told["base_model"], told["base_revision"], told["stages"]) == ("org/zaya", "c0ffee", [])
    assert told["tool"] == {"name": "zconvert", "version": zconvert.__version__}
    assert told["libraries"]["transformers"]
    assert told["conversion"]["block_size"] == 8
    assert told["conversion"]["proposals"] == [1, 2]
    where = "spare_row" if spare_rows else "grown"
    token = {"id": 64 - spare_rows, "text": "<mask>", "source": where, "init": "random", "seed": 7}
    assert told["conversion"]["mask_token"] == token
    assert told["rows"] == ({EMBEDDING: [60, 60]} if spare_rows else {EMBEDDING: [64, 127], HEAD: [64, 127]})


def test_the_provenance_of_the_source_is_not_taken_for_the_conversions(
    tiny_checkpoint: Checkpoint, tmp_path: Path
) -> None:
    source = tiny_checkpoint("zaya")
    (source / "provenance.json").write_text('{"base_model": "somebody\'s"}')
    convert_init(resolve(source), tmp_path / "out")
    assert json_of(tmp_path / "out" / "provenance.json")["base_model"] == "zaya"


def test_memory_stays_flat_whatever_the_size(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, rows, width = tiny_checkpoint("mixtral"), 65_536, 2048
    edit(source / "config.json", vocab_size=rows, hidden_size=width)
    large = [
        TensorInfo(EMBEDDING, "BF16", (rows, width), "", 0, 0),
        TensorInfo("more", "BF16", (rows, width), "", 0, 0),
    ]
    (source / "model.safetensors").unlink()
    write_shard(source / "model.safetensors", large, {}, lambda _: [bytes(2**20)] * (rows * width * 2 // 2**20))
    code = (
        "import resource, sys; from pathlib import Path; from zconvert.checkpoint.graft import convert_init; "
        "from zconvert.checkpoint.source import resolve; peak = lambda: resource.getrusage(resource.RUSAGE_SELF)."
        "ru_maxrss; before = peak(); convert_init(resolve(sys.argv[1]), Path(sys.argv[2])); print(peak() - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) * 1024 < 60 * 10**6 < rows * width * 2  # the embedding alone has 268 MB


run = partial(run_command, "convert-init")


def test_the_command_converts_with_its_options(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    source, out = tiny_checkpoint("zaya", mask_token=True), tmp_path / "out"
    result = run(source, "--out", out, "--block-size", 4, "--mask-token", "60", "--proposals", "1,3")
    assert result.exit_code == 0, result.output
    section = json_of(out / "config.json")["tidar"]
    assert (section["block_size"], section["mask_token_id"], section["proposals"]) == (4, 60, [1, 3])
    assert f"Wrote {out}" in result.stdout


def test_the_command_takes_a_recipe_with_the_same_keys(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    recipe = tmp_path / "convert-init.yaml"
    recipe.write_text(
        f"base_model: {tiny_checkpoint('zaya')}\noutput_dir: {tmp_path / 'out'}\n"
        "diffusion:\n  block_size: 8\n  mask_init: zero\n  proposals: [1, 2]\n"
    )
    assert run(recipe).exit_code == 0
    section = json_of(tmp_path / "out" / "config.json")["tidar"]
    assert (section["block_size"], section["proposals"]) == (8, [1, 2])
    assert not tensors(tmp_path / "out")[EMBEDDING][60].any()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere", "--out", "x"], "no such folder"),
        (["recipe.yaml"], "no recipe"),
        (["here"], "missing, say which folder to write"),
        (["recipe.yaml", "--block-size", "4"], "beside a recipe"),
        (["here", "--out", "x", "--proposals", "1;2"], "no list of accepted counts"),
        (["here", "--out", "x", "--block-size", "1"], "'--block-size'"),
    ],
)
def test_a_mistake_gives_one_message(arguments: list[str], words: str) -> None:
    result = run(*arguments)
    assert result.exit_code == (1 if words in ("no such folder", "no recipe") else 2)
    assert result.stdout == ""
    assert words in " ".join(result.stderr.replace("│", "").split())
    assert "Traceback" not in result.stderr
