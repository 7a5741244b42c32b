"""Every error that a user sees names what is wrong and what to do about it."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import zconvert

PACKAGE = Path(zconvert.__file__).parent


def raised() -> Iterator[tuple[str, ast.Call]]:
    """Where in the package a UserError is made, and how."""
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "UserError":
                yield f"{path.relative_to(PACKAGE)}:{node.lineno}", node


def literal(node: ast.expr) -> str:
    """The text of an argument; … for what is put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) for value in node.values)
    if isinstance(node, ast.BinOp):
        return literal(node.left) + literal(node.right)
    return str(node.value) if isinstance(node, ast.Constant) else "…"


def faults(call: ast.Call) -> Iterator[str]:
    """What is missing in an error."""
    given = {str(keyword.arg): literal(keyword.value) for keyword in call.keywords}
    if not given.get("fix"):
        yield "it says nothing that can be done"
    if given.get("fix") in ("None", "correct them", "correct it"):
        yield "what is to be corrected, and where?"
    for text in (*map(literal, call.args), *given.values()):
        if text.endswith((".", "!")):
            yield f"its parts have no full stop: {text!r}"


def test_every_error_says_what_mends_it() -> None:
    assert [f"{where}: {fault}" for where, call in raised() for fault in faults(call)] == []


@pytest.mark.parametrize(
    "code", ['UserError("x is broken")', 'UserError("x is broken", fix="correct it")', 'UserError("x.", fix="mend x")']
)
def test_an_error_that_says_too_little_would_be_seen(code: str) -> None:
    (call,) = (node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call))
    assert len(list(faults(call))) == 1
