"""Before an export gets its name, or is published: does it do elsewhere what the checkpoint does here?

In an interpreter of its own, where zconvert cannot be imported (probe.py), the folder is loaded by transformers alone,
in float32 on the CPU: its autoregressive logits are the checkpoint's, and what it writes greedily by its own code is
what it writes token by token. Before that: the tokenizer, the ids and the rows of the embedding agree, and the card's
metadata can be read. Each weight file's sha256 is taken and compared while it is written (export.py).
"""

from __future__ import annotations

import gc
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zconvert.checkpoint import probe
from zconvert.checkpoint.folder import temporary_folder
from zconvert.checkpoint.headers import read_headers
from zconvert.checkpoint.json_patch import read_json
from zconvert.checkpoint.mask_token import choose_mask_token, read_vocabulary, tokenizer_patches
from zconvert.checkpoint.parity import PROBE_TEXT, probe_ids, too_large_to_run
from zconvert.checkpoint.plan import GENERATION_CONFIG
from zconvert.checkpoint.source import Source, read_config, require_converted
from zconvert.errors import UserError
from zconvert.tidar.settings import TidarSettings

_NEW_TOKENS = 16
_PROMPT_LENGTHS = (2, 12, 40)
_TOLERANCE = 1e-4
"""largest difference of logits, as a share of the largest: where weights lie in memory changes the rounding"""
_TIE = 1e-3
"""two tokens whose logits differ by less, as a share of the largest logit, may change places by rounding"""
_LISTED = 2000


def verify_export(checkpoint: Source, folder: Path, *, cast: bool, tell: Callable[[str], None]) -> dict[str, Any]:
    """Verifies an export.

    Args:
        checkpoint: what was exported.
        folder: what was written.
        cast: whether the weights were given another type, so that logits cannot be compared.
        tell: told what is going on.

    Returns:
        what was looked at, and found right: `positions` of which the logits were compared and their largest
        `difference`, `prompts` decoded both ways, `transformers` (its version), and `skipped`: why the model was not
        run, null where it was.

    Raises:
        UserError: something is not as it should be.
    """
    settings = require_converted(checkpoint)
    check_files(folder, settings)
    skipped = too_large_to_run(read_headers(folder).tensors)
    if skipped is not None:
        return {"positions": 0, "difference": None, "prompts": 0, "transformers": None, "skipped": skipped}
    tell("Verifying: the checkpoint's logits")
    from zconvert.checkpoint.load import load_model

    model, tokenizer = load_model(checkpoint, dtype="float32", device="cpu")
    text = tokenizer(PROBE_TEXT, add_special_tokens=False).input_ids
    ids = probe_ids(text, read_vocabulary(folder), settings.mask_token_id)
    expected, kind = _logits(model, ids), type(model).__name__
    model = None
    gc.collect()  # a model's parts refer to each other, and two of them may not fit
    tell("Verifying: the export on its own")
    answer, found = _run_outside(folder, kind, ids)
    difference = None if cast else _compare(expected, found)
    _check_texts(answer, scale=float(found.abs().max()))
    return {
        "positions": 0 if cast else len(ids),
        "difference": difference,
        "prompts": len(answer["plain"]),
        "transformers": answer["transformers"],
        "skipped": None,
    }


def check_files(folder: Path, settings: TidarSettings) -> None:
    """Checks what an export says of itself.

    Raises:
        UserError: tokenizer, ids and rows do not agree, or the card's metadata cannot be read.
    """
    headers, config = read_headers(folder), read_config(folder)
    wanted = None if settings.virtual else settings.mask_token_id
    mask = choose_mask_token(folder, headers, config, wanted, virtual=settings.virtual)
    suppressed = read_json(folder / GENERATION_CONFIG).get("suppress_tokens") or []
    checks = {
        "config.json has the checkpoint's settings": require_converted(Source(folder, folder.name)) == settings,
        "the mask token is the checkpoint's": (mask.id, mask.text) == (settings.mask_token_id, settings.mask_token),
        "the tokenizer's files agree": tokenizer_patches(folder, mask) == {},
        "the mask token is never sampled": settings.virtual or settings.mask_token_id in suppressed,
        "the card's metadata can be read": _has_metadata(folder / "README.md"),
    }
    wrong = [name for name, right in checks.items() if not right]
    if wrong:
        raise _not_right(f"not so: {'; '.join(wrong)}", "files that agree")


def _has_metadata(card: Path) -> bool:
    """Whether the Hub's client reads the card's metadata, and they say what people search by."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card.read_text(encoding="utf-8"), ignore_metadata_errors=False).data.to_dict()
    except ValueError:
        return False
    return data.get("library_name") == "transformers" and all(isinstance(tag, str) for tag in data.get("tags") or [0])


def _logits(model: Any, ids: list[int]) -> Any:
    import torch

    with torch.inference_mode():
        return model(torch.tensor([ids]), use_cache=False).logits[0].float().clone()


def _run_outside(folder: Path, kind: str, ids: list[int]) -> tuple[dict[str, Any], Any]:
    """The probe's answer, and the logits of the ids."""
    from safetensors.torch import load_file

    prompts = [ids[:length] for length in _PROMPT_LENGTHS]
    request = json.dumps({"ids": ids, "prompts": prompts, "max_new_tokens": _NEW_TOKENS})
    with temporary_folder("zconvert-") as work:
        logits = work / "logits.safetensors"
        # transformers keeps the code that it runs in a cache of its own: not in the user's.
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(work / "modules")}
        ran = subprocess.run(
            [sys.executable, "-P", probe.__file__, str(folder.absolute()), kind, str(logits)],
            input=request,
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        if ran.returncode != 0:
            raise _not_right(ran.stderr.strip()[-_LISTED:] or f"exit code {ran.returncode}", "a folder that loads")
        return json.loads(ran.stdout.splitlines()[-1]), load_file(logits)["logits"]


def _compare(expected: Any, found: Any) -> float:
    scale = max(1.0, float(expected.abs().max()))
    difference = float((expected - found).abs().max()) if expected.shape == found.shape else math.inf
    if not difference <= _TOLERANCE * scale:  # also where it is NaN
        raise _not_right(f"logits that differ by {difference:.3g}", f"the checkpoint's, to {_TOLERANCE * scale:.3g}")
    return difference


def _check_texts(answer: dict[str, Any], scale: float) -> None:
    if not str(answer["module"]).startswith("transformers_modules."):
        raise _not_right(f"generate of {answer['module']}", "the code in custom_generate/")
    for plain, tidar, gap in zip(answer["plain"], answer["tidar"], answer["gaps"], strict=True):
        if gap is not None and gap > _TIE * max(1.0, scale):
            raise _not_right(f"{tidar} by TiDAR, greedily", f"{plain}, as token by token")


def _not_right(found: str, expected: str) -> UserError:
    return UserError(
        "the export does not do what the checkpoint does",
        found=found,
        expected=expected,
        fix="report it, with the base model's name; --no-verify writes it all the same",
    )
