"""Which experts are chosen in a forward, apart for clean tokens and mask slots, and what that says of their health.

Routers are found by what transformers itself records of a family (`_can_record_outputs`), and listened to by hooks that
are open only while the decoder's own forward runs: where layers are computed again in the backward pass (activation
checkpointing), their routers' hooks fire a second time and are not heard.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from zconvert.tidar.layout import PADDING
from zconvert.tidar.model import LayoutModel

KINDS = ("clean", "mask")
"""of tokens, in the order of counts"""
_BIASES = ("balancing_biases", "e_score_correction_bias")


@dataclass(frozen=True)
class Router:
    """One router of a model."""

    name: str
    """where it is in the decoder"""
    module: nn.Module
    logits_at: int
    """place of the logits in its output"""
    bias: Tensor | None
    """(classes,) what is added to the scores when experts are chosen, moved by a balancer and not by gradients"""
    skips: int = 0
    """how many of the last classes are no experts: ZAYA has one, which skips the layer"""

    def logits(self, output: Any) -> Tensor:
        """(n, classes) of an output of the module."""
        logits: Tensor = output[self.logits_at] if isinstance(output, tuple) else output
        return logits.reshape(-1, logits.shape[-1])

    def chosen(self, output: Any, top_k: int) -> Tensor:
        """(n, k) int64: the experts that were chosen.

        Args:
            output: of the module.
            top_k: the config's; routers that give no indices choose so many of the largest logits.
        """
        # Detached: what autograd saves here it would miss when checkpointing recomputes the layer.
        logits = self.logits(output).detach()
        if self.skips:  # ZAYA writes expert 0 where the class that skips was chosen
            assert self.bias is not None
            scores = logits.softmax(-1).float() + self.bias
            return scores.topk(output[2].shape[-1], dim=-1).indices
        for part in output if isinstance(output, tuple) else ():
            if isinstance(part, Tensor) and part.dtype == torch.int64 and part.dim() == 2:
                return part
        return logits.topk(top_k, dim=-1).indices


def routers_of(decoder: Any) -> list[Router]:
    """The routers of a transformers decoder, in the order of its layers; none for a dense model."""
    recorded: Any = (getattr(decoder, "_can_record_outputs", None) or {}).get("router_logits")
    records = recorded if isinstance(recorded, list | tuple) else [recorded]
    found = []
    modules: list[tuple[str, Any]] = list(decoder.named_modules())
    for name, module in modules:
        for record in records:
            kind = getattr(record, "target_class", record)
            # JetMoe also records its attention, which holds a router that is found by itself.
            if isinstance(kind, type) and issubclass(type(module), kind) and "Attention" not in kind.__name__:
                skips = int(hasattr(module, "balancing_biases"))
                found.append(Router(name, module, getattr(record, "index", 0), _bias_of(module), skips))
    return found


def _bias_of(module: nn.Module) -> Tensor | None:
    tensors = [*module.named_buffers(), *module.named_parameters()]
    found = next((tensor for name, tensor in tensors if name.split(".")[-1] in _BIASES), None)
    return None if found is None else found.view(-1)


def has_aux_loss(decoder: Any) -> bool:
    """Whether transformers has a load-balancing loss for this family, and so it was trained with one."""
    return hasattr(sys.modules[type(decoder).__module__], "load_balancing_loss_func")


def experts_per_token(config: Any) -> int:
    """How many experts a token goes through, by a transformers config."""
    names = ("num_experts_per_tok", "moe_topk", "moe_top_k", "moe_k", "top_k_experts")
    for source in (config, getattr(config, "ffn_config", None)):
        for name in names:
            if isinstance(value := getattr(source, name, None), int):
                return value
    return 1


class RouterWatch:
    """Listens to the routers of a model in training forwards; measurements under inference mode are passed over."""

    def __init__(self, model: LayoutModel) -> None:
        """Puts the hooks in place; `close` removes them."""
        self.model = model
        self.routers = routers_of(model.decoder)
        self.top_k = experts_per_token(model.config)
        self.keep_logits = False
        """whether `logits` is filled"""
        self.logits: list[tuple[Tensor, Tensor]] = []
        """of each router since the last `take_logits`: (n, classes) with their gradients, and (n,) bool, no padding"""
        self._counts: list[Tensor | None] = [None] * len(self.routers)
        self._chosen: list[Tensor] | None = None
        self._open = False
        self._handles = [
            model.decoder.register_forward_pre_hook(self._begin),
            model.decoder.register_forward_hook(self._end, always_call=True),
            *(r.module.register_forward_hook(self._hook(number, r)) for number, r in enumerate(self.routers)),
        ]

    def close(self) -> None:
        """Stops listening."""
        for handle in self._handles:
            handle.remove()

    def take_counts(self) -> list[Tensor]:
        """For each router (2, classes) int64: how often clean tokens and mask slots chose each, since the last call."""
        counts = [c for c in self._counts if c is not None]
        self._counts = [None] * len(self.routers)
        return counts

    def take_logits(self) -> list[tuple[Tensor, Tensor]]:
        """`logits`, which starts anew."""
        taken, self.logits = self.logits, []
        return taken

    @contextmanager
    def choices(self) -> Iterator[list[Tensor]]:
        """Within, forwards are not counted; the list gets (n, k) chosen experts from each router instead."""
        self._chosen = []
        try:
            yield self._chosen
        finally:
            self._chosen = None

    def _begin(self, *_: Any) -> None:
        self._open = self._chosen is not None or not torch.is_inference_mode_enabled()

    def _end(self, *_: Any) -> None:
        self._open = False

    def _hook(self, number: int, router: Router) -> Any:
        def listen(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not self._open:
                return
            chosen = router.chosen(output, self.top_k)
            if self._chosen is not None:
                self._chosen.append(chosen.detach())
                return
            masked, real = self._tokens(len(chosen))
            logits = router.logits(output)
            if self.keep_logits:
                self.logits.append((logits, real))
            counts = self._counts[number]
            if counts is None:
                counts = chosen.new_zeros(len(KINDS), logits.shape[-1])
                self._counts[number] = counts
            place = masked.long()[:, None] * logits.shape[-1] + chosen
            counts.view(-1).scatter_add_(0, place.flatten(), real.long()[:, None].expand_as(chosen).flatten())

        return listen

    def _tokens(self, count: int) -> tuple[Tensor, Tensor]:
        """(count,) bool each, of the tokens that a router saw: is a mask slot; is no padding."""
        layout = self.model.layout
        assert layout is not None
        masked, real = layout.is_masked, layout.document_ids > PADDING
        if count != masked.numel():  # the diffusion expert replaces the routed ones: mask slots do not come here
            clean = layout.first_slot
            masked, real = masked[:, :clean], real[:, :clean]
        return masked.flatten(), real.flatten()


def load_balancing_loss(logits: Sequence[tuple[Tensor, Tensor]], top_k: int) -> Tensor:
    """The load-balancing loss of Switch Transformer (arXiv 2101.03961, eq. 4-6) as transformers pools it over layers.

    E · Σ_e f_e P_e: f_e the choices of expert e per token, P_e its mean probability; 1 · k when all are used alike.

    Args:
        logits: of each router (n, E), and (n,) bool which tokens count.
        top_k: experts that a token goes through.

    Returns:
        () float32, with the gradient of P.
    """
    experts = logits[0][0].shape[-1]
    chosen = logits[0][0].new_zeros(experts, dtype=torch.float32)
    probability, tokens = chosen, chosen.new_zeros(())
    for layer, real in logits:
        weights = layer.softmax(-1)
        picks = torch.zeros_like(weights).scatter_(1, weights.topk(top_k, dim=-1).indices, 1.0)
        counted = real[:, None].float()
        chosen = chosen + (picks.detach().float() * counted).sum(0)
        probability = probability + (weights.float() * counted).sum(0)
        tokens = tokens + counted.sum()
    return experts * (chosen / tokens * (probability / tokens)).sum()


@dataclass(frozen=True)
class Health:
    """How evenly one kind of tokens uses the experts of each router."""

    load: list[list[float]]
    """for each router, each expert's share of the choices; they sum to 1"""
    effective: list[float]
    """for each router, exp(entropy of the load): as many experts, used alike, would have that entropy"""
    entropy: list[float]
    """for each router, entropy of the load over that of an even one, 0 … 1"""
    dead: list[int]
    """for each router, experts that nobody chose"""
    busiest: list[float]
    """for each router, the largest share times the number of experts; 1 is even"""
    skipped: float
    """share of all choices that chose to skip the layer; not in the load"""


