"""Rows as the data sets of the shipped tasks have them, made up; each with a right answer, and a wrong one."""

from __future__ import annotations

import base64
import json
import pickle
import zlib
from pathlib import Path
from typing import Any

import pandas

CASES = [{"input": "2\n", "output": "4\n", "testtype": "stdin"}, {"input": "-3\n", "output": "-6", "testtype": "stdin"}]
CALLS = [{"input": "[1, 2]\n3", "output": "[1, 2, 3]", "testtype": "functional"}]


def packed(value: Any) -> str:
    """As LiveCodeBench packs its hidden tests."""
    return base64.b64encode(zlib.compress(pickle.dumps(value))).decode()


HUMANEVAL = [
    {
        "task_id": "HumanEval/0",
        "prompt": 'def halve(n: int) -> int:\n    """Half of n, rounded down.\n    >>> halve(5)\n    2\n    """\n',
        "canonical_solution": "    return n // 2\n",
        "test": "def check(candidate):\n    assert candidate(5) == 2\n    assert candidate(-1) == -1\n"
        "    assert abs(candidate(4) - 2) < 1e-9\n",
        "entry_point": "halve",
    },
    {
        "task_id": "HumanEval/1",
        "prompt": "from typing import List\n\n\ndef twice(x):\n    return 2 * x\n\n\n"
        'def doubled(numbers: List[int]) -> List[int]:\n    """Each of them twice as large."""\n',
        "canonical_solution": "    result = []\n    for n in numbers:\n        result.append(twice(n))\n"
        "    return result\n",
        "test": "METADATA = {}\n\n\ndef check(candidate):\n    for k in range(3):\n"
        "        assert candidate([k, 1]) == [twice(k), 2], 'wrong'\n    assert candidate([]) == []\n",
        "entry_point": "doubled",
    },
    {
        "task_id": "HumanEval/2",
        "prompt": 'def words(text):\n    """Counts of the words."""\n',
        "canonical_solution": "    import collections\n    return collections.Counter(text.split())\n",
        "test": "def check(candidate):\n    assert candidate('a b a') == {'a': 2, 'b': 1}\n"
        "    assert candidate('') == {}\n",
        "entry_point": "words",
    },
]
ROWS: dict[str, list[dict[str, Any]]] = {
    "arithmetic": [{"text": "", "prompt": "Mia has 2 cups. She buys 3 more.\n", "answer": 5}],
    "gsm8k": [
        {"question": "How many?", "answer": "He has 1,000 + 200 = <<1000+200=1200>>1,200.\n#### 1,200"},
        {"question": "How much?", "answer": "It falls by 5.\n\nSo:\n#### -5"},
    ],
    "math-500": [
        {
            "problem": "Halve it.",
            "solution": "It is $\\boxed{\\frac{1}{2}}$.",
            "answer": "\\frac12",
            "unique_id": "test/a/1.json",
        },
        {
            "problem": "Solve it.",
            "solution": "So \\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}.",
            "answer": "(3, \\frac{\\pi}{2})",
            "unique_id": "test/a/2.json",
        },
    ],
    "aime-2024": [{"id": 60, "problem": "Find n.", "solution": "…", "answer": "073"}],
    "aime-2025": [{"id": "0", "problem": "Find n.", "answer": "204"}],
    "humaneval": HUMANEVAL,
    "mbpp": [
        {
            "task_id": 11,
            "text": "Write a function to add.",
            "code": "def add(a, b):\r\n  return a + b",
            "test_list": ["assert add(1, 2) == 3", "assert add(-1, 1) == 0"],
            "test_setup_code": "",
            "challenge_test_list": [],
        }
    ],
    "livecodebench": [
        {
            "question_id": "abc1",
            "question_content": "Print twice the number.",
            "starter_code": "",
            "metadata": "{}",
            "public_test_cases": json.dumps(CASES[:1]),
            "private_test_cases": packed(json.dumps(CASES[1:])),
        },
        {
            "question_id": "3001",
            "question_content": "Append.",
            "starter_code": "class Solution:\n    def append(self, nums: List[int], n: int) -> List[int]:\n        ",
            "metadata": json.dumps({"func_name": "append"}),
            "public_test_cases": json.dumps(CALLS),
            "private_test_cases": packed(json.dumps(CALLS)),
        },
    ],
}


def write_rows(folder: Path, rows: list[dict[str, Any]], suffix: str = ".jsonl") -> Path:
    """Rows as a file of one of the kinds that tasks read."""
    path = folder / f"rows{suffix}"
    if suffix == ".parquet":
        pandas.DataFrame(rows).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
