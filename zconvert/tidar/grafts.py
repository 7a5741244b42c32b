"""Layers of transformers that mix tokens past the attention mask, made to follow the layout, in place.

A grafted layer keeps its weights and their names; without a layout's arguments it is the stock layer.
"""

from __future__ import annotations

from typing import Any

from .families import Family
from .positions import InklingAttention, Llama4Attention
from .short_conv import InklingConv, Lfm2Conv
from .sinks import graft_sinks
from .swap import put_before

_BEFORE = {
    "Lfm2ShortConv": Lfm2Conv,
    "Lfm2MoeShortConv": Lfm2Conv,
    "InklingShortConvolution": InklingConv,
    "InklingAttention": InklingAttention,
    "Llama4TextAttention": Llama4Attention,
}
"""stock class -> the class that goes before it"""


def graft(model: Any, family: Family) -> None:
    """Grafts what a family needs; twice is once.

    Args:
        model: a `…ForCausalLM` of transformers.
        family: its row.
    """
    if family.mixing == "cca":
        from .cca import graft_cca

        graft_cca(model)
    if family.sinks:
        graft_sinks(model)
    for module in model.modules():
        before = _BEFORE.get(type(module).__name__)
        if before is not None and not isinstance(module, before):
            put_before(module, before, "Layout")
