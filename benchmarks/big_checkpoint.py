"""convert-init and inspect at real size: makes a checkpoint of ZAYA1-8B's shapes with random weights, and measures.

    python benchmarks/big_checkpoint.py make FOLDER/zaya               # 17.7 GB in 4 shards of at most 5 GB
    python benchmarks/big_checkpoint.py make FOLDER/many --shard-mb 250  # the same in more than 64 shards
    python benchmarks/big_checkpoint.py make FOLDER/wide --more-shards 64  # 64 shards more, the edited one as large
    python benchmarks/big_checkpoint.py measure FOLDER/zaya             # needs room for one more shard, twice

Shapes and configuration are those of transformers' default `ZayaConfig`; no model is built. The tokenizer is a BPE of
262,145 entries, with `<mask>` at id 4, as large on disk as the real one. `measure` compares `convert-init` with
`cp --reflink=never` of the shard that it edits, alternating in one run, and checks that the source is untouched.
docs/benchmarks.md has the figures.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from zconvert.checkpoint.headers import INDEX_FILE, TensorInfo, read_headers
from zconvert.checkpoint.mask_token import embedding_tensor
from zconvert.checkpoint.source import read_config
from zconvert.checkpoint.weights import write_shard

TOKENS = 262_145
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_CHUNK = 16 * 1024 * 1024
_PAUSE_S = 6


def make(folder: Path, shard_bytes: int, more_shards: int = 0) -> None:
    """Writes the checkpoint; the same bytes each time. `more_shards` of 17 MB stand for those of a larger model."""
    folder.mkdir(parents=True)
    shards = _shards(_tensors(), shard_bytes)
    shards += [[TensorInfo(f"model.more.{n}.weight", "BF16", (4096, 2048), "", 0, 0)] for n in range(more_shards)]
    names = [f"model-{n:05}-of-{len(shards):05}.safetensors" for n in range(1, len(shards) + 1)]
    random_bytes = np.random.Generator(np.random.SFC64(0))
    for name, tensors in zip(names, shards, strict=True):
        named = {t.name: t for t in tensors}
        write_shard(
            folder / name, tensors, {"format": "pt"}, lambda tensor, named=named: _values(named[tensor], random_bytes)
        )
        print(f"{name}  {(folder / name).stat().st_size / 1e9:.2f} GB", file=sys.stderr)
    weight_map = {t.name: name for name, tensors in zip(names, shards, strict=True) for t in tensors}
    total = sum(_size(t) for tensors in shards for t in tensors)
    _write(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    _write_tokenizer(folder)


def measure(folder: Path, work: Path, runs: int, cold: bool) -> dict[str, Any]:
    """Times of a plain copy, of convert-init and of inspect, with their peak memory."""
    headers = read_headers(folder)
    shard = folder / embedding_tensor(headers, read_config(folder)).shard
    before = _hashes(folder)
    work.mkdir(parents=True, exist_ok=True)
    copies, durable, conversions, inspections = [], [], [], []
    zconvert = [sys.executable, "-m", "zconvert"]
    _forget([folder / other.name for other in headers.shards])  # all the memory is the page cache's otherwise
    shards = [folder / other.name for other in headers.shards] if cold else []
    for run in range(runs + 1):
        copied, out = work / "copied" / shard.name, work / "converted"
        copied.parent.mkdir()
        _settle(shards)
        started = time.perf_counter()
        subprocess.run(["cp", "--reflink=never", str(shard), str(copied)], check=True)
        copy_time = time.perf_counter() - started
        _flush(copied)
        durable_time = time.perf_counter() - started
        shutil.rmtree(copied.parent)
        _settle(shards)
        *conversion, report = _run([*zconvert, "convert-init", str(folder), "--out", str(out), "--json"])
        shutil.rmtree(out)
        *inspection, _ = _run([*zconvert, "inspect", str(folder), "--json"])
        if run:  # the first round takes what only a first round costs, such as new blocks on the disk
            copies.append(copy_time)
            durable.append(durable_time)
            conversions.append(conversion)
            inspections.append(inspection)
    copy_time = statistics.median(copies)
    seconds = statistics.median(s for s, _ in conversions)
    return {
        "shards": len(headers.shards),
        "bytes": sum(s.bytes for s in headers.shards),
        "edited_shard_bytes": shard.stat().st_size,
        "cache": "cold" if cold else "warm",
        "copy_s": _rounded(copies),
        "copy_and_fsync_s": _rounded(durable),
        "convert_init_s": _rounded([s for s, _ in conversions]),
        "ratio_of_medians": round(seconds / copy_time, 2),
        "ratio_to_copy_and_fsync": round(seconds / statistics.median(durable), 2),
        "convert_init_peak_mb": round(max(m for _, m in conversions) / 1e6),
        "inspect_s": _rounded([s for s, _ in inspections]),
        "inspect_peak_mb": round(max(m for _, m in inspections) / 1e6),
        "source_untouched": _hashes(folder) == before,
        "verified": report["verified"],
    }


def _tensors() -> list[TensorInfo]:
    """Names, shapes and types as ZAYA1-8B has them on disk; written beside them: the configuration."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("zaya"))
    kept_wide = ("balancing_biases",)
    return [
        TensorInfo(name, "F32" if name.endswith(kept_wide) else "BF16", tuple(tensor.shape), "", 0, 0)
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"  # tied
    ]


