"""How a stage can be spread over devices, and which spread to take.

Three ways, combined: *sharding* (FSDP: each of N devices keeps 1/N of all weights, gradients and optimizer, and gathers
a layer before it runs; more devices than N hold replicas), *context parallel* c (a row is cut into 2c chunks, a device
takes one from each end, so that all work alike on a causal mask) and *expert parallel* e (a device keeps E/e experts of
each layer, tokens travel to them).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zconvert.planning.model import ModelFacts
from zconvert.planning.workload import Workload

if TYPE_CHECKING:
    from zconvert.recipe import ParallelRecipe

_MOST = 16
"""devices that share a row, or a layer's experts, at most: beyond that communication takes over"""


@dataclass(frozen=True)
class Layout:
    """A spread of one run over `gpus` devices."""

    gpus: int = 1
    fsdp: int = 1
    """devices that hold one copy of the weights; 1: each holds everything"""
    context_parallel: int = 1
    expert_parallel: int = 1

    @classmethod
    def of(cls, said: ParallelRecipe, gpus: int) -> Layout:
        """What the `parallel:` section of a recipe means on so many devices."""
        return cls(gpus, said.fsdp or gpus, said.context_parallel, said.expert_parallel)

    @property
    def sharded(self) -> bool:
        """Whether no device holds everything."""
        return self.fsdp > 1

    @property
    def replicas(self) -> int:
        """Copies of the weights over all devices."""
        return self.gpus // self.fsdp

    @property
    def rows(self) -> int:
        """Devices that work on rows of their own."""
        return self.gpus // self.context_parallel

    @property
    def title(self) -> str:
        """In words: `FSDP 8, CP 2`."""
        parts = [f"FSDP {self.fsdp}"] if self.sharded else ["1 device"] if self.gpus == 1 else []
        parts += [f"{self.replicas} replicas"] if self.replicas > 1 else []
        parts += [f"CP {self.context_parallel}"] if self.context_parallel > 1 else []
        parts += [f"EP {self.expert_parallel}"] if self.expert_parallel > 1 else []
        return ", ".join(parts)


def layouts(model: ModelFacts, work: Workload, gpus: int) -> Iterator[tuple[Layout, str | None]]:
    """All layouts worth a look, and why one cannot be, whatever the memory; None where it can.

    Where the stage's recipe says how devices share the work there is that one.
    """
    if (said := work.parallel) is not None:
        found = [Layout.of(said, gpus)]
    else:
        degrees = [2**power for power in range(_MOST.bit_length()) if 2**power <= min(gpus, _MOST)]
        found = [
            Layout(gpus, fsdp, context, experts)
            for context in degrees
            for experts in degrees
            for fsdp in sorted({1, gpus})
            if fsdp > 1 or experts == 1
        ]
    for layout in found:
        yield layout, _obstacle(model, work, layout)


def _obstacle(model: ModelFacts, work: Workload, layout: Layout) -> str | None:
    gpus, context, experts = layout.gpus, layout.context_parallel, layout.expert_parallel
    if gpus % layout.fsdp:
        return f"{gpus} devices are not a multiple of FSDP {layout.fsdp}"
    if gpus % context:
        return f"{gpus} devices are not a multiple of CP {context}"
    if layout.fsdp % experts:
        return f"{layout.fsdp} devices are not a multiple of EP {experts}"
    if context > 1 and work.sequence_len % (2 * context * work.block_size):
        return f"{work.sequence_len} tokens do not cut into {2 * context} chunks of whole blocks of {work.block_size}"
    if experts > 1 and model.experts == 0:
        return "the model is dense: it has no experts to spread"
    if experts > 1 and model.experts % experts:
        return f"{model.experts} experts are not a multiple of EP {experts}"
    if experts > 1 and work.gated is not None and work.gated.mlp == "replace":
        return "mask slots pass no routed expert in this gated mode: spreading them gains nothing"
    return None
