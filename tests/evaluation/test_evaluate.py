"""`zconvert evaluate`: the same prompts and seeds for every column, resumable, and numbers are what they say."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from tests.checkpoint.tiny import make_checkpoint
from tests.evaluation.rows import HUMANEVAL, write_rows
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve
from zconvert.cli.main import app
from zconvert.errors import UserError
from zconvert.evaluation import sampling
from zconvert.evaluation.evaluate import Plan
from zconvert.evaluation.report import write_report
from zconvert.evaluation.statistics import pass_at_k
from zconvert.tidar.settings import GatedParts

TASK = """
description: goes on from a few words
dataset:
  path: ROWS
prompt: "{q}"
stop: ["zq"]
max_new_tokens: 12
answer:
  take: regex
  pattern: '([a-e])'
check:
  method: exact
  target: "{a}"
"""
ROWS = [{"q": "ten tall", "a": "a"}, {"q": "seven men", "a": "e"}, {"q": "the old stone", "a": "d"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`source`, `init` (converted), `gated`, and a task."""
    folder = tmp_path_factory.mktemp("made")
    source = resolve(make_checkpoint(folder / "source", "zaya", dtype="float32"))
    convert_init(source, folder / "init", block_size=4)
    convert_init(source, folder / "gated", block_size=4, gated=GatedParts(rank=2, mlp_width=8))
    write_task(folder / "words.yaml", ROWS)
    return folder


