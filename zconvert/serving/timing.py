"""What is known of decoding a checkpoint here: what forwards take, and how drafts fare on texts. Kept beside it.

`tuning.json` holds the times of each machine that measured them, and some scored texts (hindsight.py), which hold for
all machines.
"""

from __future__ import annotations

import contextlib
import json
import math
import platform
import time
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

from zconvert import __version__
from zconvert.checkpoint.folder import TUNING_FILE, write_file
from zconvert.checkpoint.json_patch import read_json
from zconvert.errors import UserError
from zconvert.serving.hindsight import Outcome, Scored, replay
from zconvert.tidar.acceptance import Drafts, Sampling, make_drafts, verify
from zconvert.tidar.cache import TidarCache
from zconvert.tidar.decoding import DecodePlan
from zconvert.tidar.layout import decode_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import TidarSettings

CONTEXT = 256  # tokens in the cache of the forwards that are timed
_REPEATS = 5  # rounds; the least time counts, as other work only ever adds
_KEPT = 16  # scored texts
_LEAST = 1e-9  # seconds

OnProgress = Callable[[int, int], None]
"""told after each round: rounds done, rounds in all"""


@dataclass(frozen=True)
class Times:
    """Seconds of a forward by rows and tokens a row; between what was measured, straight lines."""

    machine: str
    """what it was measured on, and with which versions: times of anything else are of no use"""
    seconds: dict[int, dict[int, float]]
    """rows -> tokens -> seconds"""

    def of(self, rows: int, tokens: float) -> float:
        """Seconds of a forward of `rows` rows of `tokens` tokens each."""
        sizes = sorted(self.seconds)
        line = _between(sizes, [_between(*_columns(self.seconds[size]), tokens) for size in sizes], rows)
        return max(line, _LEAST)  # beyond what was measured it may have gone down


def measure(
    model: LayoutModel,
    settings: TidarSettings,
    max_batch: int,
    *,
    on_progress: OnProgress | None = None,
) -> Times:
    """Times forwards of 1 to `max_batch` rows and 1 to B + B² tokens, all in turn, so that noise hits all alike.

    Args:
        model: of the checkpoint.
        settings: its settings.
        max_batch: most rows; powers of two up to it are timed.
        on_progress: told after each round.
    """
    size = settings.block_size
    # A causal part and a number of blocks: (1, 0) is plain decoding; all else verifies and drafts.
    shapes = [(1, 0), (size, 0), (1, 1), *[(size, count) for count in _counts(size)]]
    batches = [rows for rows in (1, 2, 4, 8, 16, 32, 64, 128, 256) if rows < max_batch] + [max_batch]
    best: dict[int, dict[int, float]] = {rows: {} for rows in batches}
    for done in range(_REPEATS + 1):
        for rows in batches:
            cache = TidarCache(rows)
            _forward(model, settings, cache, (CONTEXT, 0))
            # Texts of a batch are of unlike lengths, which costs more than like ones.
            cache.commit([CONTEXT - row for row in range(rows)] if rows <= CONTEXT else CONTEXT)
            for causal, blocks in shapes:
                started = time.perf_counter()
                _forward(model, settings, cache, (causal, blocks))
                if done:  # the first round warms up
                    took, tokens = time.perf_counter() - started, causal + size * blocks
                    best[rows][tokens] = min(took, best[rows].get(tokens, took))
        if on_progress is not None:
            on_progress(done + 1, _REPEATS + 1)
    return Times(machine_of(model), best)


@torch.inference_mode()
def _forward(model: LayoutModel, settings: TidarSettings, cache: TidarCache, shape: tuple[int, int]) -> None:
    """A step as the engine does it: a forward, its drafts verified, new ones made; ends on the CPU."""
    causal, blocks = shape
    lengths, rows = cache.lengths, len(cache.lengths)
    layout = decode_layout(lengths, causal, tuple(range(1, blocks + 1)), settings.block_size, model.device)
    ids = torch.arange(layout.num_tokens, device=model.device) % max(1, settings.mask_token_id)
    hidden = model.hidden_states(ids.expand(rows, -1), layout, cache)
    if causal == CONTEXT:
        return
    counts = torch.full((rows,), causal - 1, device=model.device)
    drafted = Drafts(ids[1:causal].expand(rows, -1), counts) if causal > 1 else None
    _, following = verify(model.logits(hidden[:, :causal]), drafted, Sampling(), None)
    told = following.tolist()
    if blocks:
        slots = model.logits(hidden[:, causal + 1 : causal + settings.block_size])
        previous = torch.tensor(told, device=model.device)
        make_drafts(slots, counts, Sampling(), None, model.bigrams, previous).tokens.tolist()


