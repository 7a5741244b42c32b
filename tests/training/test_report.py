"""`zconvert report`: curves of whatever a run has measured, in one page that needs no other file."""

from __future__ import annotations

import base64
import re
import sys
from pathlib import Path

import pytest

from tests.commands import run_command
from tests.training.runs import make_run
from tests.training.test_context import extension_run
from tests.training.test_evaluating import with_evaluation
from zconvert.errors import UserError
from zconvert.recipe import ExtendContextRecipe, MidtrainRecipe
from zconvert.training import stages
from zconvert.training.report import Run, write_report

PNG = b"\x89PNG\r\n\x1a\n"


def images(page: Path) -> dict[str, bytes]:
    found = re.findall(r'alt="(\w+)" src="data:image/png;base64,([^"]+)"', page.read_text())
    return {name: base64.b64decode(data) for name, data in found}


def test_the_page_holds_every_curve_and_needs_no_other_file(tmp_path: Path) -> None:
    settings = with_evaluation(tmp_path)
    stages.train(MidtrainRecipe(**settings), lambda _: None)
    result = run_command("report", settings["output_dir"])
    assert result.exit_code == 0, result.output
    page = tmp_path / "run" / "report" / "report.html"
    assert result.stdout.replace("\n", "") == str(page)
    found = images(page)
    assert list(found) == ["losses", "accepted", "slots", "experts", "routing", "optimizer"]
    assert all(image.startswith(PNG) for image in found.values())
    assert {path.stem: path.read_bytes() for path in page.parent.glob("*.png")} == found
    text = page.read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', text)
    assert "held out: tokens_per_forward" in text
    assert "micro_batch_size: 2" in text


def test_a_longer_context_is_drawn_by_position(tmp_path: Path) -> None:
    settings = extension_run(tmp_path, "mixtral")
    stages.train(ExtendContextRecipe(**settings), lambda _: None)
    assert "context" in images(write_report(tmp_path / "run", tmp_path / "page"))
    assert not (tmp_path / "run" / "report").exists()


def test_a_run_that_still_writes_is_read_as_far_as_it_got(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    run = Run.read(tmp_path)
    assert run.series("loss") == ([1], [2.0])
    assert run.series("moe", "drift") == ([], [])


@pytest.mark.parametrize("content", [None, ""])
def test_a_folder_without_metrics_is_told(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(UserError, match=r"not the folder of a training run|no metrics yet"):
        write_report(tmp_path)


def test_a_missing_matplotlib_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = make_run(tmp_path, max_steps=1, warmup_steps=0)
    stages.train(MidtrainRecipe(**settings), lambda _: None)
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match="needs matplotlib"):
        write_report(tmp_path / "run")
    assert not (tmp_path / "run" / "report").exists()