def write_task(path: Path, rows: list[dict[str, Any]], text: str = TASK) -> Path:
    data = path.with_suffix(".jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    path.write_text(text.replace("ROWS", str(data)))
    return path


def run(folder: Path, out: Path, *options: object, checkpoint: str = "init", tasks: str | None = None) -> Result:
    task = tasks or str(folder / "words.yaml")
    words = ["evaluate", folder / checkpoint, "--tasks", task, "--out", out, "--device", "cpu", *options]
    return CliRunner().invoke(app, [str(word) for word in words])


def evaluated(folder: Path, out: Path, *options: object, **others: Any) -> dict[str, Any]:
    result = run(folder, out, *options, "--json", **others)
    assert result.exit_code == 0, result.stderr
    document: dict[str, Any] = json.loads(result.stdout)
    assert document == json.loads((out / "results.json").read_text())
    return document


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def texts(out: Path, column: str, task: str = "words") -> dict[tuple[str, int], str]:
    return {(s["task_id"], s["sample"]): s["completion"] for s in lines(out / "samples" / task / f"{column}.jsonl")}


SAMPLERS = ("--samplers", "ar,lossless,mix:0.5")


@pytest.fixture(scope="module")
def done(folder: Path) -> tuple[Path, dict[str, Any]]:
    out = folder / "done"
    options = ("--baseline", folder / "source", *SAMPLERS, "--k", "1,2,4", "--batch-size", 3)
    return out, evaluated(folder, out, *options)


def test_every_column_has_its_numbers(done: tuple[Path, dict[str, Any]]) -> None:
    out, document = done
    columns = document["tasks"]["words"]["columns"]
    assert list(columns) == ["baseline", "ar", "lossless", "mix:0.5"]
    assert (document["reference"], document["n"], document["temperature"]) == ("baseline", 4, 0.8)
    for name, entry in columns.items():
        samples = lines(out / "samples" / "words" / f"{name.replace(':', '-')}.jsonl")
        assert entry["samples"] == len(samples) == 12
        tokens, seconds = sum(s["tokens"] for s in samples), sum(s["seconds"] for s in samples)
        assert entry["tokens_per_second"] == pytest.approx(tokens / seconds)
        assert entry["tokens_per_forward"] == pytest.approx((tokens - 12) / sum(s["forwards"] for s in samples))
        assert set(entry["interval"]) == {"pass@1", "pass@2", "pass@4"}
        low, high = entry["interval"]["pass@2"]
        assert low <= entry["pass@2"] <= high
    assert all(columns[name]["tokens_per_forward"] == 1.0 for name in ("baseline", "ar"))
    assert columns["lossless"]["verdict"] == columns["lossless"]["difference"]["baseline"]["pass@1"]["verdict"]
    assert list(columns["lossless"]["difference"]) == ["baseline", "ar"]
    assert (columns["baseline"]["difference"], columns["baseline"]["verdict"]) == ({}, None)


def test_pass_at_k_is_of_the_samples_that_were_scored_as_right(done: tuple[Path, dict[str, Any]]) -> None:
    out, document = done
    scores = lines(out / "scores" / "words" / "ar.jsonl")
    targets = {f"words/{i}": row["a"] for i, row in enumerate(ROWS)}
    found = texts(out, "ar")
    for score in scores:
        letters = re.findall("[a-e]", found[score["task_id"], score["sample"]])
        assert score["answer"] == (letters[-1] if letters else None)
        assert score["right"] == (score["answer"] == targets[score["task_id"]])
    right = [sum(s["right"] for s in scores if s["task_id"] == key) for key in targets]
    expected = sum(pass_at_k(4, c, 2) for c in right) / 3
    assert document["tasks"]["words"]["columns"]["ar"]["pass@2"] == pytest.approx(expected)


def test_samples_are_in_the_shape_that_humaneval_s_scorers_read(done: tuple[Path, dict[str, Any]]) -> None:
    samples = lines(done[0] / "samples" / "words" / "lossless.jsonl")
    assert samples
    for sample in samples:
        assert sample["task_id"] in {"words/0", "words/1", "words/2"}
        assert isinstance(sample["completion"], str)


def test_right_after_conversion_ar_is_the_source_sample_by_sample(done: tuple[Path, dict[str, Any]]) -> None:
    assert texts(done[0], "ar") == texts(done[0], "baseline")


def test_greedy_lossless_text_is_ar_s_in_any_batch(folder: Path, tmp_path: Path) -> None:
    evaluated(folder, tmp_path / "one", "--batch-size", 1)
    evaluated(folder, tmp_path / "three", "--batch-size", 3)
    assert texts(tmp_path / "one", "ar") == texts(tmp_path / "three", "lossless") == texts(tmp_path / "one", "lossless")
    turns = evaluated(folder, tmp_path / "turns", "--mode", "two")
    assert texts(tmp_path / "turns", "lossless") == texts(tmp_path / "one", "ar")
    assert turns["two_forwards"]


def test_samples_depend_on_their_seed_alone(folder: Path, tmp_path: Path, done: tuple[Path, dict[str, Any]]) -> None:
    evaluated(folder, tmp_path / "few", "--n", 2, "--batch-size", 1, "--limit", 2, "--temperature", 0.8)
    few = texts(tmp_path / "few", "lossless")
    assert few == {key: text for key, text in texts(done[0], "lossless").items() if key in few}
    assert len(set(few.values())) == len(few) == 4
    evaluated(folder, tmp_path / "other", "--n", 2, "--limit", 2, "--seed", 1)
    assert texts(tmp_path / "other", "lossless") != few


def test_an_interrupted_run_goes_on_where_it_was(
    folder: Path, tmp_path: Path, done: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, written = tmp_path / "out", 0
    append: Callable[..., None] = sampling.append

    def interrupted(*arguments: Any) -> None:
        nonlocal written
        written += 1
        if written > 17:
            raise KeyboardInterrupt
        append(*arguments)

    options = ("--baseline", folder / "source", *SAMPLERS, "--k", "1,2,4", "--batch-size", 3)
    with monkeypatch.context() as patch:
        patch.setattr(sampling, "append", interrupted)
        assert run(folder, out, *options).exit_code == 130
    assert len(lines(out / "samples" / "words" / "ar.jsonl")) == 5
    with (out / "samples" / "words" / "ar.jsonl").open("a") as file:
        file.write('{"task_id": "words/2", "sam')  # cut short
    document = evaluated(folder, out, *options)
    for column in ("baseline", "ar", "lossless", "mix-0.5"):
        assert texts(out, column) == texts(done[0], column)
        assert len(lines(out / "samples" / "words" / f"{column}.jsonl")) == 12, "some were made twice"
    shares = ("pass@1", "interval", "tokens_per_forward", "mean_tokens", "cut_off", "difference")
    for column, entry in document["tasks"]["words"]["columns"].items():
        assert {key: entry[key] for key in shares} == {
            key: done[1]["tasks"]["words"]["columns"][column][key] for key in shares
        }


def test_columns_take_turns(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_BATCHES_IN_A_TURN", 2)
    written: list[str] = []
    append = sampling.append

    def told(file: Any, sample: dict[str, Any]) -> None:
        written.append(Path(file.name).stem)
        append(file, sample)

    monkeypatch.setattr(sampling, "append", told)
    evaluated(folder, tmp_path / "out", "--batch-size", 1)
    assert written == ["ar", "ar", "lossless", "lossless", "ar", "lossless"]


def test_more_samples_problems_and_samplers_are_added_to_what_is_there(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    evaluated(folder, out, "--limit", 2, "--n", 2, "--samplers", "ar")
    before = texts(out, "ar")
    document = evaluated(folder, out, "--n", 3, "--k", "1,3", "--samplers", "lossless,ar")
    assert list(document["tasks"]["words"]["columns"]) == ["lossless", "ar"]
    assert before.items() <= texts(out, "ar").items()
    assert len(texts(out, "ar")) == len(texts(out, "lossless")) == 9


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--temperature", "0.5"), "temperature was 0.8 and is 0.5"),
        (("--max-new-tokens", "5"), "has changed in max_new_tokens"),
        (("--seed", "3"), "seed was 0 and is 3"),
    ],
)
def test_other_settings_in_the_same_folder_are_refused(
    folder: Path, done: tuple[Path, dict[str, Any]], options: tuple[str, ...], said: str
) -> None:
    result = run(folder, done[0], "--baseline", folder / "source", "--k", "4", *options)
    assert result.exit_code == 1
    assert said in " ".join(result.stderr.split())


def test_another_baseline_is_refused_by_name(folder: Path, done: tuple[Path, dict[str, Any]]) -> None:
    result = run(folder, done[0], "--k", "4")
    assert (result.exit_code, "baseline was source and is null" in result.stderr) == (1, True)


def test_a_checkpoint_that_was_trained_on_since_is_refused(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder / "init", tmp_path / "init")
    evaluated(folder, tmp_path / "out", "--limit", 1, checkpoint=str(tmp_path / "init"))
    (tmp_path / "init" / "tuning.json").write_text("{}")  # what decoding leaves there changes no weight
    evaluated(folder, tmp_path / "out", "--limit", 1, checkpoint=str(tmp_path / "init"))
    os.utime(tmp_path / "init" / "model.safetensors", (1, 1))
    result = run(folder, tmp_path / "out", "--limit", 1, checkpoint=str(tmp_path / "init"))
    assert (result.exit_code, "checkpoint init has changed" in result.stderr) == (1, True)


def test_rows_that_changed_under_samples_are_refused(folder: Path, tmp_path: Path) -> None:
    task = str(write_task(tmp_path / "words.yaml", ROWS[:1]))
    evaluated(folder, tmp_path / "out", tasks=task)
    write_task(tmp_path / "words.yaml", [{"q": "ten men", "a": "a"}])
    result = run(folder, tmp_path / "out", tasks=task)
    assert (result.exit_code, "was asked otherwise" in " ".join(result.stderr.split())) == (1, True)


def test_an_answer_ends_at_a_stop_text_in_every_column(folder: Path, tmp_path: Path) -> None:
    task = str(write_task(tmp_path / "words.yaml", ROWS, TASK.replace('["zq"]', "[t, e]")))
    evaluated(folder, tmp_path / "out", "--n", 3, "--max-new-tokens", 40, tasks=task)
    for column in ("ar", "lossless"):
        samples = lines(tmp_path / "out" / "samples" / "words" / f"{column}.jsonl")
        assert {"stop"} <= {sample["finish"] for sample in samples} <= {"stop", "eos", "length"}
        assert not any(stop in sample["completion"] for sample in samples for stop in "te")


def test_scoring_is_repeated_by_the_task_as_it_is_now(folder: Path, tmp_path: Path) -> None:
    task = write_task(tmp_path / "words.yaml", ROWS)
    out = tmp_path / "out"
    evaluated(folder, out, tasks=str(task))
    samples = (out / "samples" / "words" / "ar.jsonl").read_bytes()
    everything = TASK.replace("  take: regex\n  pattern: '([a-e])'", "  take: text").replace("exact", "set")
    write_task(task, [{**row, "a": texts(out, "ar")[f"words/{i}", 0]} for i, row in enumerate(ROWS)], everything)
    scored = CliRunner().invoke(app, ["score", str(out), "--json"])
    assert scored.exit_code == 0, scored.stderr
    assert json.loads(scored.stdout)["tasks"]["words"]["columns"]["ar"]["pass@1"] == 1.0
    assert (out / "samples" / "words" / "ar.jsonl").read_bytes() == samples


def test_in_gated_mode_ar_is_the_source_and_what_all_is_held_against(folder: Path, tmp_path: Path) -> None:
    options = ("--baseline", folder / "source", "--dtype", "float32")
    document = evaluated(folder, tmp_path / "both", *options, checkpoint="gated")
    assert (
        texts(tmp_path / "both", "baseline") == texts(tmp_path / "both", "ar") == texts(tmp_path / "both", "lossless")
    )
    result = run(folder, tmp_path / "alone", checkpoint="gated")
    assert result.exit_code == 0, result.stderr
    shown = " ".join(result.stdout.split())
    assert "lossless against AR (the source itself): too few samples to tell" in shown
    assert document["mode"] == "gated"


PNG = b"\x89PNG\r\n\x1a\n"


def test_the_page_holds_its_pictures_and_needs_no_other_file(done: tuple[Path, dict[str, Any]]) -> None:
    out = done[0]
    page = (out / "report.html").read_text()
    images = {
        name: base64.b64decode(data)
        for name, data in re.findall(r'alt="(\w+)" src="data:image/png;base64,([^"]+)', page)
    }
    assert list(images) == ["quality", "trade"]
    assert all(image.startswith(PNG) for image in images.values())
    assert {path.stem: path.read_bytes() for path in out.glob("*.png")} == images
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    for said in ("mixed, w = 0.5", "source (AR)", "about ", "such problems would tell"):
        assert said in page


def test_names_in_a_page_are_text_and_not_html(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    document = {**done[1], "checkpoint": {"name": "<script>"}, "tasks": {"<b>": done[1]["tasks"]["words"]}}
    page = write_report(tmp_path, document).read_text()
    assert "<script>" not in page
    assert "<b>" not in page


def test_one_k_and_one_column_are_drawn_too(folder: Path, tmp_path: Path) -> None:
    document = evaluated(folder, tmp_path / "out", "--samplers", "lossless", "--limit", 1)
    assert document["reference"] is None
    assert document["tasks"]["words"]["columns"]["lossless"]["verdict"] is None
    assert (tmp_path / "out" / "trade.png").read_bytes().startswith(PNG)


def test_the_table_fits_80_columns_and_says_what_was_found(folder: Path, done: tuple[Path, dict[str, Any]]) -> None:
    options = ("--baseline", folder / "source", *SAMPLERS, "--k", "1,2,4", "--batch-size", 3)
    result = run(folder, done[0], *options)
    assert result.exit_code == 0, result.stderr
    assert max(map(len, result.stdout.split("\n")[:-2])) <= 80
    shown = " ".join(result.stdout.split())
    assert "AR against source (AR): too few samples to tell" in shown
    columns = done[1]["tasks"]["words"]["columns"]
    assert f"lossless: {columns['lossless']['cut_off']:.1%} cut off by the length" in shown


def test_results_go_where_export_looks_for_them(folder: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(folder / "init", run_dir / "checkpoint")
    words = ["evaluate", run_dir, "--tasks", folder / "words.yaml", "--limit", 1, "--device", "cpu"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.stderr
    assert (run_dir / "evaluation" / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--k", "1,8", "--n", "4"), 1, "pass@8 cannot be estimated from 4 samples"),
        (("--k", "0"), 2, "no list of whole numbers"),
        (("--n", "4", "--temperature", "0"), 1, "greedy decoding gives the same text every time"),
        (("--samplers", "mix:2"), 2, "no sampler"),
        (("--samplers", "turbo"), 2, "no sampler"),
        (("--chat",), 1, "--no-chat asks it as plain text"),
        (("--max-new-tokens", "400"), 1, "does not fit the model"),
        (("--block-size", "8"), 1, "--block-size is larger than the checkpoint"),
        (("--mode", "auto"), 2, "'auto' is not one of"),
        (("--tasks", "humaneval"), 1, "--allow-code-exec"),
        (("--tasks", "gsm9k"), 1, "did you mean gsm8k?"),
        (("--tasks", ","), 2, "at least one task"),
    ],
)
def test_what_cannot_work_is_told_before_anything_is_generated(
    folder: Path, tmp_path: Path, options: tuple[str, ...], code: int, said: str
) -> None:
    result = run(folder, tmp_path / "out", *options)
    assert result.exit_code == code
    assert said in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "out").exists()


def test_a_plan_is_checked_before_it_is_used() -> None:
    with pytest.raises(UserError, match="pass@4"):
        Plan(["gsm8k"], k=(4,), n=2)
    with pytest.raises(ValueError, match="no sampler"):
        Plan(["gsm8k"], samplers=["x"])
    assert torch.is_inference_mode_enabled() is False


def test_programs_are_sampled_run_and_scored_with_leave(folder: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, [{**row, "prompt": "def f ten"} for row in HUMANEVAL[:2]])
    options = ("--samplers", "ar", "--limit", 2, "--max-new-tokens", 5)
    alone = run(folder, tmp_path / "out", *options, "--no-score", tasks=f"humaneval={rows}")
    assert (alone.exit_code, alone.stdout.strip()) == (0, str(tmp_path / "out" / "samples"))
    document = evaluated(folder, tmp_path / "out", *options, "--allow-code-exec", tasks=f"humaneval={rows}")
    entry = document["tasks"]["humaneval"]["columns"]["ar"]
    assert (entry["pass@1"], entry["reasons"]) == (0.0, {"error": 2})
    assert [s["task_id"] for s in lines(tmp_path / "out" / "samples" / "humaneval" / "ar.jsonl")] == [
        "HumanEval/0",
        "HumanEval/1",
    ]


LOOK = (
    "<script>onload = () => document.title = [...document.images].map(i => i.naturalWidth > 100 && i.complete)</script>"
)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_a_browser_draws_every_picture_and_has_nothing_to_complain(done: tuple[Path, dict[str, Any]]) -> None:
    page = done[0] / "looked_at.html"
    page.write_text((done[0] / "report.html").read_text().replace("</body>", f"{LOOK}</body>"))
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--dump-dom"]
    seen = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120, check=True)
    assert "<title>true,true</title>" in seen.stdout
    assert "CONSOLE" not in seen.stderr