def health(counts: Sequence[Tensor], kind: str, skips: int = 0) -> Health | None:
    """Judges the counts of some forwards; None where no token of that kind was routed.

    Args:
        counts: (2, classes) for each router.
        kind: clean or mask.
        skips: how many of the last classes are no experts.

    >>> even = torch.tensor([[2, 2, 2, 2], [8, 0, 0, 0]])
    >>> health([even], "clean").effective, health([even], "mask").dead
    ([4.0], [3])
    """
    classes = [c[KINDS.index(kind)].double().cpu() for c in counts]
    total = float(sum(row.sum() for row in classes))
    if not total:
        return None
    rows = [row[: len(row) - skips] for row in classes]
    loads = [row / row.sum().clamp_min(1) for row in rows]  # all zero where every token skipped
    entropies = [float(-torch.special.xlogy(load, load).sum()) for load in loads]
    widths = [torch.tensor(float(len(load))) for load in loads]
    return Health(
        load=[load.tolist() for load in loads],
        effective=[round(float(torch.tensor(h).exp()), 4) for h in entropies],
        entropy=[round(abs(h) / float(width.log()), 6) for h, width in zip(entropies, widths, strict=True)],
        dead=[int((row == 0).sum()) for row in rows],
        busiest=[round(float(load.max()) * len(load), 4) for load in loads],
        skipped=round(1 - float(sum(row.sum() for row in rows)) / total, 6),
    )


def changed_share(before: Sequence[Tensor], after: Sequence[Tensor]) -> list[float]:
    """For each router, the share of choices (n, k) that are not what they were for the same tokens.

    >>> changed_share([torch.tensor([[0, 1], [2, 3]])], [torch.tensor([[1, 0], [2, 1]])])
    [0.25]
    """
    return [
        1 - float((old[:, :, None] == new[:, None, :]).any(-1).float().mean())
        for old, new in zip(before, after, strict=True)
    ]
