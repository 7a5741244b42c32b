"""The main job from nothing: a small trained ZAYA becomes a diffusion model, is measured, and is exported.

Twice: by full training, and gated, where the source stays as it is and small weights are trained beside it.

Everything is done by the commands that you would type; each is printed before it runs. What was measured, whatever it
is, ends up in a table and in `out/quickstart/results.json`. From the repository's root:

    .venv/bin/python examples/quickstart.py --out out/quickstart
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "tiny-zaya"))

from problems import Problem, answer_of, problems  # noqa: E402  # found by the line above

SOURCE = Path("examples/tiny-zaya/checkpoint")
RECIPES = {"full": Path("recipes/quickstart"), "gated": Path("recipes/quickstart-gated")}
DEFAULT_OUT = Path("out/quickstart")
STAGES = ("convert-init", "midtrain")
MARK = ".quickstart"
TRAINING_PROBLEMS, BENCH_PROBLEMS, ACCURACY_PROBLEMS = 20_000, 50, 200
ACCURACY_SEED = 7
# Decoding runs on one thread: so small a model gains nothing from a second, and loses much where a core is busy.
MAX_NEW_TOKENS = 128  # a worked solution has less than 100 tokens

# Aims on two CPU cores, after installation.
AIM_TOKENS_PER_FORWARD, AIM_SPEEDUP, AIM_POINTS, AIM_SECONDS = 4.0, 2.0, 3.0, 480
AIM_GATED_SHARE = 0.9  # of full training's tokens per forward


def main() -> None:
    """Runs all steps; a step that fails ends the run with its exit code."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, default=DEFAULT_OUT, help="folder of all results; an earlier run goes")
    args = parser.parse_args()
    out = args.out.resolve()
    in_root = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    started = time.monotonic()
    clear(out)

    recipes = {mode: [recipe(folder, name, in_root) for name in STAGES] for mode, folder in RECIPES.items()}
    full_dir, train_file = paths_of(recipes["full"][-1])
    gated_dir, _ = paths_of(recipes["gated"][-1])
    prompts = out / "prompts.jsonl"
    write_problems(train_file, "train", TRAINING_PROBLEMS)
    write_problems(prompts, "held_out", BENCH_PROBLEMS)
    write_problems(out / "held_out.jsonl", "held_out", ACCURACY_PROBLEMS, seed=ACCURACY_SEED)  # of the task arithmetic
    for mode in RECIPES:
        for stage, path in zip(STAGES, recipes[mode], strict=True):
            zconvert(stage, path)
    bench_file = out / "bench.json"
    full = bench(full_dir, prompts, bench_file)
    gated = bench(gated_dir, prompts, out / "bench-gated.json", "--baseline", SOURCE)
    folders = {"source": SOURCE, "converted": full_dir, "gated": gated_dir}
    accuracies = {name: accuracy(folder) for name, folder in folders.items()}
    zconvert("export", full_dir, "--out", in_root / "exported", "--results", shown(bench_file))

    results = {
        "source": {"accuracy": accuracies["source"]},
        "converted": {"accuracy": accuracies["converted"]},
        "prompts": BENCH_PROBLEMS,
        **{name: full[name] for name in ("ar", "lossless", "mixed")},
        "gated": {
            "accuracy": accuracies["gated"],
            "identical_to_source": gated["lossless"]["identical_to_baseline"],
            **gated["lossless"],
        },
        "seconds": time.monotonic() - started,
    }
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results, in_root / "results.json")


def clear(out: Path) -> None:
    """Makes the folder anew. One that is neither the default nor of an earlier run is left alone."""
    if out.exists() and any(out.iterdir()) and out != ROOT / DEFAULT_OUT and not (out / MARK).exists():
        sys.exit(f"{out} is not of an earlier quickstart: choose another --out, or remove it yourself")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / MARK).touch()


def recipe(folder: Path, stage: str, out: Path) -> Path:
    """The recipe to run: the repository's own, or a copy with other paths where --out says so."""
    path = folder / f"{stage}.yaml"
    if out == DEFAULT_OUT:
        return path
    copy = out / f"{folder.name}-{path.name}"
    (ROOT / copy).write_text((ROOT / path).read_text().replace(str(DEFAULT_OUT), str(out)))
    return copy


def paths_of(training: Path) -> tuple[Path, Path]:
    """Where the recipe trains, and the training file it reads."""
    import yaml

    settings = yaml.safe_load((ROOT / training).read_text())
    return Path(settings["output_dir"]), ROOT / settings["datasets"][0]["path"]


def write_problems(path: Path, split: Any, count: int, seed: int = 1) -> None:
    """Writes problems as JSONL rows with `text`, `prompt` and `answer`."""
    say(f"# {count:,} {split.replace('_', '-')} problems → {shown(path)}")
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        for p in islice(problems(split, seed=seed), count):
            file.write(json.dumps({"text": p.text, "prompt": p.prompt, "answer": p.answer}) + "\n")


def zconvert(*arguments: object, capture: bool = False) -> str:
    """Runs one command and returns its stdout where captured; ends the whole run where it fails."""
    words = [str(argument) for argument in arguments]
    say("$ zconvert " + shlex.join(words))
    stdout = subprocess.PIPE if capture else None
    done = subprocess.run([sys.executable, "-m", "zconvert", *words], cwd=ROOT, stdout=stdout, text=True)
    if done.returncode:
        sys.exit(done.returncode if done.returncode > 0 else 128 - done.returncode)
    return done.stdout or ""


