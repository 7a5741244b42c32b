"""How a model computes attention and experts in training: the fastest implementation that is right for its family."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import AttentionInterface
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward
from transformers.modeling_layers import GradientCheckpointingLayer

from zconvert.errors import UserError
from zconvert.tidar import flex_masks
from zconvert.tidar.model import LayoutModel

GROUPED = "grouped_mm_autocast"
"""of the experts' implementation, in transformers' registry"""


def choose_attention(model: LayoutModel, wanted: Literal["auto", "flex", "sdpa"], device: torch.device) -> str:
    """Has packed rows attend by FlexAttention or through a dense mask.

    Args:
        model: on its device; changed in place.
        wanted: auto takes FlexAttention on a GPU where the family can.
        device: the model's.

    Returns:
        A line that says what was chosen, and why.

    Raises:
        UserError: FlexAttention is wanted and cannot be had.
    """
    problem = "it has no backward pass on the CPU" if device.type == "cpu" else _flex_problem(model)
    if wanted == "flex" and problem is not None:
        raise UserError("FlexAttention cannot train this model", found=problem, fix="set attention to auto or sdpa")
    if wanted != "sdpa" and problem is None:
        flex_masks.register()
        model.config._attn_implementation = flex_masks.NAME
        return "attention: FlexAttention"
    if model.config._attn_implementation == flex_masks.NAME:
        model.config._attn_implementation = "sdpa"
    reason = f" (not FlexAttention: {problem})" if wanted == "auto" else ""
    return f"attention: {model.config._attn_implementation} with a dense mask{reason}"


def _flex_problem(model: LayoutModel) -> str | None:
    """Why a family cannot attend by FlexAttention; None: it can."""
    family, config = model.family, model.config
    decoder: Any = model.model.get_decoder()
    if family.sinks:
        return "its attention has sinks"
    if family.indexed:
        return "an indexer chooses its keys"
    if family.mixing == "inkling":
        return "its attention adds a bias by distance"
    if getattr(config, "kv_lora_rank", None):
        return "latent attention was not tried with it"
    if getattr(config, "attention_dropout", 0.0):
        return "it knows no attention dropout"
    if not decoder._supports_flex_attn or config._attn_implementation not in AttentionInterface():
        return f"transformers has none for {family.model_type}"
    return None


def choose_experts(model: LayoutModel, wanted: str | None, *, autocast: bool) -> str:
    """Has experts computed the way that is wanted, or the fastest.

    All tokens of all experts in one grouped product is the fastest, on a GPU and on the CPU (docs/log.md). Transformers
    makes that product in the weights' number format, whatever autocast says: with float32 weights it would run in
    float32.

    Args:
        model: changed in place.
        wanted: eager, grouped_mm or batched_mm; None for what suits.
        autocast: the forward pass runs in autocast.

    Returns:
        A line that says what was chosen.

    Raises:
        UserError: what is wanted does not work with the model.
    """
    chosen = wanted or "grouped_mm"
    try:
        model.model.set_experts_implementation(chosen)
    except (ValueError, ImportError) as error:
        if wanted is None:
            return "experts: none" if model.family.dense else "experts: the model's own code"
        raise UserError(
            f"experts_implementation {wanted} does not work with this model", found=error, fix="leave it out, or eager"
        ) from error
    if chosen == "grouped_mm" and autocast:
        ExpertsInterface.register(GROUPED, _grouped_in_autocast)
        model.model.set_experts_implementation(GROUPED)
    return f"experts: {chosen}"


def _grouped_in_autocast(experts: Any, *args: Any) -> Any:
    """An experts function of transformers."""
    device = args[0].device.type
    if torch.is_autocast_enabled(device):
        experts = _Cast(experts, torch.get_autocast_dtype(device))
    return grouped_mm_experts_forward(experts, *args)


class _Cast:
    """A module whose weights read as another number format."""

    def __init__(self, module: Any, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._module, name)
        return value.to(self._dtype) if isinstance(value, torch.nn.Parameter) else value


def checkpoint_activations(model: LayoutModel) -> None:
    """Has layers keep their inputs alone, and run again in the backward pass.

    Args:
        model: in the mode in which it is trained; changed in place.

    Raises:
        UserError: its code cannot.
    """
    source = model.model
    if not source.supports_gradient_checkpointing:
        raise UserError(
            f"models of type {model.family.model_type} know no gradient checkpointing",
            fix="set gradient_checkpointing to false",
        )
    # The other name is deprecated, and the only one in older versions of transformers.
    enable = getattr(source, "activation_checkpointing_enable", None) or source.gradient_checkpointing_enable
    enable({"use_reentrant": False})
    # Layers do so in training mode alone, in which a frozen source is not. Of what is in them nothing changes mode, and
    # no family's layer itself draws at random.
    for module in source.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.training = True
