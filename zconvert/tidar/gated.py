"""Weights that act at mask slots only, so that the source model stays what it is at every other token.

Mask slots stand behind the clean tokens in every row: in a training row `[x_0 … x_{T-1} | m_0 … m_{T-1}]`, and in a
decoding forward `[next token, drafts | blocks of slots]`. So a gate is where the slots begin, and gating is slicing:

    y = W h                        at clean tokens, exactly the source's
    y = W h + B A h                at mask slots: projections of attention (low rank)
    y = MoE(h) + E(h), or E(h)     at mask slots: the diffusion expert E is added to the routed ones or replaces them
    y = norm(h) (1 + s) + t        at mask slots: norms; the last one's t is a bias of the output
    router(h + u)                  at mask slots: routers, where the routed experts stay

Clean tokens never see mask slots, so nothing of this reaches them. The weights live in a module of their own, outside
of the source model: its state dict, its names and its bytes stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .settings import MIXERS, NOT_UPDATED, GatedParts
from .swap import put_before


class Gate:
    """Where the mask slots of the forward that runs begin; None: there are none, and every layer is the stock one."""

    first: int | None = None
    length: int = 0
    """tokens in a row of this forward"""
    recompute: bool = False
    """layers keep only their input for the backward pass, and run again in it (activation checkpointing)"""


class LowRank(nn.Module):
    """B A h; B starts at zero, so that the converted model starts as the source."""

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        """Makes (rank, inputs) and (outputs, rank) matrices."""
        super().__init__()
        self.down = nn.Parameter(torch.empty(rank, inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.normal_(self.down, std=inputs**-0.5)

    def forward(self, hidden: Tensor) -> Tensor:
        """(…, inputs) -> (…, outputs)."""
        return F.linear(F.linear(hidden, self.down.to(hidden.dtype)), self.up.to(hidden.dtype))


class DiffusionExpert(nn.Module):
    """A small shared SwiGLU that all mask slots of a layer go through; its output starts at zero."""

    def __init__(self, width: int, hidden: int) -> None:
        """Makes an expert of `hidden` units over states of `width`."""
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(2 * hidden, width))
        self.down = nn.Parameter(torch.zeros(width, hidden))
        nn.init.normal_(self.gate_up, std=width**-0.5)

    def forward(self, states: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        gate, up = F.linear(states, self.gate_up.to(states.dtype)).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up, self.down.to(states.dtype))


class ScaleShift(nn.Module):
    """Multiplies by 1 + scale and adds the shift; both start at zero."""

    def __init__(self, width: int) -> None:
        """Makes two vectors of `width`."""
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        return states * (1 + self.scale.to(states.dtype)) + self.shift.to(states.dtype)


class Shift(nn.Module):
    """Adds a vector that starts at zero."""

    def __init__(self, width: int) -> None:
        """Makes a vector of `width`."""
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(width))

    def forward(self, states: Tensor) -> Tensor:
        """(…, width) -> (…, width)."""
        return states + self.shift.to(states.dtype)


def _at_slots(states: Tensor, gate: Gate, change: nn.Module) -> Tensor:
    """Changes the states of mask slots, of (R, N, width) or flattened (R · N, width)."""
    if gate.first is None:
        return states
    rows = states.view(-1, gate.length, states.shape[-1])
    return _joined_rows(rows[:, : gate.first], change(rows[:, gate.first :])).view(states.shape)


def _joined_rows(clean: Tensor, slots: Tensor) -> Tensor:
    """(R, first, width) and (R, N - first, width) -> (R, N, width)."""
    return torch.cat([clean, slots], dim=1) if clean.shape[1] else slots


class _GatedNorm:
    """Before a norm over the hidden states."""

    def forward(self, hidden: Tensor) -> Tensor:
        stock: Any = super()
        return _at_slots(stock.forward(hidden), *self.__dict__["gated"])


class _GatedRouter:
    """Before a router."""

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        return stock.forward(_at_slots(hidden, *self.__dict__["gated"]), *args, **kwargs)


class _GatedLinear:
    """Before `nn.Linear`."""

    def forward(self, hidden: Tensor) -> Tensor:
        stock: Any = super()
        out = stock.forward(hidden)
        gate, extra = self.__dict__["gated"]
        # Projections that do not run over the row's tokens (a boundary's, say) have nothing at the gate.
        if gate.first is None or hidden.dim() != 3 or hidden.shape[1] <= gate.first:
            return out
        if not torch.is_grad_enabled():  # decoding: in place, since nothing else has seen the projection yet
            out[:, gate.first :] += extra(hidden[:, gate.first :])
            return out
        return _joined_rows(out[:, : gate.first], out[:, gate.first :] + extra(hidden[:, gate.first :]))


class _GatedMlp:
    """Before the MLP or the mixture-of-experts block of a layer."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        gate, extra = self.__dict__["gated"]
        first, mode = gate.first, self.__dict__["gated_mode"]
        if first is None:
            result = stock.forward(*args, **kwargs)
            self.__dict__["gated_others"] = len(result) - 1 if isinstance(result, tuple) else None
            return result
        hidden, *rest = args or [kwargs.pop("hidden_states")]
        if first == 0 and mode == "replace":  # the mask half by itself, after the clean one ran
            others = self.__dict__["gated_others"]
            return extra(hidden) if others is None else (extra(hidden), *[None] * others)
        # Replaced, no slot goes near the router: the block runs on the clean tokens alone.
        block = hidden[:, :first].contiguous() if mode == "replace" else hidden
        result = stock.forward(block, *rest, **kwargs)
        out = (result[0] if isinstance(result, tuple) else result).view(block.shape)
        slots = extra(hidden[:, first:])
        if mode == "add":
            slots = out[:, first:] + slots
        out = _joined_rows(out[:, :first], slots)
        return (out, *result[1:]) if isinstance(result, tuple) else out


