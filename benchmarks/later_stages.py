"""What sft and extend-context do to the quickstart's model: answers in chat form, and losses by position.

    python benchmarks/later_stages.py    # in the repository's root; goes on from the run of `make quickstart`, if any

Data, settings and commands are those that the recipes in recipes/quickstart name; their folders in out/quickstart must
not be there yet. Answers are counted on held-out problems, each asked as a conversation of one turn in the recipe's
template, decoded greedily by transformers' own `generate`, before and after sft.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import resolve

RECIPES, OUT = Path("recipes/quickstart"), Path("out/quickstart")
PROBLEMS = Path("examples/tiny-zaya")
sys.path.insert(0, str(PROBLEMS))
from problems import answer_of, problems  # noqa: E402


def main() -> None:
    """Runs what is missing, and prints both results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=60, help="held-out problems that are asked")
    args = parser.parse_args()
    if not (OUT / "run" / "checkpoint").exists():
        write(OUT / "train.jsonl", "train", 20_000, seed=1)
        for stage in ("convert-init", "midtrain"):
            zconvert(stage)
    write(OUT / "chat.jsonl", "train", 5_000, "--chat")
    for split in ("train", "held_out"):
        write(OUT / f"long-{split}.jsonl", split, 2_000, "--per-document", 6)
    zconvert("sft")
    zconvert("extend-context")
    before, after = (answers(OUT / run / "checkpoint", args.count) for run in ("run", "sft"))
    print(f"answers in chat form, of {args.count}: {before} before sft, {after} after")
    report: dict[str, Any] = json.loads((OUT / "long" / "context.json").read_text())
    print("nats a token, before -> after\n positions         AR               diffusion")
    for old, new in zip(report["before"], report["after"], strict=True):
        losses = (f"{old[name]:6.3f} -> {new[name]:6.3f}" for name in ("loss_ar", "loss_diffusion"))
        print(f"{old['from']:4} - {old['to'] - 1:4}", *losses, sep="   ")


def write(path: Path, split: str, count: int, *more: object, seed: int = 2) -> None:
    """Makes a file of problems, as the recipes' comments say."""
    options = ["--split", split, "--count", count, "--seed", seed, "--out", path, *more]
    subprocess.run([sys.executable, PROBLEMS / "problems.py", *map(str, options)], check=True)


def zconvert(stage: str) -> None:
    """Runs a stage by its recipe."""
    subprocess.run([sys.executable, "-m", "zconvert", stage, RECIPES / f"{stage}.yaml"], check=True)


def answers(checkpoint: Path, count: int) -> int:
    """How many held-out problems are answered right."""
    torch.set_num_threads(1)
    model, tokenizer = load_model(resolve(checkpoint), dtype="float32", device="cpu")
    template, right = (RECIPES / "chat.jinja").read_text(), 0
    for problem in islice(problems("held_out", seed=7), count):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": problem.prompt.strip()}],
            chat_template=template,
            add_generation_prompt=True,
            return_tensors="pt",
        )["input_ids"]
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=120, do_sample=False)
        right += answer_of(tokenizer.decode(made[0, ids.shape[1] :])) == problem.answer
    return right


if __name__ == "__main__":
    main()