def bench(run_dir: Path, prompts: Path, file: Path, *more: object) -> dict[str, Any]:
    """Measures decoding into a file; returns the results."""
    options = ("--max-new-tokens", MAX_NEW_TOKENS, "--threads", 1, "--no-stock", "--json", *more)
    file.write_text(zconvert("bench", run_dir, "--prompts", shown(prompts), *options, capture=True))
    return {entry["sampler"]: entry for entry in json.loads(file.read_text())["results"] if entry["mode"] != "baseline"}


def accuracy(checkpoint: Path) -> float:
    """Share of held-out problems that plain AR decoding answers exactly: transformers' own `generate`, greedy."""
    import torch

    from zconvert.checkpoint.load import load_model
    from zconvert.checkpoint.source import resolve

    torch.set_num_threads(1)
    say(f"# answers of {checkpoint} to {ACCURACY_PROBLEMS} held-out problems, by plain AR decoding")
    model, tokenizer = load_model(resolve(ROOT / checkpoint), dtype="float32", device="cpu")
    batches: dict[int, list[tuple[list[int], Problem]]] = defaultdict(list)  # of equal length: nothing to pad
    for p in islice(problems("held_out", seed=ACCURACY_SEED), ACCURACY_PROBLEMS):
        ids = [tokenizer.bos_token_id, *tokenizer(p.prompt, add_special_tokens=False)["input_ids"]]
        batches[len(ids)].append((ids, p))
    right = 0
    for length, rows in batches.items():
        prompts = torch.tensor([ids for ids, _ in rows])
        options = {"attention_mask": torch.ones_like(prompts), "max_new_tokens": MAX_NEW_TOKENS, "do_sample": False}
        texts = tokenizer.batch_decode(model.generate(prompts, **options)[:, length:])
        right += sum(answer_of(text) == p.answer for text, (_, p) in zip(texts, rows, strict=True))
    return right / ACCURACY_PROBLEMS


def show(results: dict[str, Any], path: Path) -> None:
    """Prints what was measured beside what was aimed at."""
    from rich.console import Console
    from rich.table import Table

    source, converted = results["source"]["accuracy"], results["converted"]["accuracy"]
    lossless, mixed = results["lossless"], results["mixed"]
    points, same = 100 * (converted - source), lossless["identical_prompts"]
    per_forward = lossless["tokens_per_forward"]
    gated = results["gated"]
    own, share = gated["identical_to_source"], gated["tokens_per_forward"] / per_forward
    rows: list[tuple[str, str, str, bool | None]] = [
        ("Answers right, source", f"{source:.1%}", "", None),
        (
            "Answers right, converted (AR)",
            f"{converted:.1%} ({points:+.1f} points)",
            f"within {AIM_POINTS:g} points",
            abs(points) <= AIM_POINTS + 1e-9,
        ),
        ("AR, tokens/s", f"{results['ar']['tokens_per_second']:.1f}", "", None),
        (
            "Lossless, tokens/forward",
            f"{per_forward:.2f}",
            f"≥ {AIM_TOKENS_PER_FORWARD}",
            per_forward >= AIM_TOKENS_PER_FORWARD,
        ),
        ("Lossless, tokens/s", f"{lossless['tokens_per_second']:.1f}", "", None),
        ("Lossless against AR", f"{lossless['speedup']:.2f}×", f"≥ {AIM_SPEEDUP}×", lossless["speedup"] >= AIM_SPEEDUP),
        ("Lossless, same text as AR", f"{same}/{results['prompts']}", "all", same == results["prompts"]),
        (
            f"Mixed w = {mixed['mix_weight']:g}, tokens/forward",
            f"{mixed['tokens_per_forward']:.2f}",
            "above lossless",
            mixed["tokens_per_forward"] > per_forward,
        ),
        ("Mixed, tokens/s", f"{mixed['tokens_per_second']:.1f}", "", None),
        ("Mixed against AR", f"{mixed['speedup']:.2f}×", "", None),
        (
            "Gated: answers right (AR)",
            f"{gated['accuracy']:.1%} ({100 * (gated['accuracy'] - source):+.1f} points)",
            "the source's",
            gated["accuracy"] == source,
        ),
        ("Gated: same text as source", f"{own}/{results['prompts']}", "all", own == results["prompts"]),
        (
            "Gated: tokens/forward",
            f"{gated['tokens_per_forward']:.2f} ({share:.0%} of full)",
            f"≥ {AIM_GATED_SHARE:.0%} of full",
            share >= AIM_GATED_SHARE,
        ),
        ("Gated against AR", f"{gated['speedup']:.2f}×", f"≥ {AIM_SPEEDUP}×", gated["speedup"] >= AIM_SPEEDUP),
        ("Seconds for all", f"{results['seconds']:.0f}", f"< {AIM_SECONDS}", results["seconds"] < AIM_SECONDS),
    ]
    table = Table(title="Quickstart")
    table.add_column("Measured")
    table.add_column("Result", justify="right")
    table.add_column("Aim")
    table.add_column("")
    for name, result, aim, met in rows:
        table.add_row(name, result, aim, {None: "", True: "[green]met[/]", False: "[red]missed[/]"}[met])
    console = Console(highlight=False)
    console.print(table)
    console.print(f"The same numbers: {path}", soft_wrap=True)


def shown(path: Path) -> Path:
    """A path as it is typed in the repository's root."""
    return path.relative_to(ROOT) if path.is_relative_to(ROOT) else path


def say(line: str) -> None:
    """Prints at once, so that the lines of the commands' own output come in order."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