def _shards(tensors: list[TensorInfo], most: int) -> list[list[TensorInfo]]:
    """As transformers does: in order, a new shard where the next tensor does not fit any more."""
    shards: list[list[TensorInfo]] = [[]]
    used = 0
    for t in tensors:
        if shards[-1] and used + _size(t) > most:
            shards.append([])
            used = 0
        shards[-1].append(t)
        used += _size(t)
    return shards


def _values(tensor: TensorInfo, random_bytes: np.random.Generator) -> Iterator[bytes]:
    """Random numbers between -2 and 2: random bytes but for the highest bit of the exponent, so that none is NaN."""
    left, highest = _size(tensor), {"BF16": 0xBFFFBFFFBFFFBFFF, "F32": 0xBFFFFFFFBFFFFFFF}[tensor.dtype]
    while left > 0:
        count = min(left, _CHUNK)
        words = random_bytes.integers(0, 2**64, size=-(-count // 8), dtype=np.uint64)
        yield (words & np.uint64(highest)).tobytes()[:count]
        left -= count


def _size(tensor: TensorInfo) -> int:
    return tensor.items * (4 if tensor.dtype == "F32" else 2)


def _write_tokenizer(folder: Path) -> None:
    """A BPE with two merges for most entries, as in Gemma's tokenizer, and the small files beside it."""
    from transformers import AutoConfig

    letters = [chr(c) for c in range(33, 127)]
    entries = {text: place for place, text in enumerate([*SPECIAL_TOKENS, *letters])}
    drawn, merges = random.Random(0), []
    texts = letters[:]
    while len(entries) < TOKENS:
        text = drawn.choice(texts[-50_000:]) + drawn.choice(letters)
        if text not in entries:
            entries[text] = len(entries)
            texts.append(text)
            merges += [[text[:cut], text[cut:]] for cut in {1, len(text) - 1} if text[:cut] in entries]
    added = [
        {"id": place, "content": text, "special": True}
        | dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        for place, text in enumerate(SPECIAL_TOKENS)
    ]
    model = {"type": "BPE", "unk_token": "<unk>", "vocab": entries, "merges": merges}
    _write(folder / "tokenizer.json", {"version": "1.0", "added_tokens": added, "model": model})
    roles = {"pad_token": "<pad>", "eos_token": "<eos>", "bos_token": "<bos>", "mask_token": "<mask>"}
    _write(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast", **roles})
    config = AutoConfig.for_model("zaya").to_dict() | {"architectures": ["ZayaForCausalLM"], "dtype": "bfloat16"}
    _write(folder / "config.json", config)
    _write(folder / "generation_config.json", {"bos_token_id": 2, "eos_token_id": 106, "pad_token_id": 0})


def _write(path: Path, document: Any) -> None:
    path.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


def _run(command: Sequence[str]) -> tuple[float, int, Any]:
    """Seconds and peak memory (resident, bytes) of a command, and the JSON document that it printed."""
    with tempfile.TemporaryFile() as output:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise SystemExit(f"{' '.join(command)} failed")
        output.seek(0)
        return seconds, usage.ru_maxrss * 1024, json.load(output)


def _settle(cold: Sequence[Path]) -> None:
    """Nothing is left to write, and these files are not in the page cache any more.

    Then a pause: a virtual machine gives freed memory back after a while, and whoever writes next pays for having it
    again. Without the pause that is by chance one of the two that are compared, and it can double the time.
    """
    os.sync()
    _forget(cold)
    time.sleep(_PAUSE_S)


def _forget(paths: Sequence[Path]) -> None:
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _hashes(folder: Path) -> dict[str, str]:
    def digest(path: Path) -> str:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "blake2b").hexdigest()

    paths = sorted(folder.iterdir())
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return dict(zip((p.name for p in paths), pool.map(digest, paths), strict=True))


def _rounded(values: Sequence[float]) -> list[float]:
    return [round(value, 2) for value in values]


def main() -> None:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make", help="write the checkpoint")
    making.add_argument("folder", type=Path)
    making.add_argument("--shard-mb", type=int, default=5000, help="most of a shard, in MB (default: 5000)")
    measuring = commands.add_parser("measure", help="measure convert-init and inspect on it; prints JSON")
    making.add_argument("--more-shards", type=int, default=0, help="so many small shards besides (default: none)")
    measuring.add_argument("folder", type=Path)
    measuring.add_argument("--work", type=Path, help="folder to write to (default: beside the checkpoint)")
    measuring.add_argument("--runs", type=int, default=5, help="rounds that count (default: 5)")
    measuring.add_argument("--cold", action="store_true", help="the weights leave the page cache before each round")
    arguments = parser.parse_args()
    if arguments.command == "make":
        make(arguments.folder, arguments.shard_mb * 1_000_000, arguments.more_shards)
        return
    work = arguments.work or arguments.folder.parent / "work"
    with contextlib.ExitStack() as stack:
        stack.callback(shutil.rmtree, work, ignore_errors=True)
        print(json.dumps(measure(arguments.folder, work, arguments.runs, arguments.cold), indent=2))


if __name__ == "__main__":
    main()