@dataclass
class Known:
    """What is known of decoding a checkpoint on this machine."""

    times: Times
    texts: list[Scored] = field(default_factory=list)
    """the latest that were scored"""
    file: Path | None = None
    """where it is kept; None: nowhere"""
    _replayed: dict[DecodePlan, Outcome] = field(default_factory=dict, init=False, repr=False, compare=False)

    def replayed(self, plan: DecodePlan) -> Outcome:
        """What a plan makes of these texts."""
        if plan not in self._replayed:
            self._replayed[plan] = replay(self.texts, plan)
        return self._replayed[plan]

    def add(self, text: Scored) -> None:
        """Takes in a text, in place of the oldest one if there are enough."""
        self.texts = [*self.texts, text][-_KEPT:]
        self._replayed.clear()
        self.save()

    def save(self) -> None:
        """Writes the file, if it can be written: other machines' times stay in it."""
        if self.file is None:
            return
        document = _read(self.file)
        forwards = {**document["forwards"], self.times.machine: self.times.seconds}
        told = {"forwards": forwards, "block_size": _width(self.texts), "texts": [text.runs for text in self.texts]}
        with contextlib.suppress(UserError):  # somebody else's folder: then all is found out each time
            write_file(self.file, json.dumps(told) + "\n")


def known_of(
    model: LayoutModel,
    settings: TidarSettings,
    max_batch: int,
    folder: Path | None,
    *,
    on_progress: OnProgress | None = None,
) -> Known:
    """What the checkpoint's folder tells; forwards are timed now, and that left there, if they never were.

    Args:
        model: of the checkpoint.
        settings: its settings.
        max_batch: most rows.
        folder: of the checkpoint; None, or a folder that cannot be written: they are measured each time.
        on_progress: of the measurement.
    """
    file = None if folder is None else folder / TUNING_FILE
    kept = _read(file)
    texts = [Scored(runs) for runs in kept["texts"]] if kept["block_size"] == settings.block_size else []
    machine = machine_of(model)
    seconds = kept["forwards"].get(machine, {})
    if seconds and max(seconds) >= max_batch:
        return Known(Times(machine, seconds), texts, file)
    known = Known(measure(model, settings, max_batch, on_progress=on_progress), texts, file)
    known.save()
    return known


def _read(file: Path | None) -> dict[str, Any]:
    """The file's parts, all of them empty where it is missing, broken or not ours."""
    empty: dict[str, Any] = {"forwards": {}, "block_size": 0, "texts": []}
    if file is None:
        return empty
    try:
        document = read_json(file)
        forwards = {
            str(machine): {int(rows): {int(n): float(s) for n, s in row.items()} for rows, row in table.items()}
            for machine, table in document["forwards"].items()
        }
        width = int(document["block_size"])
        texts = [[[int(run) for run in runs] for runs in text] for text in document["texts"]]
    except (UserError, ValueError, OverflowError, AttributeError, KeyError, TypeError):
        return empty
    if not all(map(_are_times, forwards.values())):
        return empty
    # A run that reached past its block or its text would lead a replay astray.
    sound = all(
        len(runs) == width and all(0 <= run < min(width - slot, len(text) - at) for slot, run in enumerate(runs) if run)
        for text in texts
        for at, runs in enumerate(text)
    )
    return {"forwards": forwards, "block_size": width, "texts": texts} if sound else {**empty, "forwards": forwards}


def _are_times(table: dict[int, dict[int, float]]) -> bool:
    return all(row and rows > 0 and all(0 < s < math.inf for s in row.values()) for rows, row in table.items())


def _width(texts: Sequence[Scored]) -> int:
    return len(texts[0].runs[0]) if texts else 0


def machine_of(model: LayoutModel) -> str:
    """The device, and whatever else decides what a forward takes."""
    device = model.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    dtype = str(model.model.dtype).removeprefix("torch.")
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, zconvert {__version__}"
    return f"{device.type} {name}, {torch.get_num_threads()} threads, {dtype}, {versions}"


def _counts(size: int) -> list[int]:
    """Numbers of blocks that are timed: 1, 2, 3, 4, 6, 8, 12 … B."""
    return [count for count in (1, 2, 3, 4, 6, 8, 12) if count < size] + [size]


def _columns(row: dict[int, float]) -> tuple[list[int], list[float]]:
    ordered = sorted(row)
    return ordered, [row[key] for key in ordered]


def _between(places: Sequence[int], values: Sequence[float], at: float) -> float:
    """Straight lines between points, and beyond the last two."""
    if len(places) == 1:
        return values[0]
    right = min(max(bisect_left(places, at), 1), len(places) - 1)
    left = right - 1
    share = (at - places[left]) / (places[right] - places[left])
    return values[left] + share * (values[right] - values[left])
