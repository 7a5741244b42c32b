"""Peak memory and time of the chunked losses against the plain one, each in a process of its own.

    python benchmarks/loss_memory.py                                  # T = 4096, vocabulary 262,272, width 64
    python benchmarks/loss_memory.py --tokens 8192 --width 2048 --chunk 512 --threads 2

Each process makes hidden states (T, width), a head (vocabulary, width) and labels, and runs loss and backward pass. Its
peak of resident memory is read before and after: the difference is what the loss took. Needs torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from types import SimpleNamespace

KINDS = ("plain", "fused", "checkpointed", "divergence")


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def measure(kind: str, args: argparse.Namespace) -> dict[str, float]:
    """Runs one loss in this process."""
    import torch
    import torch.nn.functional as F

    from zconvert.training.loss import cross_entropy_sum, divergence_sum

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    head = torch.nn.Linear(args.width, args.vocabulary, bias=False)
    model = SimpleNamespace(
        linear_head=None if kind == "checkpointed" else head,
        logits=head,
        finish_logits=lambda logits: logits,
        config=SimpleNamespace(vocab_size=args.vocabulary),
    )
    hidden = torch.randn(args.tokens, args.width, requires_grad=True)
    labels = torch.randint(args.vocabulary, (args.tokens,))
    cross_entropy_sum(model, hidden[:4], labels[:4], 4)[0].backward()  # what the first call brings along
    hidden.grad = head.weight.grad = None
    before, start = peak_mb(), time.perf_counter()
    if kind == "plain":
        loss = F.cross_entropy(head(hidden), labels, reduction="sum")
    elif kind == "divergence":
        starts = torch.zeros_like(labels, dtype=torch.bool)
        loss, _ = divergence_sum(model, hidden, hidden.detach().roll(1, 0), labels, starts, args.chunk)
    else:
        loss, _ = cross_entropy_sum(model, hidden, labels, args.chunk)
    loss.backward()
    seconds = time.perf_counter() - start
    return {"loss": loss.item() / args.tokens, "seconds": seconds, "before_mb": before, "peak_mb": peak_mb()}


def main() -> None:
    """Measures every kind, and prints a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096, help="T, scored tokens")
    parser.add_argument("--vocabulary", type=int, default=262_272, help="rows of the head")
    parser.add_argument("--width", type=int, default=64, help="hidden size")
    parser.add_argument("--chunk", type=int, help="tokens in a chunk; left out: the default")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--kind", choices=KINDS, help="only this one, here; prints JSON")
    args = parser.parse_args()
    if args.kind:
        print(json.dumps(measure(args.kind, args)))
        return
    print(f"T = {args.tokens}, vocabulary {args.vocabulary}, width {args.width}, chunk {args.chunk or 'default'}")
    print(f"logits alone: {args.tokens * args.vocabulary * 4 / 1e6:,.0f} MB in float32")
    for kind in KINDS:
        command = [sys.executable, *sys.argv, "--kind", kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout)
        took = found["peak_mb"] - found["before_mb"]
        print(
            f"{kind:13} {took:8,.0f} MB for the loss (process {found['peak_mb']:,.0f} MB), "
            f"{found['seconds']:6.1f} s, loss {found['loss']:.6f}"
        )


if __name__ == "__main__":
    main()
