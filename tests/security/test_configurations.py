"""Whatever single value of a `config.json` is wrong, `generate` writes a text or says what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import make_checkpoint
from tests.security.commands import edit_json, refused, run
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.measured import measured_section
from zconvert.checkpoint.source import resolve
from zconvert.errors import UserError
from zconvert.planning.acceptance import find_curve

ODD = (-1, 0, 1, 3, 7, 10**9, 10**30, "a", None, 0.5, True, [], {})


@pytest.mark.slow
@pytest.mark.parametrize("family", ["zaya", "qwen3_moe", "mixtral", "gpt_oss"])
def test_no_value_ends_in_an_unexpected_error(family: str, tmp_path: Path) -> None:
    convert_init(resolve(make_checkpoint(tmp_path / "source", family)), tmp_path / "converted", block_size=4)
    path = tmp_path / "converted" / "config.json"
    config = json.loads(path.read_text())
    written = 0
    for place, value in list(_values(config)):
        for odd in ODD:
            if (type(odd), odd) == (type(value), value):
                continue
            changed = copy.deepcopy(config)
            holder = changed
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = odd
            path.write_text(json.dumps(changed))
            result = run("generate", tmp_path / "converted", "tall", "--max-new-tokens", 3)
            assert result.exit_code in (0, 1), (place, odd, result.output)
            assert "Unexpected error" not in result.output, (place, odd, result.output)
            written += result.exit_code == 0
    assert written > 50  # many values are only remarks


@pytest.mark.parametrize(
    ("command", "members"),
    [
        ("inspect", {"model_type": []}),
        ("inspect", {"model_type": {}}),
        *(("inspect", {"rope_parameters": {"hybrid": {"rope_theta": odd}}}) for odd in (10**400, 1e308, 1e999)),
        *(("inspect", {key: 10**400}) for key in ("router_aux_loss_coef", "routed_scaling_factor")),
        ("plan", {"head_dim": 0}),
        ("plan", {"num_attention_heads": -1}),
        ("plan", {"num_attention_heads": 10**30}),
        ("plan", {"num_experts_per_tok": 10**9}),
        ("plan", {"router_hidden_size": "a"}),
        ("plan", {"v_head_dim": 10**400}),
    ],
)
def test_what_no_model_has_ends_neither_inspect_nor_plan(command: str, members: dict[str, Any], tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "source", "zaya")
    edit_json(folder / "config.json", **members)
    result = run(command, folder)
    assert result.exit_code in (0, 1), result.output
    assert "Unexpected error" not in result.output


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("odd")
    convert_init(resolve(make_checkpoint(folder / "source", "mixtral")), folder / "converted", block_size=4)
    return folder / "converted"


@pytest.mark.parametrize(
    ("name", "members"),
    [
        *(("config.json", {"tidar": {"stages": odd}}) for odd in (-1, "a", [[]], ["a", 1], float("nan"))),
        *(("config.json", {"tidar": {key: odd}}) for key in ("base_model", "base_revision") for odd in (1e999, [], 7)),
        *(("config.json", {"tidar": {"block_size": odd}}) for odd in (10**9, True, 1.5)),
        *(("config.json", {"tidar": {"proposals": odd}}) for odd in ([10**9], list(range(10**5)), ["a"], 7)),
        *(("generation_config.json", {"eos_token_id": odd}) for odd in (10**30, 1e308, "a", {}, ["a", 1])),
        *(("tokenizer_config.json", {"model_max_length": odd}) for odd in ("a", [], {})),
    ],
)
def test_what_says_how_a_text_is_made_is_checked_before_one_is(converted: Path, name: str, members: Any) -> None:
    before = (converted / name).read_text()
    if "tidar" in members:
        members = {"tidar": {**json.loads(before)["tidar"], **members["tidar"]}}
    edit_json(converted / name, **members)
    try:
        refused("generate", converted, "tall", "--max-new-tokens", 3)
    finally:
        (converted / name).write_text(before)


@pytest.mark.parametrize(
    "line",
    [
        *("[" * 100_000, "7", "[]", "{}", '{"slot_accuracy": 7}', '{"slot_accuracy": [1]}'),
        *('{"slot_accuracy": [1, "a"]}', '{"slot_accuracy": [1, NaN]}', '{"slot_accuracy": [1, 1e999]}'),
        *('{"slot_accuracy": [1, -1]}', json.dumps({"slot_accuracy": [1] * 100_000})),
    ],
)
def test_a_runs_figures_that_no_run_logs_are_refused(line: str, tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text(line + "\n")
    with pytest.raises(UserError, match=r"slot_accuracy|no acceptance curve"):
        find_curve(str(tmp_path), 4)


@pytest.mark.parametrize("odd", [10**400, 1e400, float("nan"), "a|b\n# evil", [], {}, None, True])
def test_a_card_tells_of_figures_only(odd: Any) -> None:
    speed = {"name": odd, "tokens_per_second": 3.0, "tokens_per_forward": odd, "speedup": odd, "batch_size": odd}
    column = {"pass@1": 0.5, "pass@4": odd, "pass@" + "9" * 5000: 0.5, "interval": {"pass@1": [odd, odd]}}
    text = measured_section(
        {"results": [speed], "device": odd}, {"n": odd, "tasks": {"gsm8k": {"columns": {"ar": column}}}}
    )
    assert "50.0%" in text
    assert "\n# evil" not in text


def _values(section: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of all that transformers reads."""
    for key, value in section.items():
        if key != "tidar":
            yield (*place, key), value
        if isinstance(value, dict) and key != "tidar":
            yield from _values(value, (*place, key))
