"""`export --check`: what is said of an engine is what the table has, for this folder."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command
from zconvert.checkpoint.engines import ENGINES, check
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.source import resolve
from zconvert.cli.export import EngineName
from zconvert.errors import UserError

Checkpoint = Callable[..., Path]


def verdicts(folder: Path) -> dict[str, Any]:
    return {name: check(resolve(folder), engine) for name, engine in ENGINES.items()}


def edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.fixture
def converted(tiny_checkpoint: Checkpoint, tmp_path: Path) -> Callable[[str], Path]:
    def make(model_type: str) -> Path:
        convert_init(resolve(tiny_checkpoint(model_type)), tmp_path / model_type, block_size=4)
        return tmp_path / model_type

    return make


def test_an_architecture_that_an_engine_lists_loads_there_and_tidar_decoding_needs_more(
    converted: Callable[[str], Path],
) -> None:
    folder = converted("mixtral")
    for name, verdict in verdicts(folder).items():
        assert verdict.loads == "yes"
        assert str(folder) in str(verdict.command)
        assert "MixtralForCausalLM" in verdict.why
        assert ("plugin" in verdict.tidar) == (name in ("vllm", "sglang"))


def test_an_architecture_that_no_list_names_is_not_known_to_load(converted: Callable[[str], Path]) -> None:
    folder = converted("mixtral")
    edit_config(folder, architectures=["NobodysForCausalLM"])
    for name in ("vllm", "sglang", "llama.cpp"):
        verdict = verdicts(folder)[name]
        assert (verdict.loads, verdict.command) == ("not known", None)
        assert "does not name NobodysForCausalLM" in verdict.why


def test_sglang_loads_zaya_only_by_the_older_names_of_its_weights(converted: Callable[[str], Path]) -> None:
    folder = converted("zaya")
    assert not [name for name in read_headers(folder).tensors if "local_experts" in name]
    assert verdicts(folder)["sglang"].loads == "no"
    assert verdicts(folder)["vllm"].loads == "not known"


def test_vllm_asks_for_as_many_rows_as_the_vocabulary_has_and_for_no_canvas(
    converted: Callable[[str], Path],
) -> None:
    folder = converted("qwen3_moe")
    assert verdicts(folder)["vllm"].loads == "yes"
    edit_config(folder, canvas_length=8)
    assert "canvas_length" in verdicts(folder)["vllm"].why
    config = json.loads((folder / "config.json").read_text())
    del config["canvas_length"]
    (folder / "config.json").write_text(json.dumps({**config, "vocab_size": 63}))
    verdict = verdicts(folder)["vllm"]
    assert (verdict.loads, verdict.command) == ("no", None)
    assert "64 rows" in verdict.why


def test_what_is_not_converted_is_not_checked(tiny_checkpoint: Checkpoint) -> None:
    with pytest.raises(UserError, match="is not converted"):
        verdicts(tiny_checkpoint("mixtral"))


def test_every_row_of_the_table_has_its_version_and_its_option() -> None:
    assert [str(name) for name in EngineName] == ["all", *ENGINES]
    assert all(engine.version and engine.tidar and "{path}" in engine.command for engine in ENGINES.values())


def test_the_command_prints_a_verdict_for_each_engine(converted: Callable[[str], Path]) -> None:
    folder = converted("mixtral")
    ran = run_command("export", folder, "--check", "all")
    assert ran.exit_code == 0, ran.output
    assert all(f"{name} {engine.version}: loads" in ran.stdout for name, engine in ENGINES.items())
    (one,) = json.loads(run_command("export", folder, "--check", "sglang", "--json").stdout)
    assert (one["engine"], one["loads"]) == ("sglang", "yes")
