"""A model that accelerate spread over devices decodes as one that lies on one."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model

from tests.contracts.families import make_family_model
from tests.contracts.models import MASK, random_ids
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Engine, run
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.positions import Positions
from zconvert.tidar.predecessors import Predecessors
from zconvert.tidar.settings import GatedParts, TidarSettings

PARTS = GatedParts(norms=True)
PLAN = DecodePlan.tidar(TidarSettings(4, MASK), Sampling(), frozenset(), proposals=(1, 3))


def texts(model: LayoutModel) -> list[tuple[list[int], list[int]]]:
    """What each text became, and what its forwards accepted: drafts count too."""
    requests = [Request(random_ids((5 + 3 * i,), seed=i).tolist(), 12, key=i) for i in range(3)]
    return [(r.tokens, r.accepted) for r in sorted(run(Engine(model, PLAN), requests), key=lambda r: r.request.key)]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("model_type", ["zaya", "gpt_oss", "lfm2_moe", "inkling_text", "llama4_text", "deepseek_v3"])
@torch.no_grad()
def test_hooks_that_carry_tensors_between_devices_change_nothing(model_type: str, gated: bool) -> None:
    stock = make_family_model(model_type)
    # Hooks as on several devices; there is but one here.
    spread = dispatch_model(copy.deepcopy(stock), {"": "cpu"}, force_hooks=True)
    assert any("_old_forward" in module.__dict__ for module in spread.modules())
    models = LayoutModel(stock), LayoutModel(spread)
    if gated:
        for model in models:
            torch.manual_seed(3)
            weights = model.add_gated(PARTS)
            weights.place(torch.float32)
            for parameter in weights.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    assert texts(models[0]) == texts(models[1])


def test_what_layers_are_handed_moves_with_them() -> None:
    index = torch.zeros(2, 5, dtype=torch.long)
    moved = Predecessors(index, 2, None).to("meta")
    assert (moved.index.device.type, moved._flat.device.type, moved.past) == ("meta", "meta", 2)
    positions = Positions(index, index).to("meta", non_blocking=True)
    assert {positions.query.device.type, positions.key.device.type} == {"meta"}
