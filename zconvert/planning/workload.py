"""What a training stage does, as far as memory and time depend on it: from its recipe, or from defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, GatedParts

if TYPE_CHECKING:
    from zconvert.recipe import ParallelRecipe, TrainingRecipe

BYTES = {"float32": 4, "bfloat16": 2}
"""of a number"""


@dataclass(frozen=True)
class Workload:
    """One stage of training.

    A packed row has the clean tokens, and a mask slot for each (or for `diffusion_fraction` of them).
    """

    stage: str = "midtrain"
    sequence_len: int = 4096
    """T, clean tokens a row"""
    micro_batch_size: int = 1
    """rows a forward, on each data-parallel device"""
    gradient_accumulation_steps: int = 1
    max_steps: int | None = None
    """None: as many as the token budget takes"""
    compute_bytes: int = 2
    """of a number in the forward pass"""
    gradient_checkpointing: bool = True
    loss_chunk_size: int | None = None
    """tokens whose logits are made at a time; None: as training/loss.py chooses"""
    optimizer: Literal["adamw", "adamw_8bit", "muon"] = "adamw"
    gated: GatedParts | None = None
    """None: full mode, every weight is trained"""
    source_bits: int | None = None
    """bits a parameter of a frozen source takes (gated mode): 4 and 8 are packed; None: as it is stored"""
    diffusion_fraction: float = 1.0
    """mask slots for each clean token"""
    block_size: int = DEFAULT_BLOCK_SIZE
    save_total_limit: int = 2
    """train states kept"""
    parallel: ParallelRecipe | None = None
    """how the recipe has devices share the work; None: it does not say"""
    sync_every_forward: bool = False
    """gradients are summed over devices after every forward, not once a step"""

    @property
    def tokens_per_row(self) -> float:
        """Tokens of a packed row."""
        return (1 + self.diffusion_fraction) * self.sequence_len

    @property
    def gathered_bytes(self) -> int:
        """Of a weight that FSDP gathers: in full mode the float32 one, which autocast casts."""
        return 4 if self.gated is None else self.compute_bytes

    def gathers_gradients(self, sharded: bool) -> bool:
        """Whether each device adds up the whole model's gradient over the forwards of a step."""
        return sharded and self.gated is None and self.gradient_accumulation_steps > 1 and not self.sync_every_forward

    @property
    def learning(self) -> float:
        """The share of a row's tokens that gradients are asked of: in gated mode the mask slots."""
        return 1.0 if self.gated is None else self.diffusion_fraction / (1 + self.diffusion_fraction)

    @property
    def state_bytes(self) -> float:
        """Of the optimizer, for each trained parameter."""
        return {"adamw": 8.0, "adamw_8bit": 2 + 2 / 128, "muon": 4.0}[self.optimizer]


def workload_of(recipe: TrainingRecipe, block_size: int, gated: GatedParts | None) -> Workload:
    """The stage that a recipe describes.

    Args:
        recipe: of a training stage.
        block_size: B of the checkpoint.
        gated: the parts of a gated checkpoint; None: full mode.
    """
    return Workload(
        stage=recipe.stage,
        sequence_len=recipe.sequence_len,
        micro_batch_size=recipe.micro_batch_size,
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        max_steps=recipe.max_steps,
        compute_bytes=BYTES[recipe.dtype],
        gradient_checkpointing=recipe.gradient_checkpointing,
        loss_chunk_size=recipe.loss_chunk_size,
        optimizer=recipe.optimizer,
        gated=gated,
        source_bits={"8bit": 8, "4bit": 4}.get(recipe.quantization or "", frozen_bits(BYTES[recipe.dtype])),
        diffusion_fraction=recipe.diffusion.diffusion_fraction,
        block_size=block_size,
        save_total_limit=recipe.save_total_limit,
        parallel=recipe.parallel if recipe.parallel.model_fields_set - {"sync_every_forward"} else None,
        sync_every_forward=recipe.parallel.sync_every_forward,
    )


def frozen_bits(compute_bytes: int) -> int | None:
    """Bits a parameter of a frozen source takes where nothing packs it; None: as many as on disk.

    training/stages.py loads it as it is stored where the forward pass is in bfloat16, and in float32 otherwise.
    """
    return 32 if compute_bytes == BYTES["float32"] else None
