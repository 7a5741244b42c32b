"""A folder from a stranger: what is in it is read, and nothing else; what is no file or far too large is refused."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.security.commands import edit_json, refused, run
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import INDEX_FILE, SINGLE_FILE, read_header
from zconvert.checkpoint.load import load_model, load_tokenizer
from zconvert.checkpoint.small_files import MOST_BYTES
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError

Checkpoint = Callable[..., Path]
SECRET = "the-contents-of-a-private-file"
JSON_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")

pytestmark = pytest.mark.timeout(120)  # what is refused here would else be read forever


@pytest.fixture
def folder(tiny_checkpoint: Checkpoint) -> Path:
    return tiny_checkpoint("mixtral")


@pytest.fixture
def converted(folder: Path, tmp_path: Path) -> Path:
    convert_init(resolve(folder), tmp_path / "converted", block_size=4)
    return tmp_path / "converted"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "secret.txt").write_text(SECRET)
    return tmp_path / "private" / "secret.txt"


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "..", "", "a/b", "a\\b", "a\0b", 7, None])
def test_an_index_leads_nowhere_but_into_its_folder(folder: Path, name: Any) -> None:
    (folder / SINGLE_FILE).rename(folder.parent / SINGLE_FILE)
    (folder / INDEX_FILE).write_text(json.dumps({"weight_map": {"model.embed_tokens.weight": name}}))
    assert f"{INDEX_FILE}: tensor model.embed_tokens.weight is said to be in a file outside" in refused(
        "inspect", folder
    )


@pytest.mark.parametrize("name", ["README.md", "LICENSE", "notes.txt", "chat_template.jinja", "tokenizer_config.json"])
@pytest.mark.parametrize("relative", [False, True])
def test_a_link_out_of_the_folder_is_neither_read_nor_copied(
    folder: Path, tmp_path: Path, secret: Path, name: str, relative: bool
) -> None:
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(os.path.relpath(secret, folder) if relative else secret)
    said = refused("convert-init", folder, "--out", tmp_path / "out")
    assert f"{name} is a link that leads out of the checkpoint's folder" in said
    assert SECRET not in said
    assert not (tmp_path / "out").exists()


def test_a_folder_within_that_is_a_link_is_not_copied_either(folder: Path, tmp_path: Path, secret: Path) -> None:
    (folder / "additional_chat_templates").symlink_to(secret.parent)
    assert "leads out of the checkpoint's folder" in refused("convert-init", folder, "--out", tmp_path / "out")


def test_no_command_reads_a_configuration_through_a_link_out_of_the_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "config.json").rename(tmp_path / "config.json")
    (folder / "config.json").symlink_to(tmp_path / "config.json")
    for command in (["inspect", folder], ["plan", folder], ["generate", folder, "a"]):
        assert "leads out of the checkpoint's folder" in refused(*command)


def test_an_export_publishes_nothing_from_elsewhere(converted: Path, tmp_path: Path, secret: Path) -> None:
    (converted / "LICENSE").symlink_to(secret)
    assert "leads out of the checkpoint's folder" in refused("export", converted, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_links_within_the_folder_and_into_the_hubs_cache_are_followed(folder: Path, tmp_path: Path) -> None:
    (folder / "LICENSE").symlink_to("license.txt")
    (folder / "license.txt").write_text("as you like")
    blobs, snapshot = tmp_path / "models--org--name" / "blobs", tmp_path / "models--org--name" / "snapshots" / "c0"
    snapshot.mkdir(parents=True)
    shutil.move(folder, blobs)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(os.path.relpath(path, snapshot))
    convert_init(resolve(snapshot), tmp_path / "out", block_size=4)
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"


def a_pipe(path: Path) -> None:
    os.mkfifo(path)


def a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def a_folder(path: Path) -> None:
    path.mkdir()


@pytest.mark.parametrize("make", [a_pipe, a_device, a_folder])
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", SINGLE_FILE, INDEX_FILE])
def test_pipes_devices_and_folders_are_not_read(
    folder: Path, tmp_path: Path, make: Callable[[Path], None], name: str
) -> None:
    if name == INDEX_FILE:
        (folder / SINGLE_FILE).unlink()
    (folder / name).unlink(missing_ok=True)
    make(folder / name)
    assert name in refused("convert-init", folder, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [*JSON_FILES, INDEX_FILE])
def test_a_file_that_is_far_too_large_is_refused_before_it_is_read(folder: Path, tmp_path: Path, name: str) -> None:
    if name == INDEX_FILE:
        (folder / SINGLE_FILE).unlink()
    with (folder / name).open("ab") as file:
        file.truncate(5 * MOST_BYTES)  # sparse: it takes no room on the disk
    assert f"{name} is larger than such a file can be" in refused("convert-init", folder, "--out", tmp_path / "out")


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, '{"vocab_size": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", [*JSON_FILES, INDEX_FILE])
def test_json_that_is_too_deep_or_has_too_many_digits_is_refused(
    folder: Path, tmp_path: Path, name: str, text: str
) -> None:
    if name == INDEX_FILE:
        (folder / SINGLE_FILE).unlink()
    (folder / name).write_text(text)
    assert name in refused("convert-init", folder, "--out", tmp_path / "out")


def write(path: Path, header: bytes, *, length: int | None = None, data: int = 0) -> Path:
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header)
    with path.open("ab") as file:
        file.truncate(file.tell() + data)
    return path


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 10])
def test_a_header_cannot_ask_for_more_memory_than_its_file_has(tmp_path: Path, length: int) -> None:
    with pytest.raises(UserError, match="longer than can be"):
        read_header(write(tmp_path / "a.safetensors", b"{}", length=length))


@pytest.mark.parametrize(
    ("shape", "offsets"),
    [
        ([2**32, 2**32], [0, 0]),  # 2^64 items, which are 0 where numbers wrap around
        ([2**63, 2], [0, 0]),
        ([2**61 + 1, 8], [0, 32]),
        ([0, 2**63], [0, 0]),
        ([1] * 100_000, [0, 4]),
        ([2**63 - 1] * 300_000, [0, 4]),  # their product alone would take minutes
        ([1], [2**64, 2**64 + 4]),
        ([1], [-4, 0]),
    ],
)
def test_sizes_and_places_do_not_wrap_around(tmp_path: Path, shape: list[int], offsets: list[int]) -> None:
    header = json.dumps({"a": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    with pytest.raises(UserError, match=r"tensor a|truncated"):
        read_header(write(tmp_path / "a.safetensors", header, data=32))


def test_a_tensors_name_is_a_name_whatever_it_says(folder: Path) -> None:
    strange = ["../../x", "/etc/passwd", "\x1b[2J", "[red]", "a\0b", "model.layers." + "9" * 5000 + ".a"]
    entries = {
        name: {"dtype": "F32", "shape": [], "data_offsets": [4 * n, 4 * n + 4]} for n, name in enumerate(strange)
    }
    write(folder / SINGLE_FILE, json.dumps(entries).encode(), data=4 * len(strange))
    result = run("inspect", folder)
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output


@pytest.mark.parametrize(
    ("members", "said"),
    [
        ({"transformers_weights": "other.bin"}, "transformers_weights: 'other.bin'"),
        ({"attn_implementation": "somebody/kernel"}, "attn_implementation: 'somebody/kernel'"),
        ({"_attn_implementation": "somebody/kernel@main"}, "_attn_implementation: 'somebody/kernel@main'"),
        ({"num_hidden_layers": 9_000}, "num_hidden_layers: 9000"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers: 1000000000"),
        ({"vision_config": {"depth": 10**9}}, "depth: 1000000000"),
    ],
)
def test_a_configuration_that_asks_for_what_is_not_in_the_folder_is_not_loaded(
    converted: Path, members: dict[str, Any], said: str
) -> None:
    edit_json(converted / "config.json", **members)
    assert said in refused("generate", converted, "a")


@pytest.mark.parametrize(
    ("members", "said"),
    [
        # No weight has these sizes: only a forward tells.
        ({"num_experts_per_tok": 10**9}, "cannot be run found: RuntimeError: selected index k out of range"),
        ({"num_experts_per_tok": 10**30}, "cannot be run found: ValueError"),
        ({"num_experts_per_tok": -1}, "cannot be run"),
        ({"num_attention_heads": 3}, "cannot be loaded"),
        ({"num_key_value_heads": 3}, "cannot be loaded"),
        ({"hidden_size": -32}, "cannot be loaded"),
        ({"intermediate_size": 31}, "cannot be loaded"),
        ({"vocab_size": 65}, "cannot be loaded"),
    ],
)
def test_sizes_that_contradict_each_other_are_a_users_error(
    converted: Path, members: dict[str, Any], said: str
) -> None:
    edit_json(converted / "config.json", **members)
    assert said in refused("generate", converted, "a")


def test_an_adapter_does_not_lead_to_the_model_that_it_names(converted: Path, tmp_path: Path) -> None:
    edit_json(converted / "adapter_config.json", base_model_name_or_path=str(tmp_path))
    assert "adapter_config.json beside a model's weights" in refused("generate", converted, "a")


def test_a_checkpoints_own_code_is_never_run(converted: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("modeling.py", "tokenization.py", "custom_generate/generate.py"):
        (converted / name).parent.mkdir(exist_ok=True)
        (converted / name).write_text(code)
    edit_json(
        converted / "config.json",
        auto_map={"AutoConfig": "modeling.C", "AutoModelForCausalLM": "modeling.M"},
    )
    edit_json(converted / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokenization.T", "tokenization.T"]})
    for command in (["generate", converted, "tall", "--max-new-tokens", "3"], ["export", converted, "--out", out]):
        result = run(*command)
        assert result.exit_code == 0, result.output
        assert not (tmp_path / "ran").exists()
    # Nor by those who trust the export's own.
    AutoTokenizer.from_pretrained(out, trust_remote_code=True)
    AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert not (tmp_path / "ran").exists()


def test_nothing_is_unpickled_from_inspecting_to_generating(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, never)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04cos\nsystem\n")
    assert run("inspect", folder).exit_code == 0
    convert_init(resolve(folder), tmp_path / "out", block_size=4)
    load_model(resolve(tmp_path / "out"), device="cpu")
    assert not (tmp_path / "out" / "pytorch_model.bin").exists()


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.pth", "model.ckpt"])
def test_weights_that_are_only_pickled_are_refused_by_name(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / SINGLE_FILE).unlink()
    (folder / name).write_bytes(b"\x80\x04cos\nsystem\n")
    said = refused("convert-init", folder, "--out", tmp_path / "out")
    assert "pickled weights only, which could run any code" in said
    assert name in said


@pytest.mark.parametrize(
    ("part", "step"),
    [
        ("normalizer", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}),
        ("normalizer", {"type": "Replace", "pattern": {"Regex": "a*"}, "content": "a"}),
        ("decoder", {"type": "Replace", "pattern": {"String": "a"}, "content": "aa"}),
    ],
)
def test_a_tokenizer_that_makes_a_word_into_a_terabyte_is_refused(
    folder: Path, converted: Path, tmp_path: Path, part: str, step: dict[str, Any]
) -> None:
    bomb = {"type": "Sequence", f"{part}s": [step] * 40}
    for place in (folder, converted):
        edit_json(place / "tokenizer.json", **{part: bomb})
    said = f"the {part} of {folder / 'tokenizer.json'} makes texts longer and longer"
    assert said in refused("convert-init", folder, "--out", tmp_path / "out")
    assert "makes texts longer and longer" in refused("generate", converted, "a")
    with pytest.raises(UserError, match="longer and longer"):
        load_tokenizer(resolve(converted))


@pytest.mark.parametrize("name", ["../tokenizer.5.0.0.json", "/dev/tokenizer.5.0.0.json", "tokenizer.5.0.0.json"])
def test_no_other_tokenizer_is_loaded_than_the_one_that_is_looked_at(
    converted: Path, tmp_path: Path, name: str
) -> None:
    shutil.copy(converted / "tokenizer.json", tmp_path / "tokenizer.5.0.0.json")
    edit_json(converted / "tokenizer_config.json", fast_tokenizer_files=[name])
    assert "has another file than tokenizer.json loaded" in refused("generate", converted, "a")
    with pytest.raises(UserError, match="another file than"):
        load_tokenizer(resolve(converted))
    edit_json(converted / "tokenizer_config.json", fast_tokenizer_files=["tokenizer.json"])
    load_tokenizer(resolve(converted))


def test_a_tokenizers_own_padding_is_not_done(converted: Path) -> None:
    padding = {"strategy": {"Fixed": 10**9}, "direction": "Right", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>"}
    edit_json(converted / "tokenizer.json", padding=padding)
    assert len(load_tokenizer(resolve(converted))("tall").input_ids) < 10


def test_a_card_of_nested_aliases_is_not_inherited(folder: Path, tmp_path: Path) -> None:
    layers = "\n".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 30))
    (folder / "README.md").write_text(f"---\na0: &a0 lol\n{layers}\nlicense: *a29\n---\n")
    convert_init(resolve(folder), tmp_path / "converted", block_size=4)
    assert run("export", tmp_path / "converted", "--out", tmp_path / "out", "--no-verify").exit_code == 0
    assert "lol" not in (tmp_path / "out" / "README.md").read_text()


def test_what_a_card_tells_to_type_is_quoted(folder: Path, tmp_path: Path) -> None:
    convert_init(resolve(folder), tmp_path / "converted", block_size=4)
    history = [{"stage": "midtrain", "recipe": {"output_dir": "x; touch /tmp/owned"}}]
    edit_json(tmp_path / "converted" / "provenance.json", history=history)
    assert run("export", tmp_path / "converted", "--out", tmp_path / "out", "--no-verify").exit_code == 0
    assert "zconvert export 'x; touch /tmp/owned' --out DIR" in (tmp_path / "out" / "README.md").read_text()
