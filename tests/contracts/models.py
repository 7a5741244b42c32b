"""The tiny models on which every detail of the contracts is tested; families.py has one of every family."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from transformers import (
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    ZayaConfig,
    ZayaForCausalLM,
)

from zconvert.tidar.model import LayoutModel

VOCAB = 64
MASK = 63
WINDOW = 7  # less than the texts are long, so that it binds, and not a multiple of the block size

COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def _zaya(**settings: Any) -> ZayaForCausalLM:
    ropes = {
        kind: {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.5}
        for kind, theta in (("hybrid", 10_000.0), ("hybrid_sliding", 1_000.0))
    }
    experts = {"num_experts": 4, "moe_intermediate_size": 32, "router_hidden_size": 16}
    return ZayaForCausalLM(ZayaConfig(**{**COMMON, "rope_parameters": ropes, **experts, **settings}))


def _qwen3_moe(**settings: Any) -> Qwen3MoeForCausalLM:
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**COMMON, **experts, **settings}))


def _mixtral(**settings: Any) -> MixtralForCausalLM:
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
    return MixtralForCausalLM(MixtralConfig(**{**COMMON, **experts, **settings}))


SLIDING_LAYERS = ["hybrid", "hybrid_sliding", "hybrid_sliding", "hybrid"]

# How each is made, and how large its random weights are: large enough that attention, routing and convolutions decide
# what comes next (small ones repeat one token for ever), small enough that float32 rounding stays below the tolerance.
CONTRACT_MODELS: dict[str, tuple[Callable[..., Any], dict[str, Any], float]] = {
    "zaya": (_zaya, {}, 0.4),
    "zaya_sliding": (_zaya, {"layer_types": SLIDING_LAYERS, "sliding_window": WINDOW}, 0.4),
    "qwen3_moe": (_qwen3_moe, {}, 0.3),
    "mixtral": (_mixtral, {}, 0.25),
    "mixtral_sliding": (_mixtral, {"sliding_window": WINDOW}, 0.25),
}


def make_model(name: str, seed: int = 0, **overrides: Any) -> Any:
    """A float32 model of a row of the table, as it would start training.

    ZAYA's `qk_norm.temp` starts at 0 in transformers, where attention is uniform; it starts at 1 here.
    """
    torch.manual_seed(seed)
    make, settings, _ = CONTRACT_MODELS[name]
    model = make(**{**settings, **overrides}).eval()
    model.set_experts_implementation("eager")
    for key, parameter in model.named_parameters():
        if key.endswith("qk_norm.temp"):
            torch.nn.init.ones_(parameter)
    return model


@torch.no_grad()
def perturb(model: Any, scale: float = 0.1, seed: int = 1) -> Any:
    """Adds N(0, scale) to every parameter and routing bias, so that no norm, bias or scale is left neutral."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(torch.randn_like(parameter) * scale)
    for key, buffer in model.named_buffers():
        if key.endswith("balancing_biases"):
            buffer.copy_(torch.randn_like(buffer) * scale)  # the skip expert too: it is chosen now and then
    return model


@dataclass(frozen=True)
class Pair:
    """One set of weights twice: in the untouched model of transformers, and behind layouts."""

    name: str
    plain: Any
    layout: LayoutModel

    @property
    def config(self) -> Any:
        """The model's transformers config."""
        return self.plain.config


def pair_of(name: str, model: Any) -> Pair:
    """The pair for a model, which becomes the plain one."""
    return Pair(name, model, LayoutModel(deepcopy(model)))


def random_pair(name: str, **overrides: Any) -> Pair:
    """Random weights in which every part of the model matters."""
    scale = CONTRACT_MODELS[name][2]
    return pair_of(name, perturb(make_model(name, **{"initializer_range": scale, **overrides})))


@cache
def shared_random_pair(name: str) -> Pair:
    """The same, made once in a session: tests leave it as it is."""
    return random_pair(name)


def random_ids(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random text: any token but the mask token."""
    return torch.randint(0, MASK, shape, generator=torch.Generator().manual_seed(seed))
