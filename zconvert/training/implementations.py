"""How a model computes attention and experts in training: the fastest implementation that is right for its family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers.integrations.moe import ExpertsInterface, grouped_mm_experts_forward

from zconvert.errors import UserError
from zconvert.tidar import packed_attention
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.packed_attention import FLEX, SEGMENTS
from zconvert.tidar.sinks import NAME as SINKS

if TYPE_CHECKING:  # this module runs where what reads recipes is not installed (benchmarks/step_time.py)
    from zconvert.recipe import TrainingRecipe
    from zconvert.training.context_parallel import ContextParallel

GROUPED = "grouped_mm_autocast"
"""of the experts' implementation, in transformers' registry"""


def choose_implementations(
    model: LayoutModel, recipe: TrainingRecipe, device: torch.device, context: ContextParallel | None = None
) -> tuple[str, str]:
    """Has a model compute as a recipe wants, or as fast as it can; returns what was chosen, in two lines.

    Args:
        model: on its device; changed in place.
        recipe: of the stage.
        device: the model's.
        context: the processes that share rows.

    Raises:
        UserError: what the recipe wants cannot be had.
    """
    experts = choose_experts(model, recipe.experts_implementation, autocast=recipe.dtype == "bfloat16")
    if context is None:
        return choose_attention(model, recipe.attention, device), experts
    # Keys and values are gathered first: what is chosen attends after that.
    config = model.config
    gathering, config._attn_implementation = config._attn_implementation, context.implementation
    chosen = choose_attention(model, recipe.attention, device)
    context.implementation, config._attn_implementation = config._attn_implementation, gathering
    return f"{chosen}, keys gathered", experts


def choose_attention(model: LayoutModel, wanted: Literal["auto", "flex", "sdpa"], device: torch.device) -> str:
    """Has packed rows attend by FlexAttention, by segments in SDPA, or through the dense mask of the whole row.

    Args:
        model: on its device; changed in place.
        wanted: auto takes FlexAttention on a GPU where the family can, else SDPA.
        device: the model's.

    Returns:
        A line that says what was chosen, and why.

    Raises:
        UserError: FlexAttention is wanted and cannot be had.
    """
    config = model.config
    segments_problem = _segments_problem(model)
    problem = "it has no backward pass on the CPU" if device.type == "cpu" else None
    problem = problem or segments_problem or _flex_problem(model)
    if wanted == "flex" and problem is not None:
        raise UserError("FlexAttention cannot train this model", found=problem, fix="set attention to auto or sdpa")
    if wanted != "sdpa" and problem is None:
        packed_attention.register()
        config._attn_implementation = FLEX
        return "attention: FlexAttention"
    reason = f" (not FlexAttention: {problem})" if wanted == "auto" and device.type != "cpu" else ""
    if config._attn_implementation in ("sdpa", SINKS, FLEX, SEGMENTS) and segments_problem is None:
        packed_attention.register()
        config._attn_implementation = SEGMENTS
        return f"attention: SDPA by segments{reason}"
    return f"attention: {config._attn_implementation} with the whole row's mask{reason}"


def _segments_problem(model: LayoutModel) -> str | None:
    """Why a family cannot take a packed mask (tidar/packed_attention.py); None: it can."""
    if model.family.indexed:
        return "an indexer chooses its keys"
    if model.config._attn_implementation == "eager":
        return f"{model.family.model_type} has eager attention alone"
    return None


def _flex_problem(model: LayoutModel) -> str | None:
    """Why a family that can take a packed mask does not run in FlexAttention; None: it does."""
    if model.family.sinks:
        return "its attention has sinks"
    if model.family.mixing == "inkling":
        return "its attention adds a bias by distance"
    if getattr(model.config, "kv_lora_rank", None):
        return "latent attention was not tried with it"
    if not model.model.get_decoder()._supports_flex_attn:
        return f"transformers has none for {model.family.model_type}"
    if getattr(model.config, "attn_logit_softcapping", None):
        return "its attention caps scores"  # as SDPA does not, which Gemma 2 has in older versions of transformers
    if getattr(model.config, "attention_dropout", 0.0):
        return "it knows no attention dropout"
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
    if model.gated is not None:  # stock layers do so in training mode alone, in which a frozen source is not
        model.gated.gate.recompute = True
        return
    source = model.model
    if not source.supports_gradient_checkpointing:
        raise UserError(
            f"models of type {model.family.model_type} know no gradient checkpointing",
            fix="set gradient_checkpointing to false",
        )
    # The other name is deprecated, and the only one in older versions of transformers.
    enable = getattr(source, "activation_checkpointing_enable", None) or source.gradient_checkpointing_enable
    enable({"use_reentrant": False})
