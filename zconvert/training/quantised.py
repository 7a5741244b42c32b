"""A frozen source in 8 or 4 bits: its large weights are packed in memory, and unpacked by whoever computes with them.

    weight (float32)  --bitsandbytes-->  packed bytes + scales  --at each use-->  float32, of one module at a time

Gated training moves no weight of the source, so nothing has to be quantised again, and gradients go through the
unpacked weights to what is trained. Linear layers and stacked experts are packed alike, by a parametrisation of the
parameter: the quantisers of transformers replace linear layers only, while most of a mixture-of-experts model is in
stacked experts, parameters of three dimensions. The files stay what they are.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from zconvert.errors import UserError

_KEPT = ("router", "indexer")
"""what stays exact, beside `gate`s, biases, embeddings and the head: the choice of experts and of keys"""


@dataclass(frozen=True)
class Packed:
    """What was packed, in numbers of weights and bytes; scales are counted."""

    weights: int
    bytes_before: int
    """of the packed weights, in float32"""
    bytes_after: int
    bytes_kept: int
    """of all others: embeddings, head, norms, routers"""

    def __str__(self) -> str:
        before, after = self.bytes_before + self.bytes_kept, self.bytes_after + self.bytes_kept
        return f"the frozen source takes {after / 1e6:,.1f} MB in place of {before / 1e6:,.1f} MB in float32"


def pack(model: Any, quantization: str, device: torch.device) -> Packed:
    """Packs the large weights of a model and moves it to its device, in place.

    Args:
        model: a transformers causal model, of any float type, whose weights nobody trains.
        quantization: 8bit (blockwise, dynamic code) or 4bit (NF4 with double quantisation).
        device: where weights are packed, one after the other, and where the model ends up; what is not packed becomes
            float32.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    count = before = after = 0
    for module, name in _places(model):
        weight = getattr(module, name)
        packed, unpack = _quantise(weight.detach().to(device, torch.float32), quantization)
        count, before = count + 1, before + 4 * weight.numel()
        after += packed.nbytes + unpack.nbytes
        setattr(module, name, nn.Parameter(packed, requires_grad=False))
        parametrize.register_parametrization(module, name, unpack, unsafe=True)
    model.to(device).float()
    kept = sum(p.nbytes for name, p in model.named_parameters() if ".parametrizations." not in name)
    return Packed(count, before, after, kept)


class _Unpack(nn.Module):
    """Packed bytes -> the weight, as often as it is asked for: nobody holds on to it."""

    def __init__(self, dequantise: Any, state: Any) -> None:
        super().__init__()
        self._dequantise, self._state = dequantise, state

    @torch.no_grad()
    def forward(self, packed: Tensor) -> Tensor:
        weight: Tensor = self._dequantise(packed, self._state)
        return weight

    @property
    def nbytes(self) -> int:
        """Of the scales, and of the scales of scales."""
        inner = self._state.state2
        return int(self._state.absmax.nbytes + (inner.absmax.nbytes if inner is not None else 0))


def _quantise(weight: Tensor, quantization: str) -> tuple[Tensor, _Unpack]:
    functional = _bitsandbytes()
    if quantization == "4bit":
        packed, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        return packed, _Unpack(functional.dequantize_4bit, state)
    packed, state = functional.quantize_blockwise(weight)
    return packed, _Unpack(functional.dequantize_blockwise, state)


def _bitsandbytes() -> Any:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on a CPU it misses kernels that are not needed here
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise UserError(
            "quantization needs bitsandbytes",
            found=str(error),
            expected="an installed bitsandbytes",
            fix="pip install 'zconvert[quantization]', or quantization: null",
        ) from error
    return bitsandbytes.functional


def _places(model: Any) -> Iterator[tuple[nn.Module, str]]:
    """(module, name of its parameter) of the matrices of linear layers and of stacked experts."""
    for module_name, module in list(model.named_modules()):
        parts = module_name.split(".")
        if "gate" in parts or any(word in part for part in parts for word in _KEPT):
            continue
        if module is model.get_output_embeddings() or isinstance(module, nn.Conv1d):
            continue
        for name, weight in list(module.named_parameters(recurse=False)):
            stacked = weight.ndim == 3 or ("experts" in parts and weight.ndim == 2)  # DBRX's lie one below the other
            if weight.is_floating_point() and "bias" not in name and (isinstance(module, nn.Linear) or stacked):
                yield module, name
