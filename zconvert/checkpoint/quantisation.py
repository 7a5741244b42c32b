"""Whether a checkpoint's weights are quantised, and how: read from `config.json` and the types of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zconvert.checkpoint.headers import DTYPE_BITS, Headers, TensorInfo

_FLOAT8_AND_LESS = tuple(dtype for dtype in DTYPE_BITS if dtype.startswith(("F8_", "F6_", "F4")))
_INTEGERS = ("I8", "U8", "I16", "U16", "I32", "U32")
_SMALL = frozenset((*_FLOAT8_AND_LESS, *_INTEGERS))
_PACKED = ("weight", "qweight", "weight_packed", "blocks", "W_q", "_data")
"""how the names of tensors end that hold packed weights, where their type is an integer"""
_BESIDE = (
    *("scales", "scale", "scale_inv", "qzeros", "zeros", "zero_point", "g_idx", "absmax", "quant_map", "SCB"),
    *("bitsandbytes__nf4", "bitsandbytes__fp4", "nested_absmax", "nested_quant_map", "weight_shape", "scale_2"),
)
"""how the names of tensors end that say how packed weights are to be read, and are no parameters"""

_NAMES = {
    **{"gptq": "GPTQ", "awq": "AWQ", "fp8": "FP8", "fbgemm_fp8": "FP8 (FBGEMM)", "mxfp4": "MXFP4", "nvfp4": "NVFP4"},
    **{"mxfp8": "MXFP8", "bitsandbytes": "bitsandbytes", "compressed-tensors": "compressed-tensors", "hqq": "HQQ"},
    **{"torchao": "torchao", "quanto": "quanto", "auto-round": "AutoRound", "modelopt": "ModelOpt"},
}
_BITS = {"fp8": 8, "fbgemm_fp8": 8, "mxfp8": 8, "mxfp4": 4, "nvfp4": 4}
_DEQUANTISERS = {"fp8": "FineGrainedFP8Config", "mxfp4": "Mxfp4Config"}
"""configurations of transformers that unpack weights while they are loaded"""
UNPACKED_AT_LOAD = ("mxfp4",)
"""methods whose weights are unpacked by loading alone, so that gated mode, which writes none, can take them"""


@dataclass(frozen=True)
class Quantisation:
    """How weights are packed.

    `method` is the name that `quantization_config` gives it, or `packed` where only the tensors tell; `bits` those of
    one parameter, where known; `tensors` how many are packed.
    """

    method: str
    bits: int | None
    tensors: int


def quantisation(config: dict[str, Any], headers: Headers) -> Quantisation | None:
    """How a checkpoint's weights are packed; None where they are plain numbers.

    Args:
        config: its `config.json`.
        headers: its tensors.
    """
    section = _section(config)
    packed = [t for t in headers.tensors.values() if is_packed(t)]
    if section is None:
        return Quantisation("packed", None, len(packed)) if packed else None
    method = str(section.get("quant_method") or section.get("quant_algo") or "unknown").lower()
    return Quantisation(method, _bits(method, section), len(packed))


def quantisation_problem(config: dict[str, Any], headers: Headers, *, gated: bool) -> str | None:
    """Why a checkpoint's quantisation keeps it from being converted, with what to do; None where it is not quantised.

    Args:
        config: its `config.json`.
        headers: its tensors.
        gated: the conversion writes none of the weights.

    Returns:
        one sentence.
    """
    found = quantisation(config, headers)
    if found is None or (gated and found.method in UNPACKED_AT_LOAD):
        return None
    if found.method == "packed":
        what = f"{found.tensors} of its tensors hold packed weights"
    else:
        bits = f" in {found.bits} bits" if found.bits else ""
        what = f"its weights are quantised by {_NAMES.get(found.method, found.method)}{bits}"
    advice = "convert the unquantised checkpoint that it was made from"
    if found.method in _DEQUANTISERS:
        unpack = f"quantization_config={_DEQUANTISERS[found.method]}(dequantize=True)"
        advice += f", or unpack it first: load it by transformers with {unpack} and save_pretrained in bfloat16"
    if found.method in UNPACKED_AT_LOAD:
        advice += ", or convert it with --mode gated, which leaves it packed"
    return f"{what}, and packed weights can be neither patched nor trained: {advice}"


def is_packed(tensor: TensorInfo) -> bool:
    """Whether a tensor holds packed weights: in a type too small to compute with, or as integers."""
    if tensor.dtype not in _SMALL or len(tensor.shape) < 2:
        return False
    last = tensor.name.rsplit(".", 1)[-1]
    if last.endswith(_BESIDE):
        return False
    return tensor.dtype in _FLOAT8_AND_LESS or (tensor.dtype in _INTEGERS and last.endswith(_PACKED))


def parameters_in(tensor: TensorInfo, quantised: Quantisation | None) -> int:
    """Parameters that a tensor holds: its items, or where these are packed what they unpack to."""
    if quantised is None:
        return tensor.items
    if is_packed(tensor):
        # Only integers hold several parameters; float types are items of their own.
        bits = quantised.bits if tensor.dtype in _INTEGERS and quantised.bits else DTYPE_BITS[tensor.dtype]
        return tensor.items * DTYPE_BITS[tensor.dtype] // bits
    return 0 if tensor.name.endswith(_BESIDE) else tensor.items


def _section(config: dict[str, Any]) -> dict[str, Any] | None:
    inner = config.get("text_config")
    for place in (config, inner if isinstance(inner, dict) else {}):
        for key in ("quantization_config", "compression_config"):
            if isinstance(place.get(key), dict):
                return place[key]
    return None


def _bits(method: str, section: dict[str, Any]) -> int | None:
    if section.get("load_in_4bit") or section.get("_load_in_4bit"):
        return 4
    if section.get("load_in_8bit") or section.get("_load_in_8bit"):
        return 8
    groups = section.get("config_groups")
    if isinstance(groups, dict):  # compressed-tensors
        weights = [group.get("weights") for group in groups.values() if isinstance(group, dict)]
        found = {entry.get("num_bits") for entry in weights if isinstance(entry, dict)}
        return found.pop() if len(found) == 1 and all(type(bits) is int for bits in found) else None
    bits = section.get("bits", section.get("nbits"))
    return bits if type(bits) is int and bits > 0 else _BITS.get(method)
