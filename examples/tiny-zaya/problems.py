"""Worked arithmetic word problems with checkable answers: unlimited, seeded, split by construction.

A problem is one addition of two numbers below 100, worked digit column by digit column:

    Mia has 27 apples. She buys 35 more. How many apples does she have now?
    Start with 27 apples and add 35. Ones: 7+5=12, write 2, carry 1. Tens: 2+3+1=6. So 27+35=62. The answer is 62.

Three of the phrases have two wordings, drawn evenly: as in real text, the numbers are certain and the words are not.
One pair of numbers in ten is held out (`is_held_out`): a held-out problem's sum was never seen in training, whatever
names and things dress it. Run this file to write JSONL:

    python examples/tiny-zaya/problems.py --split train --count 20000 --seed 1 --out train.jsonl

With `--chat` a row is a conversation of one to three problems instead: the user asks, the assistant works them out.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

Split = Literal["train", "held_out"]

_PEOPLE = {
    "Mia": "She", "Tom": "He", "Ana": "She", "Ben": "He", "Eva": "She", "Leo": "He", "Zoe": "She", "Max": "He",
    "Ida": "She", "Sam": "He", "Kim": "She", "Jim": "He",
}  # fmt: skip
_THINGS = ["apples", "books", "cards", "coins", "eggs", "pens", "shells", "stones", "cups", "plums"]
_GAINS = ["buys", "finds", "gets", "makes", "wins", "picks"]


@dataclass(frozen=True)
class Problem:
    """A question (the prompt, ending in a newline), its worked solution and its answer."""

    prompt: str
    solution: str
    answer: int

    @property
    def text(self) -> str:
        """The whole document, as it is trained on."""
        return self.prompt + self.solution


def is_held_out(a: int, b: int) -> bool:
    """Whether the unordered pair of numbers belongs to the held-out tenth.

    >>> is_held_out(3, 4) == is_held_out(4, 3)
    True
    """
    low, high = sorted((a, b))
    return (37 * low + 11 * high) % 10 == 3


def problem(rng: random.Random, split: Split) -> Problem:
    """Draws one problem of a split.

    >>> p = problem(random.Random(0), "train")
    >>> answer_of(p.solution) == p.answer
    True
    """
    while True:
        a, b = rng.randrange(1, 100), rng.randrange(1, 100)
        if is_held_out(a, b) == (split == "held_out"):
            break
    name = rng.choice(sorted(_PEOPLE))
    pronoun, thing, gains = _PEOPLE[name], rng.choice(_THINGS), rng.choice(_GAINS)
    prompt = f"{name} has {a} {thing}. {pronoun} {gains} {b} more. How many {thing} does {pronoun.lower()} have now?\n"
    return Problem(prompt, _worked(a, b, thing, rng), a + b)


def _worked(a: int, b: int, thing: str, rng: random.Random) -> str:
    ones = a % 10 + b % 10
    carry = ones // 10
    tens = a // 10 + b // 10 + carry
    start = rng.choice([f"Start with {a} {thing} and add {b}.", f"First there are {a} {thing}, then {b} more."])
    write = rng.choice([f"write {ones % 10}, carry {carry}", f"so {ones % 10} and carry {carry}"])
    end = rng.choice([f"So {a}+{b}={a + b}.", f"That makes {a + b} {thing}."])
    return (
        f"{start} Ones: {a % 10}+{b % 10}={ones}, {write}. "
        f"Tens: {a // 10}+{b // 10}+{carry}={tens}. "
        f"{end} The answer is {a + b}."
    )


def problems(split: Split, seed: int) -> Iterator[Problem]:
    """An endless stream of problems; the same seed gives the same stream."""
    rng = random.Random(f"{split}-{seed}")
    while True:
        yield problem(rng, split)


def conversation(stream: Iterator[Problem], rng: random.Random) -> dict[str, list[dict[str, str]]]:
    """One to three problems in turn, as rows of chat datasets are.

    >>> row = conversation(problems("train", 0), random.Random(0))
    >>> [message["role"] for message in row["messages"]][:2]
    ['user', 'assistant']
    """
    messages = []
    for _ in range(rng.randint(1, 3)):
        p = next(stream)
        messages.append({"role": "user", "content": p.prompt.strip()})
        messages.append({"role": "assistant", "content": p.solution})
    return {"messages": messages}


def answer_of(solution: str) -> int | None:
    """The number a solution ends on, or None where it states none.

    >>> answer_of("So 2+3=5. The answer is 5.")
    5
    """
    found = re.search(r"The answer is (\d+)\.", solution)
    return int(found.group(1)) if found else None


def main() -> None:
    """Writes problems as JSONL rows with `text`, `prompt` and `answer`, or with `messages`."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--split", choices=["train", "held_out"], required=True)
    parser.add_argument("--count", type=int, required=True, help="number of rows")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--per-document", type=int, default=1, help="problems in a row, under one `text`")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file to write")
    parser.add_argument("--chat", action="store_true", help="write conversations")
    args = parser.parse_args()
    args.out.parent.mkdir(parents=True, exist_ok=True)
    stream = problems(args.split, args.seed)
    rng = random.Random(args.seed)
    with args.out.open("w") as file:
        for _ in range(args.count):
            if args.chat:
                row: dict[str, object] = {**conversation(stream, rng)}
            else:
                several = [next(stream) for _ in range(args.per_document)]
                text, last = "\n".join(p.text for p in several), several[-1]
                row = {"text": text, "prompt": text.removesuffix(last.solution), "answer": last.answer}
            file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
