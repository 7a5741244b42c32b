"""Tasks: the shipped ones fit their data sets' rows, right answers are scored as right, and mistakes are told."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.commands import run_command
from tests.evaluation.rows import CALLS, HUMANEVAL, ROWS, packed, write_rows
from zconvert.errors import UserError
from zconvert.evaluation.samples import read_lines, samples_file, scores_file, write_whole
from zconvert.evaluation.scoring import check_solutions, score
from zconvert.evaluation.tasks import fill, load_task, names, problems_of, program_of, prompt_text

TEXT_TASKS = ["arithmetic", "gsm8k", "aime-2024", "aime-2025"]
LIVECODEBENCH = {
    "abc1": "Doubling:\n```python\nprint(int(input()) * 2)\n```\nDone.",
    "3001": "```python\nclass Solution:\n    def append(self, nums: List[int], n: int) -> List[int]:\n"
    "        return [*nums, n]\n```",
}
needs_maths = pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs zconvert[math]")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux")


def scores_of(folder: Path, name: str, texts: dict[str, str], rows: Path) -> list[dict[str, Any]]:
    """What `zconvert score` makes of texts for problems."""
    task = load_task(f"{name}={rows}")
    samples = [{"task_id": key, "sample": 0, "completion": text, "finish": "eos"} for key, text in texts.items()]
    write_whole(samples_file(folder, name, "ar"), samples)
    score(folder, task, problems_of(task), ["ar"], allow_code_exec=True)
    return read_lines(scores_file(folder, name, "ar"))


def test_every_shipped_task_has_rows_here() -> None:
    assert set(ROWS) == set(names())


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_shipped_task_makes_prompts_of_its_data_set_s_rows(name: str, suffix: str, tmp_path: Path) -> None:
    task = load_task(f"{name}={write_rows(tmp_path, ROWS[name], suffix)}")
    problems = problems_of(task)
    assert len(problems) == len(ROWS[name])
    prompt = prompt_text(task, problems[-1])
    asked = ("prompt", "question", "problem", "text", "question_content")
    assert any(str(ROWS[name][-1].get(field, "-")) in prompt for field in asked)
    assert "{" + "answer}" not in prompt
    assert (problems[0].target is None) == task.is_code


@pytest.mark.parametrize("name", [*TEXT_TASKS, pytest.param("math-500", marks=needs_maths)])
def test_right_answers_are_scored_as_right_and_others_as_wrong(name: str, tmp_path: Path) -> None:
    rows = write_rows(tmp_path, ROWS[name])
    task = load_task(f"{name}={rows}")
    scores = check_solutions(task, problems_of(task))
    assert scores is not None
    assert [entry["right"] for entry in scores] == [True] * len(ROWS[name]), scores
    shapes = {"arithmetic": "The answer is {}.", "gsm8k": "#### {}"}
    wrong = {problem.id: shapes.get(name, "\\boxed{{{}}}").format(17) for problem in problems_of(task)}
    assert not any(entry["right"] for entry in scores_of(tmp_path, name, wrong, rows))
    none = {problem.id: "I do not know." for problem in problems_of(task)}
    assert [entry["answer"] for entry in scores_of(tmp_path, name, none, rows)] == [None] * len(ROWS[name])


@on_linux
def test_reference_solutions_of_a_humaneval_file_pass_and_mutated_ones_fail(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, HUMANEVAL)
    task = load_task(f"humaneval={rows}")
    scores = check_solutions(task, problems_of(task))
    assert scores is not None
    assert [entry["reason"] for entry in scores] == ["passed"] * 3
    mutants = {
        "HumanEval/0": "    return n / 2\n",
        "HumanEval/1": HUMANEVAL[1]["canonical_solution"].replace("append", "insert"),
        "HumanEval/2": "    return {w: 1 for w in text.split()}\n",
    }
    assert [entry["reason"] for entry in scores_of(tmp_path, "humaneval", mutants, rows)] == ["wrong", "error", "wrong"]


@on_linux
def test_reference_solutions_of_mbpp_pass(tmp_path: Path) -> None:
    task = load_task(f"mbpp={write_rows(tmp_path, ROWS['mbpp'])}")
    scores = check_solutions(task, problems_of(task))
    assert scores is not None
    assert [entry["right"] for entry in scores] == [True]


@on_linux
def test_contest_programs_are_judged_by_public_and_hidden_cases(tmp_path: Path) -> None:
    rows = write_rows(tmp_path, ROWS["livecodebench"])
    assert all(entry["right"] for entry in scores_of(tmp_path, "livecodebench", LIVECODEBENCH, rows))
    half = {"abc1": "```\nprint(4)\n```", "3001": LIVECODEBENCH["3001"].replace("n]\n", "1]\n")}
    scores = scores_of(tmp_path, "livecodebench", half, rows)
    assert [entry["right"] for entry in scores] == [False, False]
    assert scores[0]["detail"] == "case 2 of 2: 4\n"


def test_hidden_cases_cannot_run_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return open, (str(tmp_path / "ran"), "w")

    task = load_task("livecodebench")
    row = {**ROWS["livecodebench"][1], "private_test_cases": packed(Evil())}
    assert program_of(task, row, "").cases == ((CALLS[0]["input"], CALLS[0]["output"]),)
    assert not (tmp_path / "ran").exists()


def test_a_template_reaches_into_mappings_and_json_and_leaves_other_braces_alone() -> None:
    row = {"a": {"b": [1, 2]}, "c": '{"d": "x"}', "e": None}
    assert fill("{a.b}|{c.d}|{e}|\\boxed{}|\\frac{1}{2}|{{a}}", row, "row 1") == "1\n2|x||\\boxed{}|\\frac{1}{2}|{a}"
    with pytest.raises(UserError, match=r"row 1 has no field a\.z") as told:
        fill("{a.z}", row, "row 1")
    assert told.value.found == "a, c, e"


TASK = """
description: sums
dataset:
  path: ROWS
