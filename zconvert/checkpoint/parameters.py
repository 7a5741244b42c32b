"""Counting parameters by the shapes in headers: in total, and those that one token passes through."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from zconvert.checkpoint.anatomy import experts_of, layers_of
from zconvert.checkpoint.headers import Headers, TensorInfo
from zconvert.checkpoint.quantisation import parameters_in, quantisation
from zconvert.tidar.families import language_config

INPUT_EMBEDDINGS = (
    *("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight"),
    *("backbone.embeddings.weight", "llm.embed.weight"),
)
"""how the names of input embeddings end"""
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight", "unembed.weight", "=head.weight", "=output.weight")
"""how the names of output embeddings (heads) end; after = the whole name"""

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d{1,9})\.")
_STACKED = ("input_linear.weight", "output_linear.weight", "down_embed.weight", "up_embed.weight")
"""Granite's, JetMoE's and Doge's experts, one along the first axis, in no module called experts"""


def count_parameters(headers: Headers, config: dict[str, Any]) -> dict[str, int | None]:
    """Counts parameters by the shapes of the tensors; a tied head that is stored as well counts once.

    Returns:
        `total`; `active`, those a token passes through: total − routed experts + k of them, without layers for
        multi-token prediction, null where config.json does not tell k and E; `active_without_embeddings`, without the
        input embedding and the head. All are null where there are no tensors.
    """
    if not headers.tensors:
        return {"total": None, "active": None, "active_without_embeddings": None}
    quantised = quantisation(config, headers)
    tensors = {t.name: parameters_in(t, quantised) for t in headers.tensors.values()}
    embedding, head = find_tensor(headers, INPUT_EMBEDDINGS), find_tensor(headers, OUTPUT_EMBEDDINGS)
    if embedding and head and is_tied(headers, config):
        tensors[head.name] = 0
    total = sum(tensors.values())
    outer = sum(tensors[t.name] for t in (embedding, head) if t)
    inner = language_config(config)
    experts, ahead = experts_of(inner) or {}, _ahead(embedding, layers_of(inner))
    num, per_token = experts.get("num"), experts.get("per_token")
    routed: Counter[int] = Counter()  # parameters by the number of experts that share them
    plain = 0
    for t in headers.tensors.values():
        if ahead(t.name):
            continue
        if is_routed(t, num):
            routed[_sharing(t, num or 0)] += tensors[t.name]
        else:
            plain += tensors[t.name]
    active: int | None = None if routed else plain
    if routed and num and per_token:
        active = plain + sum(parameters * per_token // n for n, parameters in routed.items() if n)
    return {
        "total": total,
        "active": active,
        "active_without_embeddings": None if active is None else active - outer,
    }


def is_routed(tensor: TensorInfo, num_experts: int | None) -> bool:
    """Whether a tensor belongs to experts among which a router chooses.

    Args:
        tensor: the tensor.
        num_experts: experts a layer has; None where config.json does not say.
    """
    parts = tensor.name.split(".") if "experts" in tensor.name else []
    if "experts" in parts:
        # Some keep the router or its bias in the same module; those serve all tokens.
        after = parts[parts.index("experts") + 1 :]
        return after[0].isdecimal() or (len(tensor.shape) >= 2 and "router" not in after) if after else True
    return tensor.name.endswith(_STACKED) and len(tensor.shape) >= 2 and tensor.shape[0] == num_experts


def moe_layers(headers: Headers, config: dict[str, Any]) -> int:
    """How many layers have routed experts, without those for multi-token prediction."""
    inner = language_config(config)
    num = (experts_of(inner) or {}).get("num")
    ahead = _ahead(find_tensor(headers, INPUT_EMBEDDINGS), layers_of(inner))
    found: set[str] = set()
    for t in headers.tensors.values():
        match = _LAYER.search(t.name)
        if match and match[1] not in found and is_routed(t, num) and not ahead(t.name):
            found.add(match[1])
    return len(found)


def find_tensor(headers: Headers, endings: Iterable[str]) -> TensorInfo | None:
    """The first tensor whose name is one of these or ends in it after a dot; after = it must be the whole name."""
    for ending in endings:
        if ending.startswith("="):
            if ending[1:] in headers.tensors:
                return headers.tensors[ending[1:]]
            continue
        inside = f".{ending}"
        for name, tensor in headers.tensors.items():
            if name == ending or name.endswith(inside):
                return tensor
    return None


def is_tied(headers: Headers, config: dict[str, Any]) -> bool:
    """Whether the head is the input embedding: it is not stored, or config.json says so."""
    declared = config.get("tie_word_embeddings", language_config(config).get("tie_word_embeddings"))
    return find_tensor(headers, OUTPUT_EMBEDDINGS) is None or declared is True


def _sharing(tensor: TensorInfo, num: int) -> int:
    """How many experts a routed tensor is shared among, of which a token passes through k; 0: none ever reads it."""
    parts = tensor.name.split(".")
    index = parts[parts.index("experts") + 1] if parts[-1] != "experts" and "experts" in parts else ""
    if index.isdecimal():
        # LongCat's zero experts pass a token on; what a file holds for them is never read.
        return num if int(index) < num else 0
    first = tensor.shape[0] if tensor.shape else 0
    return num if num and first % num == 0 else first


def _ahead(embedding: TensorInfo | None, layers: int | None) -> Callable[[str], bool]:
    """Tells by its name whether a tensor is for multi-token prediction, which causal decoding leaves out.

    Such layers have a name of their own, or are numbered on after the model's.
    """
    stem = embedding.name.rsplit(".", 2)[0] + "." if embedding and embedding.name.count(".") > 1 else ""

    def ahead(name: str) -> bool:
        if name.startswith("mtp") or ".mtp" in name:
            return True
        match = _LAYER.match(name.removeprefix(stem)) if name.startswith(stem) else None
        return layers is not None and match is not None and int(match[1]) >= layers

    return ahead
