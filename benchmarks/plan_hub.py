"""How long `zconvert plan` takes for a checkpoint on a Hub of which only the headers travel.

    python -m benchmarks.plan_hub --shards 120 --family mimo_v2_flash

The Hub is a server on this machine's loopback, whose answers are held up by `--latency-ms` each; the checkpoint has the
names and shapes of the family's default config, and takes no room. Each round is a fresh process with an empty cache.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.checkpoint.loopback_hub import LoopbackHub, _Handler, serve
from tests.checkpoint.sparse import meta_shapes, one_by_one, write_sparse


def main() -> None:
    """Makes the checkpoint, and prints a line for each round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", default="mimo_v2_flash", help="one whose shapes plan takes from headers")
    parser.add_argument("--shards", type=int, default=120)
    parser.add_argument("--latency-ms", type=float, default=0.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    hold_up(args.latency_ms / 1e3)
    with tempfile.TemporaryDirectory() as folder:
        shapes, config = meta_shapes(args.family)
        tensors = dict(one_by_one(shapes))
        checkpoint = write_sparse(Path(folder, "checkpoint"), tensors, config, shards=args.shards)
        print(f"{args.family}: {len(tensors):,} tensors in {args.shards} shards")
        with serve(LoopbackHub({"org/model": checkpoint})) as hub:
            for number in range(args.rounds):
                environment = {**os.environ, **hub.environment(Path(folder, f"home-{number}"))}
                started, before = time.perf_counter(), used()
                command = [sys.executable, "-m", "zconvert", "plan", "org/model", "--json"]
                subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
                print(f"{time.perf_counter() - started:.2f} s, {used() - before:.2f} s of them on the processor")


def hold_up(seconds: float) -> None:
    """Has the server wait before each answer."""
    stock = _Handler._answer

    def late(self: Any, *arguments: Any) -> None:
        time.sleep(seconds)
        stock(self, *arguments)

    _Handler._answer = late  # type: ignore[method-assign]


def used() -> float:
    """Processor time of the processes that have ended, seconds."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


if __name__ == "__main__":
    main()