class _GatedEmbedding:
    """Before the input embedding."""

    def forward(self, input_ids: Tensor) -> Tensor:
        stock: Any = super()
        out = stock.forward(input_ids)
        gate, extra = self.__dict__["gated"]
        if gate.first is None:
            return out
        slots = extra.to(out.dtype).expand(out.shape[0], out.shape[1] - gate.first, -1)
        return torch.cat([out[:, : gate.first], slots], dim=1)


class _RecomputedLayer:
    """Before a layer. Stock layers recompute only where they are in training mode, which a frozen source is not."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        stock: Any = super()
        gate = self.__dict__["gated"]
        if gate.recompute and torch.is_grad_enabled():
            return checkpoint(stock.forward, *args, use_reentrant=False, **kwargs)
        return stock.forward(*args, **kwargs)


class GatedWeights(nn.Module):
    """All gated weights of a model, by the name of the module that they go with."""

    def __init__(self, decoder: Any, embedding: Any, parts: GatedParts) -> None:
        """Makes the weights for a decoder and grafts them in place.

        At first they change nothing, but for `replace`, where mask slots get nothing from the routed experts.

        Args:
            decoder: of a transformers model.
            embedding: its input embedding.
            parts: which there shall be.
        """
        super().__init__()
        self.parts = parts
        self.gate = Gate()
        self._hosts: dict[str, Any] = {}  # the modules that the parts go with, which a dict keeps from registration
        self._embedding = (embedding,)
        self.modules_by_name = nn.ModuleDict()
        width = embedding.weight.shape[1]
        for name, module, kind in list(_places(decoder, parts, width)):
            extra: nn.Module
            if kind == "linear":
                extra = LowRank(module.in_features, module.out_features, parts.rank)
                self._graft(module, _GatedLinear, extra)
            elif kind == "norm":
                extra = ScaleShift(width)
                self._graft(module, _GatedNorm, extra)
            elif kind == "router":
                extra = Shift(width)
                self._graft(module, _GatedRouter, extra)
            else:
                extra = DiffusionExpert(width, parts.mlp_width)
                self._graft(module, _GatedMlp, extra)
                module.__dict__["gated_mode"] = kind
            name = name.replace(".", "/")
            self.modules_by_name[name], self._hosts[name] = extra, module
        if parts.router and not any(isinstance(extra, Shift) for extra in self.modules_by_name.values()):
            raise ValueError("gated.router is true, and this model has no router that can be shifted: set it to false")
        for layer in layers_of(decoder):
            layer.__dict__["gated"] = self.gate
            put_before(layer, _RecomputedLayer, "Gated")
        self._rows: int = embedding.weight.shape[0]
        self.mask_embedding: nn.Parameter | None = None
        if parts.mask_embedding:
            some = torch.arange(min(_EMBEDDING_SAMPLE, embedding.weight.shape[0]), device=embedding.weight.device)
            self.mask_embedding = nn.Parameter(embedding(some).detach().float().mean(dim=0))
            self._graft(embedding, _GatedEmbedding, self.mask_embedding)

    def place(self, dtype: torch.dtype) -> None:
        """Brings each part to the device of the module it goes with, and all to one dtype."""
        self.to(dtype=dtype)
        for name, extra in self.modules_by_name.items():
            extra.to(_device_of(self._hosts[name]))
        if self.mask_embedding is not None:
            self.mask_embedding.data = self.mask_embedding.data.to(_device_of(self._embedding[0]))

    def with_rows(self, input_ids: Tensor) -> Tensor:
        """(R, N) ids -> the same where a virtual mask token, which has no row, is one that has: any will do."""
        first = self.gate.first
        if first is None or self.mask_embedding is None:
            return input_ids
        return torch.cat([input_ids[:, :first], input_ids[:, first:].clamp(max=self._rows - 1)], dim=1)

    def _graft(self, module: Any, before: Any, extra: Any) -> None:
        # Into __dict__, past nn.Module's registration: the source's state dict must not grow.
        module.__dict__["gated"] = (self.gate, extra)
        put_before(module, before, "Gated")


def _device_of(module: Any) -> torch.device:
    """Where a module computes: accelerate may keep its weights elsewhere in the meantime."""
    hook = module.__dict__.get("_hf_hook")
    place = getattr(hook, "execution_device", None)
    return next(module.parameters()).device if place is None else torch.device(place)


_EMBEDDING_SAMPLE = 4096
"""the mask embedding starts as the mean of so many rows"""


_ROUTERS = ("gate", "router")
"""what a block's child is called that chooses experts"""


