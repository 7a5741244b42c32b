"""The peak of live tensor memory of a training step, counted storage by storage as operations make them."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import AutoConfig, AutoModelForCausalLM

from zconvert.data.packing import Batch
from zconvert.planning.workload import Workload
from zconvert.tidar.model import LayoutModel
from zconvert.training.objective import packed_losses

SMALL = {
    **{"vocab_size": 2000, "hidden_size": 256, "num_hidden_layers": 3, "num_attention_heads": 8, "head_dim": 32},
    **{"num_key_value_heads": 2, "pad_token_id": None, "bos_token_id": None, "eos_token_id": None},
}
FAMILIES = {
    "llama": {"intermediate_size": 512},
    "mixtral": {"intermediate_size": 128, "num_local_experts": 8, "num_experts_per_tok": 2},
    "qwen3_moe": {"moe_intermediate_size": 128, "num_experts": 8, "num_experts_per_tok": 2},
    "zaya": {"moe_intermediate_size": 256, "num_experts": 8, "num_experts_per_tok": 1, "router_hidden_size": 32},
}
LOSS_CHUNK = 128


class LivePeak(TorchDispatchMode):
    """Counts bytes of storages from when an operation returns them until they are freed."""

    def __init__(self, *held: Any) -> None:
        """Counts what these modules and optimizers hold already."""
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()
        for each in held:
            tensors = each.parameters() if isinstance(each, torch.nn.Module) else tree_iter(dict(each.state))
            for tensor in tensors:
                self._count(tensor)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            self._count(tensor)
        return result

    def _count(self, tensor: Any) -> None:
        if not isinstance(tensor, torch.Tensor):
            return
        local = tensor.to_local() if hasattr(tensor, "to_local") else tensor
        storage = local.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def small_model(model_type: str) -> Any:
    """A model of random weights, in training mode."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SMALL, **FAMILIES[model_type])).train()
    model.config.use_cache = False
    return model


def peak_of_a_step(model: Any, work: Workload, vocabulary: int = SMALL["vocab_size"]) -> int:
    """Trains two steps of random tokens in float32 as training/loop.py does; the peak of the second one, in bytes.

    Args:
        model: of a causal family; in mode gated it is frozen here and gets its parts.
        work: the step's sizes.
        vocabulary: token ids that can be drawn; the last one is the mask token.
    """
    layouts = LayoutModel(model)
    trained: Any = model
    if work.gated is not None:
        model.requires_grad_(False).eval()
        trained = layouts.add_gated(work.gated)
        trained.gate.recompute = work.gradient_checkpointing
    elif work.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(trained.parameters(), fused=True)
    ids = torch.randint(5, vocabulary - 1, (work.micro_batch_size, work.sequence_len))
    batch = Batch(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        sums = packed_losses(
            layouts,
            batch,
            mask_token_id=vocabulary - 1,
            block_size=16,
            objective="data" if work.gated is None else "forward_kl",
            loss_chunk_size=work.loss_chunk_size,
        )
        ((sums.ar if work.gated is None else 0) + sums.diffusion).backward()
        layouts.release_gate()
        optimizer.step()

    step()
    optimizer.zero_grad(set_to_none=True)
    with LivePeak(model, *([trained] if work.gated is not None else []), optimizer) as counted:
        step()
    return counted.peak
