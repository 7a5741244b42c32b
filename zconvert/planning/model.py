"""What the planner needs to know of a model: parameters by kind, and sizes that memory and time follow from.

Counted from the shapes of its tensors, whether headers or config.json (from_config.py) gave them.
"""

from __future__ import annotations

import math
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from zconvert.checkpoint.anatomy import attention_of, cache_of, experts_of, layers_of, whole
from zconvert.checkpoint.headers import Headers, TensorInfo
from zconvert.checkpoint.parameters import (
    INPUT_EMBEDDINGS,
    count_parameters,
    find_tensor,
    is_routed,
    is_tied,
    moe_layers,
)
from zconvert.checkpoint.quantisation import parameters_in, quantisation
from zconvert.errors import UserError
from zconvert.planning.from_config import Shapes, shapes_from_config
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import MIXERS, NOT_UPDATED, GatedParts

_LAYER = re.compile(r"(?:^|\.)(?:layers|blocks|h)\.(\d{1,9})\.([^.]+)\.(.+)$")
_TOWERS = re.compile(r"vision|audio|image|visual")


@dataclass(frozen=True)
class Cache:
    """Keys and values of some layers: `width` numbers a token and layer, of the last `window` tokens (None: all)."""

    layers: int
    window: int | None
    width: int

    def tokens(self, context: int) -> int:
        """Tokens kept of a context."""
        return context if self.window is None else min(self.window, context)


@dataclass(frozen=True)
class ModelFacts:
    """Sizes of a model; parameters are counts, widths are numbers a token."""

    name: str
    model_type: str
    total: int
    """all parameters, a tied head once"""
    active: int
    """those that a token passes through"""
    layers: int
    moe_layers: int
    hidden: int
    vocabulary: int
    tied: bool
    experts: int
    """routed experts of a layer; 0: dense"""
    experts_per_token: int
    expert_parameters: int
    """of one routed expert of one layer"""
    shared_parameters: int
    """of all layers, without routed experts, embedding and head: what every token passes through"""
    largest_layer: int
    """parameters of the largest layer"""
    attention_kind: str
    queries: int
    """heads × their width"""
    keys: int
    """key-value heads × their width"""
    score_width: int
    """numbers that a token's queries multiply for each token of the context: queries · keys and weights · values"""
    qk_norm: bool
    carried: int
    """numbers a token that layers hand on beside the hidden states (ZAYA's routers)"""
    caches: tuple[Cache, ...]
    stored_bytes: int
    """of the weights as they are stored"""
    projections: tuple[tuple[int, int], ...]
    """(inputs, outputs) of the projections that mix tokens, of all layers: those that gated mode updates"""
    mlp_layers: int
    """layers with an MLP or experts"""
    hidden_norms: int

    @property
    def head_parameters(self) -> int:
        """Of the output head; the embedding has as many."""
        return self.vocabulary * self.hidden

    @property
    def mlp_width(self) -> int:
        """Hidden units of MLPs and experts that a token passes through in a layer, on average."""
        # A gated MLP has three matrices of hidden × width.
        routed = self.moe_layers * self.experts_per_token * self.expert_parameters
        attention = sum(inputs * outputs for inputs, outputs in self.projections)
        return round(max(0, self.shared_parameters - attention + routed) / max(1, self.layers) / (3 * self.hidden))

    @property
    def kv_width(self) -> int:
        """Numbers of keys and values a token, of all layers, windows not counted."""
        return sum(cache.layers * cache.width for cache in self.caches)

    def cache_numbers(self, context: int) -> int:
        """Numbers that the cache of one sequence of `context` tokens holds."""
        return sum(cache.layers * cache.width * cache.tokens(context) for cache in self.caches)

    def gated_parameters(self, parts: GatedParts) -> int:
        """Of the weights that act at mask slots only (tidar/gated.py)."""
        count = parts.rank * sum(inputs + outputs for inputs, outputs in self.projections)
        if parts.mlp != "none":
            count += self.mlp_layers * 3 * self.hidden * parts.mlp_width
        count += 2 * self.hidden * self.hidden_norms * parts.norms
        count += self.hidden * self.moe_layers * parts.router
        return count + self.hidden * parts.mask_embedding


def facts_from_config(config: dict[str, Any], name: str) -> ModelFacts:
    """Facts from `config.json` alone.

    Raises:
        UserError: the family's shapes do not follow from its config, or a size is missing.
    """
    shapes: Shapes = shapes_from_config(config)
    bits = 16 if config.get("torch_dtype", config.get("dtype")) != "float32" else 32
    tensors, start = {}, 0
    for tensor, shape in shapes.items():
        size = math.prod(shape) * bits // 8
        tensors[tensor] = TensorInfo(tensor, "BF16" if bits == 16 else "F32", shape, "", start, start + size)
        start += size
    return facts_from_headers(Headers(tensors, ()), config, name)


