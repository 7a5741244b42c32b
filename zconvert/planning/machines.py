"""Devices to plan for: a table with its sources, and a YAML file of one's own.

Numbers are those of the makers' data sheets, dense (no sparsity), at the format that models run in. How much of them a
program gets is stated apart, as efficiencies; the defaults are explained where they are used.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, ClassVar

from pydantic import Field

from zconvert.errors import UserError
from zconvert.recipe.loading import load_checked
from zconvert.recipe.sections import Count, Section, Text

Positive = Annotated[float, Field(gt=0, strict=False)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Machine(Section):
    """A device, and how several of them are joined."""

    stage: ClassVar[str] = "machine"

    name: Text = Field(description="short name, as --gpu takes it")
    memory_gb: Positive = Field(description="memory of one device, GB (1e9 bytes)")
    bandwidth_gb_s: Positive = Field(description="reading its memory, GB/s")
    bf16_tflops: Positive = Field(description="matrix products in bfloat16 with float32 sums, dense, TFLOP/s")
    fp32_tflops: Positive | None = Field(None, description="the same in float32 (TF32 where there is); null: half")
    link_gb_s: Positive = Field(64.0, description="between devices of a node, one direction, GB/s a device")
    network_gb_s: Positive = Field(25.0, description="between nodes, one direction, GB/s a device")
    gpus_per_node: Count = Field(8, description="devices joined by the link")
    kernel_us: Positive = Field(1.0, description="what each kernel of a forward takes at least, microseconds")
    bandwidth_efficiency: Fraction = Field(0.8, description="share of bandwidth_gb_s that kernels reach")
    matrix_efficiency: Fraction = Field(
        0.55, description="share of the FLOP/s that products of some hundred rows reach"
    )
    training_efficiency: Fraction | None = Field(
        0.35, description="share of the FLOP/s that a whole training step reaches; null: unknown, so no time is told"
    )
    usable_memory: Fraction = Field(0.92, description="share of the memory left by context, libraries, fragments")
    price_per_hour: Annotated[float, Field(ge=0, strict=False)] | None = Field(
        None, description="of one device, US dollars; null: no cost is told"
    )
    sequence_us: Annotated[float, Field(ge=0, strict=False)] = Field(
        0.0, description="the engine's own time for each sequence of a TiDAR step, microseconds; 0: an ideal engine"
    )
    source: str = Field("", description="where the numbers come from")

    def flops(self, dtype_bytes: float) -> float:
        """FLOP/s of matrix products at the data sheet, for numbers of that size."""
        if dtype_bytes > 2:
            return 1e12 * (self.fp32_tflops if self.fp32_tflops is not None else self.bf16_tflops / 2)
        return 1e12 * self.bf16_tflops

    @property
    def bytes_per_second(self) -> float:
        """Of its memory, at the data sheet."""
        return 1e9 * self.bandwidth_gb_s

    @property
    def usable_bytes(self) -> float:
        """Memory of one device that a run can fill."""
        return 1e9 * self.memory_gb * self.usable_memory


# Prices: round figures of on-demand offers in 2025, an assumption to be replaced (--price), not a quotation.
MACHINES: dict[str, Machine] = {
    machine.name: machine
    for machine in (
        Machine(
            name="mi300x",
            memory_gb=192,
            bandwidth_gb_s=5300,
            bf16_tflops=1307.4,
            fp32_tflops=653.7,
            link_gb_s=448,
            network_gb_s=50,
            kernel_us=2.0,
            price_per_hour=2.5,
            source="AMD Instinct MI300X data sheet (2023): 192 GB HBM3, 5.3 TB/s, 1,307.4 TFLOPS bfloat16, TF32 653.7",
        ),
        Machine(
            name="mi355x",
            memory_gb=288,
            bandwidth_gb_s=8000,
            bf16_tflops=2516.6,
            fp32_tflops=157.3,
            link_gb_s=537,
            network_gb_s=50,
            kernel_us=2.0,
            price_per_hour=3.5,
            source="AMD Instinct MI355X data sheet (2025): 288 GB HBM3E, 8 TB/s, 2.5 PFLOPS bfloat16; no TF32",
        ),
        Machine(
            name="h100-80gb",
            memory_gb=80,
            bandwidth_gb_s=3350,
            bf16_tflops=989.4,
            fp32_tflops=494.7,
            link_gb_s=450,
            network_gb_s=50,
            price_per_hour=2.5,
            source="NVIDIA H100 SXM data sheet (2023): 80 GB, 3.35 TB/s, 1,979 TFLOPS bfloat16 with sparsity",
        ),
        Machine(
            name="h200",
            memory_gb=141,
            bandwidth_gb_s=4800,
            bf16_tflops=989.4,
            fp32_tflops=494.7,
            link_gb_s=450,
            network_gb_s=50,
            price_per_hour=3.5,
            source="NVIDIA H200 SXM data sheet (2024): 141 GB, 4.8 TB/s, matrix rates of the H100",
        ),
        Machine(
            name="b200",
            memory_gb=180,
            bandwidth_gb_s=8000,
            bf16_tflops=2250,
            fp32_tflops=1125,
            link_gb_s=900,
            network_gb_s=50,
            price_per_hour=5.0,
            source="NVIDIA HGX B200 data sheet (2024): 180 GB, 8 TB/s, 4.5 PFLOPS bfloat16 with sparsity",
        ),
        Machine(
            name="a100-80gb",
            memory_gb=80,
            bandwidth_gb_s=2039,
            bf16_tflops=312,
            fp32_tflops=156,
            link_gb_s=300,
            network_gb_s=25,
            price_per_hour=1.5,
            source="NVIDIA A100 80 GB SXM data sheet (2021): 2,039 GB/s, 312 TFLOPS bfloat16, TF32 156",
        ),
        Machine(
            name="rtx4090",
            memory_gb=24,
            bandwidth_gb_s=1008,
            bf16_tflops=165.2,
            fp32_tflops=82.6,
            link_gb_s=25,
            network_gb_s=3,
            price_per_hour=0.5,
            source="NVIDIA Ada architecture whitepaper (2022): 24 GB, 1,008 GB/s, 165.2 TFLOPS with float32 sums",
        ),
        Machine(
            name="rtx5090",
            memory_gb=32,
            bandwidth_gb_s=1792,
            bf16_tflops=209.5,
            fp32_tflops=104.8,
            link_gb_s=50,
            network_gb_s=3,
            price_per_hour=0.8,
            source="NVIDIA Blackwell RTX whitepaper (2025): 32 GB, 1,792 GB/s, 209.5 TFLOPS with float32 sums",
        ),
        Machine(
            name="cpu",
            memory_gb=64,
            bandwidth_gb_s=50,
            bf16_tflops=1,
            fp32_tflops=1,
            link_gb_s=10,
            network_gb_s=1,
            gpus_per_node=1,
            kernel_us=10,
            training_efficiency=None,  # CPUs, their cores and what else they do differ too much for one number
            source="a desktop of 16 cores with two channels of DDR5, roughly: --calibrate measures yours",
        ),
    )
}


def find_machine(text: str) -> Machine:
    """A machine by its name, or from a YAML file of one's own.

    Args:
        text: `h100-80gb`, or the path of a .yaml file with the fields of `Machine`.

    Raises:
        UserError: there is none, or its facts cannot be.
    """
    name = text.lower()
    if name in MACHINES:
        return MACHINES[name]
    if name.endswith((".yaml", ".yml")):
        return load_checked(
            Path(text), Machine, kind="machine file", example="docs/planning.md lists the facts of a machine"
        )
    within = [known for known in MACHINES if name.replace("-", "") in known.replace("-", "")]
    if len(within) == 1:
        return MACHINES[within[0]]
    bare = {known.replace("-", ""): known for known in MACHINES}
    near = difflib.get_close_matches(name.replace("-", "").replace("_", ""), bare, n=3, cutoff=0.4)
    raise UserError(
        f"no machine is called {text}",
        found=f"near it: {', '.join(bare[each] for each in near)}" if near else None,
        expected=f"one of {', '.join(MACHINES)}, or a .yaml file",
        fix="choose one, or describe yours in a file (docs/planning.md has one to copy)",
    )
