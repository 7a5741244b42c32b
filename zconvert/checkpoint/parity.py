"""Parity after a conversion: the source and the new folder compute the same logits. Needs torch, and the memory."""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from zconvert.checkpoint.headers import TensorInfo
from zconvert.checkpoint.mask_token import Vocabulary
from zconvert.checkpoint.plan import Plan
from zconvert.checkpoint.source import Source
from zconvert.errors import UserError

if TYPE_CHECKING:
    import torch

AUTO_LOGITS_BYTES = 4_000_000_000
"""auto compares logits up to this size of the weights in float32, and to a quarter of the free memory"""
PROBE_TEXT = "The quick brown fox jumps over the lazy dog, and 7 wise men count 1,234,567 stars."
_PROBE_IDS = 32
_TOLERANCE = {"float32": 1e-4, "auto": 2e-2}
"""largest difference of logits, as a share of the largest logit: where weights lie in memory changes the rounding"""


Tensors = Mapping[str, TensorInfo]


class NotComparable(Exception):
    """The source itself cannot be loaded, which is no fault of the conversion."""

    def __init__(self, reason: UserError) -> None:
        super().__init__(f"{reason.what}: {reason.found}")
        self.reason = reason


def compare_logits(plan: Plan, folder: Path) -> tuple[int, float]:
    """Runs the source and the conversion on a probe text, one after the other.

    Returns:
        positions compared, and the largest difference of a logit.

    Raises:
        UserError: they differ, in tokens or in logits by more than rounding.
    """
    import torch

    from zconvert.checkpoint.load import load_model

    free = free_memory()
    dtype = "float32" if free is None or weights_in_memory(plan.tensors, "float32") <= free else "auto"

    def run(source: Source, ids: list[int]) -> tuple[list[int], list[int], torch.Tensor]:
        """The probe text's tokens, the ids the model was run on, and its logits."""
        gc.collect()  # a model's parts refer to each other, and two of them may not fit
        try:
            model, tokenizer = load_model(source, dtype=dtype, device="cpu")
            text = tokenizer(PROBE_TEXT, add_special_tokens=False).input_ids
            ids = ids or probe_ids(text, plan.rows.vocabulary, plan.mask.id)
            with torch.inference_mode():
                logits = model(torch.tensor([ids]), use_cache=False).logits
        except (RuntimeError, MemoryError) as error:  # of torch: no memory, an operation that is missing here
            fix = "--verify bytes leaves out what has to run"
            raise UserError(f"{source.name} does not run here", found=error, fix=fix) from error
        logits = logits[0, :, : plan.rows.before].float().clone()
        logits[:, plan.mask.id : plan.mask.id + 1] = 0  # the one column that the conversion changes
        return text, ids, logits

    try:
        text, ids, before = run(plan.source, [])
    except UserError as error:
        raise NotComparable(error) from error
    text_after, _, after = run(Source(folder, plan.source.name), ids)
    # An entry that became a special token is cut out of texts from now on.
    if text != text_after and plan.mask.text not in PROBE_TEXT:
        raise UserError(
            "the converted tokenizer is not the source's",
            found=f"tokens {text_after[:8]} … for the probe text",
            expected=f"{text[:8]} …",
            fix="report it, with the source's name",
        )
    difference, scale = float((before - after).abs().max()), max(1.0, float(before.abs().max()))
    if not difference <= _TOLERANCE[dtype] * scale:  # also where it is NaN
        raise UserError(
            "the conversion does not compute the source's logits",
            found=f"a difference of {difference:.3g}, logits up to {scale:.3g}, on {len(ids)} tokens",
            expected=f"at most {_TOLERANCE[dtype] * scale:.3g}",
            fix="report it, with the source's name; --verify bytes leaves the logits out",
        )
    return len(ids), difference


def free_memory() -> int | None:
    """Bytes of memory that can be had without swapping; None where the system does not tell."""
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return None


def weights_in_memory(tensors: Tensors, dtype: str) -> int:
    """Bytes of a model's weights in memory."""
    return sum(t.items * 4 if dtype == "float32" else t.bytes for t in tensors.values())


def too_large_to_run(tensors: Tensors) -> str | None:
    """Why a model is not run to be verified, where nobody insists; None: it is."""
    needed, free = weights_in_memory(tensors, "float32"), free_memory()
    if needed > AUTO_LOGITS_BYTES:
        return f"the model is large: {needed / 1e9:.3g} GB in float32"
    if free is None or needed > free / 4:
        return f"the model needs {needed / 1e9:.3g} GB in float32, which is much of the free memory"
    return None


def probe_ids(text: list[int], vocabulary: Vocabulary, mask_token_id: int) -> list[int]:
    """The text's tokens, then some from all over the vocabulary, so that any tokenizer yields a probe."""
    ids = sorted(set(vocabulary.texts) - {mask_token_id})
    return [i for i in text if i != mask_token_id] + ids[:: max(1, len(ids) // _PROBE_IDS)][:_PROBE_IDS]
