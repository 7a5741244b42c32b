"""Answers are found where people look for them, and judged as people would."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

from zconvert.errors import UserError
from zconvert.evaluation import answers
from zconvert.evaluation.answers import extract, is_right, loops, require_maths
from zconvert.recipe.task import AnswerSection, CheckSection

CODE = "Here:\n```python\nx = 1\n```\nor\n```\nx = 2\n\ny\n```\n"


@pytest.mark.parametrize(
    ("take", "text", "answer"),
    [
        ("text", " all of it\n", " all of it\n"),
        ("text", " \n", None),
        ("last_number", "3 cats, 1,234.50 dogs.", "1,234.50"),
        ("last_number", "from 5 to -3.", "-3"),
        ("last_number", "1,2,3", "3"),
        ("last_number", "2.5e3 or .5", ".5"),
        ("last_number", "none", None),
        ("boxed", "\\boxed{1} then \\boxed{\\text{a{b}c}}.", "\\text{a{b}c}"),
        ("boxed", "\\fbox \\boxed {x}, and \\boxed{never closed", "x"),
        ("boxed", "42", None),
        ("code_block", CODE, "x = 2\n\ny"),
        ("code_block", "def f():\n    pass\n", "def f():\n    pass"),
        ("code_block", "x = 1\n```\nThis sets x.", "x = 1"),
        ("code_block", "```python\nx = 1", "x = 1"),
        ("code_block", "\n", None),
        ("choice", "A good try. The answer is (B).", "B"),
        ("choice", "Answer: C\nbecause (A) is wrong", "C"),
        ("choice", "**Answer:** D", "D"),
        ("choice", "A man has a dog.\nB", "B"),
        ("choice", "A man has a dog.", None),
    ],
)
def test_the_answer_in_a_text(take: Any, text: str, answer: str | None) -> None:
    assert extract(text, AnswerSection(take=take)) == answer


def test_a_pattern_takes_its_last_match() -> None:
    section = AnswerSection(take="regex", pattern=r"=(\d+)")
    assert extract("1+1=2, so 2+2=4.", section) == "4"
    assert extract("1+1", section) is None


@pytest.mark.parametrize(
    ("method", "answer", "target", "right"),
    [
        ("exact", " The  Cat", "the cat", True),
        ("exact", "cat", "cats", False),
        ("numeric", "1,200", "1200.0", True),
        ("numeric", "$3.50", "7/2", True),
        ("numeric", "073", "73", True),
        ("numeric", "1e3", "1000", True),
        ("numeric", "12.000001", "12", True),
        ("numeric", "12.1", "12", False),
        ("numeric", "twelve", "12", False),
        ("numeric", "1/0", "12", False),
        ("numeric", "9" * 400, "9" * 400, True),
        ("set", "{b, A}", "a,b", True),
        ("set", "['x', 'y']", "y, x", True),
        ("set", "a", "a, b", False),
    ],
)
def test_whether_an_answer_is_right(method: Any, answer: str, target: str, right: bool) -> None:
    assert is_right(answer, target, CheckSection(method=method, target="{a}")) is right


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs zconvert[math]")
@pytest.mark.parametrize(
    ("answer", "target", "right"),
    [
        ("\\frac{1}{2}", "0.5", True),
        ("x(x+1)", "x^2 + x", True),
        ("\\sqrt{8}", "2\\sqrt{2}", True),
        ("(1, 2)", "(2, 1)", False),
        ("3", "4", False),
        ("\\frac{", "4", False),
    ],
)
def test_symbolic_maths_sees_that_two_ways_of_writing_are_the_same(answer: str, target: str, right: bool) -> None:
    assert is_right(answer, target, CheckSection(method="math", target="{a}")) is right


def test_without_the_library_for_maths_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="math-verify"):
        require_maths()


@pytest.mark.parametrize(
    ("text", "looping"),
    [
        ("no " * 40, True),
        ("." * 120, True),
        ("Once more: " + "the cat sat on the mat and looked at the moon. " * 5, True),
        ("Ones: 7+5=12. Tens: 2+3+1=6. " * 2, False),
        ("| a | b |\n|---|---|\n| 1 | 2 |", False),
        ("I think so, no, no, no.", False),
        ("", False),
    ],
)
def test_texts_that_end_in_circles_are_told_from_others(text: str, looping: bool) -> None:
    assert loops(text) is looping
