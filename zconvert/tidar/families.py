"""Which checkpoints can be converted, and what each needs: one table, read from `config.json` alone. No torch here.

Adding a family is a row in `FAMILIES` and a parameter in `tests/contracts/models.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ATTENTION_LAYERS = ("full_attention", "sliding_attention", "chunked_attention", "hybrid", "hybrid_sliding")


@dataclass(frozen=True)
class Family:
    """One row: how a family mixes its sequence and how the attention mask reaches its layers."""

    model_type: str
    mixing: Literal["attention", "cca"]
    """attention: masks say it all. cca: ZAYA's convolutions, which need predecessors (method.md, section 6)"""
    mask_route: Literal["single", "layer_type"]
    """single: one 4-D mask for all layers. layer_type: a dict keyed by layer type"""


FAMILIES = {
    row.model_type: row
    for row in (
        Family("zaya", mixing="cca", mask_route="layer_type"),
        Family("qwen3_moe", mixing="attention", mask_route="single"),
        Family("mixtral", mixing="attention", mask_route="single"),
    )
}

_RECURRENT = "a recurrent state runs over the whole row, so mask tokens would read every clean token"
REFUSED = {
    "nemotron_h": f"Mamba layers: {_RECURRENT}",
    "jamba": f"Mamba layers: {_RECURRENT}",
    "qwen3_next": f"delta-net layers: {_RECURRENT}",
    "qwen3_5_moe_text": f"delta-net layers: {_RECURRENT}",
    "kimi_linear": f"delta-net (KDA) layers: {_RECURRENT}",
    "bailing_hybrid": f"linear-attention layers: {_RECURRENT}",
    "qwen4_exp": f"delta-net layers: {_RECURRENT}",
    "minimax": f"lightning-attention layers: {_RECURRENT}",
    "minimax_m3_vl_text": "its block-sparse indexer is keyed by cache slot, which mask slots do not have",
    "deepseek_v4": "its compressed key-value cache mixes neighbouring tokens",
    "doge": "its router is not causal",
    "inkling2_text": "its dynamic convolutions read neighbours that the mask cannot hide",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint can be converted: its family's row, or the reason why not."""

    family: Family | None
    reason: str | None = None

    @property
    def supported(self) -> bool:
        """True where the conversion works."""
        return self.family is not None


def judge(config: dict[str, Any]) -> Verdict:
    """Judges a checkpoint by the contents of its `config.json`.

    >>> judge({"model_type": "mixtral"}).supported
    True
    >>> judge({"model_type": "mixtral", "layer_types": ["full_attention", "mamba"]}).reason
    'layers of type mamba: a recurrent state runs over the whole row, so mask tokens would read every clean token'
    """
    found = config.get("model_type")
    model_type = found if isinstance(found, str) else ""  # JSON may hold anything there
    if model_type in REFUSED:
        return Verdict(None, REFUSED[model_type])
    layer_types = config.get("layer_types") or []
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        return Verdict(None, f"its config.json has layer_types {layer_types!r}, expected a list of names")
    others = sorted(set(layer_types) - set(ATTENTION_LAYERS))
    if others:
        return Verdict(None, f"layers of type {', '.join(others)}: {_RECURRENT}")
    if model_type not in FAMILIES:
        known = ", ".join(sorted(FAMILIES))
        return Verdict(None, f"model_type {found!r} is not in the family table yet (it has {known})")
    return Verdict(FAMILIES[model_type])
