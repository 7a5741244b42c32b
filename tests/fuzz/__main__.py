"""Fuzzing by hand, guided by coverage (atheris) where it is installed, else by hypothesis:

    python -m tests.fuzz header --minutes 10 --corpus /tmp/fuzz/header

What was found is in the current folder as `crash-…`: put it, made small, into tests/fuzz/corpus/TARGET, where a test
replays it.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from random import Random

from tests.fuzz.seeds import CORPUS, seeds

MAX_LENGTH = 16_384


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description="Fuzz one target.")
    parser.add_argument("target")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--corpus", type=Path, required=True, help="folder for the inputs that reached new code")
    options = parser.parse_args()
    options.corpus.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds(options.target)):
        (options.corpus / f"seed-{number}").write_bytes(seed)
    try:
        import atheris
    except ImportError:
        _with_hypothesis(options.target, options.minutes)
        return
    with atheris.instrument_imports(include=["zconvert"]):
        from tests.fuzz.targets import TARGETS, mutated

    limits = [f"-max_total_time={round(60 * options.minutes)}", "-timeout=60", "-rss_limit_mb=2048"]
    # Seeds first: the corpus that is given first is the one written to.
    folders = [str(options.corpus), *([str(CORPUS / options.target)] if (CORPUS / options.target).is_dir() else [])]
    arguments = [sys.argv[0], *limits, f"-max_len={MAX_LENGTH}", "-print_final_stats=1", *folders]

    def mutator(data: bytes, max_size: int, seed: int) -> bytes:
        """Half of the inputs change as documents, half as bytes."""
        random = Random(seed)
        changed = mutated(options.target, data, random) if random.random() < 0.5 else data
        return changed[:max_size] if changed != data else atheris.Mutate(data, max_size)

    atheris.Setup(arguments, TARGETS[options.target], custom_mutator=mutator)
    atheris.Fuzz()


def _with_hypothesis(target: str, minutes: float) -> None:
    from hypothesis import HealthCheck, given, settings

    from tests.fuzz.targets import TARGETS, inputs

    end, runs = time.monotonic() + 60 * minutes, 0

    @settings(max_examples=1000, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(inputs(target))
    def some(data: bytes) -> None:
        TARGETS[target](data)

    while time.monotonic() < end:
        some()
        runs += 1000
    print(f"{runs} inputs, no fault")


if __name__ == "__main__":
    main()
