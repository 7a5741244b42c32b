"""The `moe:` section at work: load-balancing loss, balancing biases, frozen routers, and the report of their health."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zconvert.checkpoint.anatomy import router_of
from zconvert.checkpoint.folder import write_file
from zconvert.data.packing import Batch
from zconvert.recipe.watching import MoeSection
from zconvert.tidar.layout import packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.training.balancing import DEFAULT_RATE, BiasBalancer
from zconvert.training.evaluating import evaluating
from zconvert.training.observers import Observer
from zconvert.training.routing import (
    KINDS,
    RouterWatch,
    changed_share,
    has_aux_loss,
    health,
    load_balancing_loss,
)

if TYPE_CHECKING:
    from zconvert.training.loop import Trainer

ROUTING_FILE = "routing.json"
"""in a run's folder: the newest loads of every expert"""


class MoeObserver(Observer):
    """Watches and balances the routers of a model with experts."""

    def __init__(
        self,
        model: LayoutModel,
        section: MoeSection,
        probe: Batch,
        on_message: Callable[[str], None],
        alone: Callable[[Callable[[], Tensor]], Tensor] = lambda action: action(),
    ) -> None:
        """Freezes the routers where asked, and notes what base_model chooses on the probe.

        Args:
            model: with base_model's weights, before training.
            section: of the recipe.
            probe: rows on which drift is measured; their clean tokens are routed.
            on_message: told what is on and off, once.
            alone: runs the model over whole rows where several processes share it (`Trainer.alone`).
        """
        self.model, self.section, self.probe, self.say, self.alone = model, section, probe, on_message, alone
        self.watch = RouterWatch(model)
        trained = model.gated is None and section.router == "train"
        if model.gated is None and section.router == "freeze":
            for router in self.watch.routers:
                router.module.requires_grad_(False)
        self.aux_loss_coef = _aux_loss_coef(model, section) if trained else 0.0
        self.watch.keep_logits = self.aux_loss_coef > 0
        with_bias = any(router.bias is not None for router in self.watch.routers)
        rate = DEFAULT_RATE if section.balancing_rate is None else section.balancing_rate
        self.balancer = BiasBalancer(self.watch.routers, rate) if trained and with_bias and rate else None
        self._base_choices = self._choices() if trained and section.probe_steps else None
        self._counts: list[Tensor] = []
        self._aux = [0.0, 0.0]  # sum, forwards
        self._drift: dict[str, Any] = {}
        self._warned = False
        for line in self._what_is_on(trained):
            on_message(line)

    def extra_loss(self) -> Tensor | None:
        """The load-balancing loss of the forward that was just done, weighted."""
        if not self.aux_loss_coef:
            return None
        aux = load_balancing_loss(self.watch.take_logits(), self.watch.top_k)
        self._aux = [self._aux[0] + float(aux.detach()), self._aux[1] + 1]
        return self.aux_loss_coef * aux

    def on_step(self, trainer: Trainer) -> dict[str, Any] | None:
        """Balances; at a row of metrics tells the health since the last one, and the drift where it is due."""
        counts = [trainer.parallel.summed(c) for c in self.watch.take_counts()]
        if self.balancer is not None:
            self.balancer.step(counts)
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)] if self._counts else counts
        if self._base_choices is not None and (trainer.step % self.section.probe_steps == 0 or trainer.is_last):
            changed = changed_share(self._base_choices, self._choices())
            self._drift = {"drift": sum(changed) / len(changed), "drift_by_router": [round(x, 6) for x in changed]}
        if not trainer.logs_now:
            return None
        told: dict[str, Any] = {}
        loads = {"step": trainer.step, "routers": [router.name for router in self.watch.routers]}
        found = {kind: health(self._counts, kind, self.watch.routers[0].skips) for kind in KINDS}
        for kind, state in found.items():
            if state is not None:
                told[kind] = {key: value for key, value in asdict(state).items() if key != "load"}
                loads[kind] = state.load
        if self._aux[1]:
            told["aux_loss"] = self._aux[0] / self._aux[1]
        told |= self._drift
        self._warn(told, trainer.step)
        self._counts, self._aux, self._drift = [], [0.0, 0.0], {}
        if trainer.parallel.first:
            write_file(trainer.run_dir / ROUTING_FILE, json.dumps(loads) + "\n")
        return {"moe": told}

    def state_dict(self) -> dict[str, Any]:
        """What was seen since the last row of metrics."""
        return {
            "counts": [c.tolist() for c in self._counts],
            "aux": self._aux,
            "drift": self._drift,
            "warned": self._warned,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes it back."""
        device = self.model.device
        self._counts = [torch.tensor(c, device=device) for c in state["counts"]]
        self._aux, self._drift, self._warned = list(state["aux"]), dict(state["drift"]), state["warned"]

    def _warn(self, told: dict[str, Any], step: int) -> None:
        """Once, until the mask slots have spread again."""
        if "mask" not in told or "clean" not in told or not self.section.collapse_warning:
            return
        narrow = [
            (router.name, mask, clean)
            for router, mask, clean in zip(
                self.watch.routers, told["mask"]["effective"], told["clean"]["effective"], strict=True
            )
            if mask < self.section.collapse_warning * clean
        ]
        if narrow and not self._warned:
            name, mask, clean = min(narrow, key=lambda each: each[1] / each[2])
            self.say(
                f"warning: after step {step} mask slots collapse onto few experts in {len(narrow)} of "
                f"{len(self.watch.routers)} routers, most in {name}: as if {mask:.1f} were used, {clean:.1f} by clean "
                "tokens (moe.aux_loss_coef or moe.balancing_rate spread them)"
            )
        self._warned = bool(narrow)

    def _choices(self) -> list[Tensor]:
        """What every router chooses for the clean tokens of the probe, padding included."""
        probe = self.probe.to(self.model.device)
        layout, _ = packed_layout(probe.document_ids, 2).halves()
        # In evaluation mode: some routers draw at random in training.
        with evaluating(self.model), self.watch.choices() as chosen, torch.no_grad():
            self.alone(lambda: self.model.hidden_states(probe.input_ids, layout))
        return chosen

    def _what_is_on(self, trained: bool) -> Sequence[str]:
        if not trained:
            why = "moe.router is freeze" if self.model.gated is None else "the source of a gated checkpoint is frozen"
            return [f"{len(self.watch.routers)} routers stay as they are: {why}"]
        origin = "config.json or its family's default" if self.section.aux_loss_coef is None else "the recipe"
        lines = [f"load-balancing loss: coefficient {self.aux_loss_coef:g}, from {origin}"]
        if self.section.aux_loss_coef is None and not has_aux_loss(self.model.decoder):
            lines = ["load-balancing loss: none, as this family has none"]
        if self.balancer is not None:
            lines.append(f"balancing biases of routers: moved by {self.balancer.rate:g} a step")
        return lines


def _aux_loss_coef(model: LayoutModel, section: MoeSection) -> float:
    if section.aux_loss_coef is not None:
        return section.aux_loss_coef
    router = router_of(model.config.to_dict())
    return float(router["aux_loss"] or 0) if router is not None and has_aux_loss(model.decoder) else 0.0