def facts_from_headers(headers: Headers, config: dict[str, Any], name: str) -> ModelFacts:
    """Facts from the headers of a checkpoint's files.

    Args:
        headers: its tensors.
        config: its `config.json`.
        name: to show.

    Raises:
        UserError: sizes are missing.
    """
    inner, packed = language_config(config), quantisation(config, headers)
    counts = count_parameters(headers, config)
    layers, attention = layers_of(inner), attention_of(inner)
    embedding = find_tensor(headers, INPUT_EMBEDDINGS)
    if embedding is None or not layers or not counts["total"] or counts["active"] is None:
        missing = "an input embedding" if embedding is None else "num_hidden_layers" if not layers else "experts"
        raise UserError(
            f"{name}: the model's sizes cannot be told",
            found=f"nothing says {missing}",
            expected="config.json and all weight files of a language model",
            fix="`zconvert inspect` shows what is missing",
        )
    rows, hidden = embedding.shape[0], embedding.shape[-1]
    experts = experts_of(inner) or {}
    sparse = moe_layers(headers, config)
    routed = shared = 0
    by_layer: defaultdict[int, int] = defaultdict(int)
    projections: list[tuple[int, int]] = []
    norms, mlps, sides = 0, set(), Counter[str]()
    for tensor in headers.tensors.values():
        match = _LAYER.search(tensor.name)
        if match is None or int(match[1]) >= layers or _TOWERS.search(tensor.name):
            norms += match is None and _is_norm(tensor, hidden)
            continue
        size, number, child = parameters_in(tensor, packed), int(match[1]), match[2]
        by_layer[number] += size
        last = tensor.name.split(".")
        if is_routed(tensor, experts.get("num")):
            routed += size
            mlps.add(number)
            continue
        shared += size
        mixes = any(word in child for word in MIXERS)
        if len(tensor.shape) == 2 and last[-1] == "weight":
            if mixes and not any(word in tensor.name.split(f".{number}.", 1)[1] for word in NOT_UPDATED):
                projections.append((tensor.shape[1], tensor.shape[0]))
            elif not mixes:
                mlps.add(number)
        norms += _is_norm(tensor, hidden)
        sides["qk_norm"] += "q_norm" in tensor.name or "query_layernorm" in tensor.name
    num = experts.get("num") or 0
    if not sparse:
        num = 0
    latent = attention["kind"] == "mla"
    heads, head_dim = attention["heads"] or 0, attention["head_dim"] or 0
    said = whole(inner, "v_head_dim")
    # With latent attention a decoder multiplies queries by the cached latents themselves.
    width = head_dim + (head_dim if said is None else said)
    if latent:
        width = (whole(inner, "kv_lora_rank") or 0) * 2 + (whole(inner, "qk_rope_head_dim") or 0)
    per_token = (experts.get("per_token") or 0) if num else 0
    if not heads * width or per_token > num:
        raise UserError(
            f"{name}: the sizes in config.json are those of no model",
            found=f"{heads} attention heads of width {head_dim}, {per_token} of {num} experts a token",
            expected="heads with a width, and no more experts a token than there are",
            fix="compare config.json with the original, or download the checkpoint again",
        )
    caches = [
        Cache(entry["layers"], entry["window"], entry["width"])
        for entry in cache_of(inner) or ()
        if not entry["kind"].endswith("_state") and entry["width"]
    ]
    total, active = counts["total"], counts["active"]
    return ModelFacts(
        name=name,
        model_type=str(inner.get("model_type")),
        total=total,
        active=active,
        layers=layers,
        moe_layers=sparse,
        hidden=hidden,
        vocabulary=rows,
        tied=is_tied(headers, config),
        experts=num,
        experts_per_token=per_token,
        expert_parameters=routed // (sparse * num) if sparse and num else 0,
        shared_parameters=shared,
        largest_layer=max(by_layer.values(), default=0),
        attention_kind=attention["kind"] or "mha",
        queries=heads * head_dim,
        keys=(attention["kv_heads"] or 0) * head_dim,
        score_width=heads * width,
        qk_norm=sides["qk_norm"] > 0,
        carried=(whole(inner, "router_hidden_size") or 0) if attention["kind"] == "cca" else 0,
        caches=tuple(caches),
        stored_bytes=sum(tensor.bytes for tensor in headers.tensors.values()),
        projections=tuple(projections),
        mlp_layers=len(mlps),
        hidden_norms=norms,
    )


def _is_norm(tensor: TensorInfo, hidden: int) -> bool:
    """Whether a tensor scales the hidden states; norms of queries, keys and latents do not (as in tidar/gated.py)."""
    *path, last = tensor.name.split(".")
    own = path[-1] if path else ""
    return tensor.shape == (hidden,) and last == "weight" and "norm" in own and not own.startswith(("q_", "k_", "kv_"))