prompt: "{q}="
check:
  method: numeric
  target: "{a}"
"""


def own_task(folder: Path, rows: list[dict[str, Any]], more: str = "", text: str = TASK) -> Path:
    path = folder / "sums.yaml"
    path.write_text(text.replace("ROWS", str(write_rows(folder, rows))) + more)
    return path


def test_a_task_of_one_s_own_has_examples_written_out_or_read(tmp_path: Path) -> None:
    rows = [{"q": f"{n}+1", "a": n + 1} for n in range(4)]
    written = "examples:\n  answer: ' {a}'\n  rows: [{q: 7+1, a: 8}]\nseparator: ' ; '\n"
    task = load_task(str(own_task(tmp_path, rows, written)))
    assert prompt_text(task, problems_of(task, 1)[0]) == "7+1= 8 ; 0+1="
    (tmp_path / "shots.jsonl").write_text('{"q": "8+1", "a": 9}\n{"q": "9+1", "a": 10}\n')
    read = f"system: Be brief.\nexamples:\n  answer: ' {{a}}'\n  path: {tmp_path / 'shots.jsonl'}\n  count: 2\n"
    problem = problems_of(load_task(str(own_task(tmp_path, rows, read))))[0]
    assert [m["role"] for m in problem.messages] == ["system", *["user", "assistant"] * 2, "user"]
    assert [m["content"] for m in problem.messages][1:] == ["8+1=", " 9", "9+1=", " 10", "0+1="]


def test_a_problem_s_digest_changes_with_what_is_asked(tmp_path: Path) -> None:
    def digest(row: dict[str, Any]) -> str:
        return problems_of(load_task(str(own_task(tmp_path, [row]))))[0].digest

    assert digest({"q": "1+1", "a": 2}) == digest({"q": "1+1", "a": 3}) != digest({"q": "1+2", "a": 3})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("method: numeric", "method: numbers"), "check.method"),
        (("prompt:", "prompts:"), "did you mean prompt?"),
        (('  target: "{a}"', "  tolerance: 1.0"), "expected target"),
        (("method: numeric", "method: code"), "expected program"),
        (('prompt: "{q}="', 'prompt: "{q}="\nanswer: {take: regex}'), "expected a pattern"),
        (('prompt: "{q}="', 'prompt: "{q}="\nanswer: {take: regex, pattern: "(a)(b)"}'), "one group"),
        (('prompt: "{q}="', 'prompt: "{q}="\nexamples: {count: 3}'), "expected count together with"),
        (("{q}", "{question}"), "has no field question"),
        (("{a}", "{q} {b}"), "has no field b"),
    ],
)
def test_a_mistake_in_a_task_is_told(change: tuple[str, str], said: str, tmp_path: Path) -> None:
    path = own_task(tmp_path, [{"q": "1+1", "a": 2}], text=TASK.replace(*change))
    with pytest.raises(UserError) as told:
        problems_of(load_task(str(path)))
    assert said in str(told.value)


def test_rows_without_right_answers_or_with_the_same_name_are_told(tmp_path: Path) -> None:
    pattern = TASK + "  target_pattern: '#(.)'\n"
    with pytest.raises(UserError, match="has no right answer"):
        problems_of(load_task(str(own_task(tmp_path, [{"q": "1", "a": "2"}], text=pattern))))
    twice = [{"q": "1", "a": 1}, {"q": "1", "a": 1}]
    with pytest.raises(UserError, match="the same name"):
        problems_of(load_task(str(own_task(tmp_path, twice, 'id: "{q}"\n'))))
    with pytest.raises(UserError, match="no problems"):
        problems_of(load_task(str(own_task(tmp_path, []))))


def test_an_unknown_task_is_told_with_the_nearest() -> None:
    with pytest.raises(UserError, match="there is no task gsm8") as told:
        load_task("gsm8")
    assert told.value.fix == "did you mean gsm8k?"


def test_the_command_lists_shows_and_checks(tmp_path: Path) -> None:
    listed = run_command("tasks", "list")
    assert listed.exit_code == 0, listed.stderr
    assert all(name in listed.stdout for name in names())
    assert max(map(len, listed.stdout.split("\n"))) <= 80
    shown = run_command("tasks", "show", "gsm8k")
    copy = tmp_path / "mine.yaml"
    copy.write_text(shown.stdout)
    assert load_task(str(copy)).recipe == load_task("gsm8k").recipe
    rows = write_rows(tmp_path, ROWS["gsm8k"])
    checked = run_command("tasks", "check", f"gsm8k={rows}")
    assert checked.exit_code == 0, checked.stderr
    assert "2 of 2 right answers are scored as right." in checked.stdout
    rows.write_text(json.dumps({"question": "How many?", "answer": "\nQuestion: none.\n#### 7"}))
    failed = run_command("tasks", "check", f"gsm8k={rows}")
    assert (failed.exit_code, "0 of 1" in failed.stdout) == (1, True)


def test_checking_a_code_task_runs_nothing_without_leave(tmp_path: Path) -> None:
    row = {**HUMANEVAL[0], "canonical_solution": f"    open({str(tmp_path / 'ran')!r}, 'w')\n"}
    rows = write_rows(tmp_path, [row])
    checked = run_command("tasks", "check", f"humaneval={rows}")
    assert (checked.exit_code, "--allow-code-exec runs them" in checked.stdout) == (0, True)
    task = load_task(f"humaneval={rows}")
    with pytest.raises(UserError, match="running programs"):
        score(tmp_path, task, problems_of(task), ["ar"])
    assert not (tmp_path / "ran").exists()
