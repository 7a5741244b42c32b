"""Whatever single value of a `config.json` is wrong, `generate` writes a text or says what is wrong."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import make_checkpoint
from tests.security.commands import run
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve

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


def _values(section: dict[str, Any], place: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(keys, value) of all that transformers reads."""
    for key, value in section.items():
        if key != "tidar":
            yield (*place, key), value
        if isinstance(value, dict) and key != "tidar":
            yield from _values(value, (*place, key))
