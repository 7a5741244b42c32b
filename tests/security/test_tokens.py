"""The Hub's token is shown nowhere: in no error, traceback, log or file."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.checkpoint.loopback_hub import LoopbackHub
from tests.checkpoint.pushed import TOKEN
from tests.checkpoint.test_push import hub
from tests.security.commands import run

__all__ = ["hub"]


@pytest.fixture(autouse=True)
def _debugging(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("ZCONVERT_DEBUG", "1")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    caplog.set_level(logging.DEBUG)


@pytest.fixture
def served(hub: LoopbackHub, tiny_checkpoint: Callable[..., Path]) -> LoopbackHub:
    hub.repositories |= {"org/model": tiny_checkpoint("mixtral"), "org/gated": tiny_checkpoint("mixtral")}
    hub.gated.add("org/gated")
    return hub


@pytest.mark.parametrize("passed", [[], ["--token", TOKEN]])
@pytest.mark.parametrize(
    "arguments",
    [
        ["inspect", "org/model"],
        ["inspect", "org/nothing"],
        ["inspect", "org/model", "--revision", "nowhere"],
        ["inspect", "org/gated"],
        ["generate", "org/gated", "a"],
        ["convert-init", "org/gated", "--out", "never"],
        ["plan", "org/nothing"],
        ["export", "org/nothing", "--out", "never"],
    ],
)
def test_no_command_tells_the_token(
    served: LoopbackHub, caplog: pytest.LogCaptureFixture, arguments: list[str], passed: list[str]
) -> None:
    result = run(*arguments, *passed)
    assert (result.exit_code == 0) == (arguments == ["inspect", "org/model"]), result.output
    assert TOKEN not in result.output
    assert TOKEN not in caplog.text


def test_no_file_has_the_token_from_conversion_to_push(
    served: LoopbackHub, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for arguments in (
        ["convert-init", "org/model", "--out", tmp_path / "converted", "--block-size", "4"],
        ["export", tmp_path / "converted", "--out", tmp_path / "exported", "--no-verify"],
        ["export", tmp_path / "converted", "--hub", "me/model", "--no-verify"],
    ):
        result = run(*arguments, "--token", TOKEN)
        assert result.exit_code == 0, result.output
        assert TOKEN not in result.output
    assert TOKEN not in caplog.text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"provenance.json", "README.md", "config.json"} <= {path.name for path in written}
    assert [path for path in written if TOKEN.encode() in path.read_bytes()] == []
