"""Memory of a training step that FSDP spreads over two processes, against what each of them peaks at."""

from __future__ import annotations

import types
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.planning.peak import LOSS_CHUNK, SMALL, LivePeak, small_model
from zconvert.data.packing import Batch
from zconvert.planning.layouts import Layout
from zconvert.planning.memory import memory_of
from zconvert.planning.model import facts_from_config
from zconvert.planning.workload import Workload
from zconvert.tidar.model import LayoutModel
from zconvert.training.implementations import choose_experts
from zconvert.training.objective import packed_losses

LENGTH = 512
LONG = Workload(sequence_len=LENGTH, compute_bytes=4, loss_chunk_size=LOSS_CHUNK)
CASES = (
    ("qwen3_moe", LONG),
    ("qwen3_moe", replace(LONG, compute_bytes=2)),
    ("zaya", LONG),
    ("zaya", replace(LONG, gradient_checkpointing=False)),
    ("zaya", replace(LONG, gradient_accumulation_steps=2)),
)


def _peak(model_type: str, work: Workload) -> int:
    from torch.distributed.fsdp import fully_shard

    model, in_bfloat16 = small_model(model_type), work.compute_bytes == 2
    if work.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    layouts, mask = LayoutModel(model), SMALL["vocab_size"] - 1
    choose_experts(layouts, None, autocast=in_bfloat16)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)
    ids = torch.randint(5, mask, (1, LENGTH))
    batch = Batch(ids, torch.zeros_like(ids), torch.ones_like(ids, dtype=torch.bool))

    def losses(_: Any, unused: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=in_bfloat16):
            sums = packed_losses(layouts, batch, mask_token_id=mask, block_size=16, loss_chunk_size=LOSS_CHUNK)
        return sums.ar + sums.diffusion

    model.forward = types.MethodType(losses, model)  # FSDP gathers embedding and head around the root's forward

    def step() -> None:
        for last in [False] * (work.gradient_accumulation_steps - 1) + [True]:
            model.set_requires_gradient_sync(last)
            model(torch.zeros(1)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    step()
    with LivePeak(model, optimizer) as counted:
        step()
    return counted.peak


def _work(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    peaks = [_peak(*case) for case in CASES]
    if rank == 0:
        (Path(folder) / "peaks").write_text(" ".join(map(str, peaks)))
    dist.destroy_process_group()


def test_the_peak_of_a_sharded_step_is_predicted_within_10_percent(tmp_path: Path) -> None:
    mp.spawn(_work, (str(tmp_path),), nprocs=2)
    for (model_type, work), peak in zip(CASES, (tmp_path / "peaks").read_text().split(), strict=True):
        config = small_model(model_type).config.to_dict() | {"dtype": "float32"}
        predicted = memory_of(facts_from_config(config, model_type), work, Layout(2, fsdp=2)).total
        assert predicted == pytest.approx(int(peak), rel=0.10), (model_type, work)