def layers_of(decoder: Any) -> Any:
    """The decoder's layers."""
    return decoder.layers if hasattr(decoder, "layers") else decoder.blocks


def _places(decoder: Any, parts: GatedParts, width: int) -> Iterator[tuple[str, Any, str]]:
    """(name, module, kind) of everything that gets weights; kind is linear, norm, router, add or replace."""
    if parts.norms:
        yield from ((name, module, "norm") for name, module in decoder.named_modules() if _is_norm(name, module, width))
    for number, layer in enumerate(layers_of(decoder)):
        for child_name, child in layer.named_children():
            if parts.rank and any(word in child_name for word in MIXERS):
                for name, module in child.named_modules():
                    if isinstance(module, nn.Linear) and not any(word in name for word in NOT_UPDATED):
                        yield f"layers.{number}.{child_name}.{name}".rstrip("."), module, "linear"
        block = _mlp_of(layer)
        if block is not None and parts.mlp != "none":
            name, module, routed = block
            yield f"layers.{number}.{name}", module, parts.mlp if routed else "add"
        if block is not None and block[2] and parts.router:
            for name, module in block[1].named_children():
                if name in _ROUTERS:
                    yield f"layers.{number}.{block[0]}.{name}", module, "router"


def _is_norm(name: str, module: nn.Module, width: int) -> bool:
    """Whether a module is a norm over hidden states; those over queries, keys and latents are parts of attention."""
    weight, own = getattr(module, "weight", None), name.rsplit(".", 1)[-1]
    over_hidden = weight is not None and weight.shape == (width,)
    return "norm" in type(module).__name__.lower() and over_hidden and not own.startswith(("q_", "k_", "kv_"))


def _mlp_of(layer: nn.Module) -> tuple[str, nn.Module, bool] | None:
    """A layer's mixture-of-experts block, else its MLP: name, module, and whether it routes."""
    children = {n: c for n, c in layer.named_children() if not any(word in n for word in MIXERS) or n == "mlp"}
    for name, child in children.items():
        if name != "experts" and any(
            inner == "experts" or inner.endswith(".experts") for inner, _ in child.named_modules()
        ):
            return name, child, True
    for name in ("mlp", "feed_forward", "ffn"):
        if name in children:
            return name, children[name], False
    return None
