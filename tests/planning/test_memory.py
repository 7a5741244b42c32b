"""Memory estimates against what autograd keeps, what a tiny run peaks at, and the estimates of others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.planning.models import QWEN3_30B, ZAYA_8B, facts
from tests.planning.peak import FAMILIES, LOSS_CHUNK, SMALL, peak_of_a_step, small_model
from zconvert.checkpoint.load import load_model
from zconvert.checkpoint.source import resolve
from zconvert.planning.layouts import Layout
from zconvert.planning.memory import layer_bytes, memory_of
from zconvert.planning.model import facts_from_config
from zconvert.planning.workload import Workload, workload_of
from zconvert.recipe import MidtrainRecipe, load_recipe
from zconvert.tidar.layout import packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts

GB = 1e9


def kept_bytes(model_type: str, tokens: int) -> tuple[float, dict[str, Any]]:
    """Bytes a token and layer that autograd keeps of a forward over a packed row, weights not counted."""
    model = small_model(model_type)
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    layout = packed_layout(torch.zeros(1, tokens, dtype=torch.long), 16, 0)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        LayoutModel(model).hidden_states(torch.randint(5, 60, (1, 2 * tokens)), layout)
    size = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    return size / (2 * tokens) / model.config.num_hidden_layers, model.config.to_dict()


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_layer_keeps_what_the_formula_says_within_6_percent(model_type: str) -> None:
    measured, config = kept_bytes(model_type, 64)
    predicted = layer_bytes(facts_from_config(config, model_type), Workload(compute_bytes=4))
    assert predicted == pytest.approx(measured, rel=0.06)


def workload(*, checkpointing: bool, gated: GatedParts | None = None) -> Workload:
    sizes = {"sequence_len": 512, "micro_batch_size": 2, "compute_bytes": 4, "loss_chunk_size": LOSS_CHUNK}
    return Workload(gradient_checkpointing=checkpointing, gated=gated, **sizes)


def planned_and_measured(model: Any, work: Workload, vocabulary: int = SMALL["vocab_size"]) -> tuple[float, float]:
    """Peaks of a step in bytes."""
    planned = memory_of(facts_from_config(model.config.to_dict() | {"dtype": "float32"}, "small"), work, Layout())
    return planned.total, peak_of_a_step(model, work, vocabulary)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_peak_of_a_training_step_is_predicted_within_5_percent(model_type: str, checkpointing: bool) -> None:
    planned, measured = planned_and_measured(small_model(model_type), workload(checkpointing=checkpointing))
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_peak_of_a_gated_step_is_predicted_within_20_percent(model_type: str, checkpointing: bool) -> None:
    """A chunk's logits and a layer that is run again do not meet, and are added all the same."""
    parts = GatedParts(rank=8, mlp_width=64)
    planned, measured = planned_and_measured(
        small_model(model_type), workload(checkpointing=checkpointing, gated=parts)
    )
    assert planned == pytest.approx(measured, rel=0.20)


@pytest.mark.parametrize("mode", ["full", "gated"])
def test_the_peak_of_a_step_of_the_quickstart_is_predicted_within_5_percent(mode: str) -> None:
    root = Path(__file__).parents[2]
    recipe = root / "recipes" / ("quickstart" if mode == "full" else "quickstart-gated") / "midtrain.yaml"
    parts = GatedParts() if mode == "gated" else None
    model, _ = load_model(resolve(root / "examples" / "tiny-zaya" / "checkpoint"), dtype="float32", device="cpu")
    quickstart = workload_of(load_recipe(recipe, MidtrainRecipe), 16, parts)
    planned, measured = planned_and_measured(model.train(), quickstart, model.config.vocab_size)
    assert planned == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(("sequence_len", "estimate"), [(16_384, 39), (32_768, 53)])
def test_zaya1_8b_on_8_gpus_takes_what_was_estimated_by_hand_within_20_percent(
    sequence_len: int, estimate: float
) -> None:
    """32k and 64k packed tokens a GPU, full parameters, checkpointing; by hand layers were gathered in bfloat16."""
    memory = memory_of(facts("zaya", ZAYA_8B), Workload(sequence_len=sequence_len), Layout(8, fsdp=8))
    assert memory.total / GB == pytest.approx(estimate, rel=0.20)
    states = memory.parameters + memory.gradients + memory.optimizer
    assert states / GB == pytest.approx(17.7, rel=0.01)


def test_128k_contexts_take_cp_4_or_8_as_estimated_by_hand() -> None:
    for context_parallel, estimate in ((4, 53), (8, 39)):
        layout = Layout(8, fsdp=8, context_parallel=context_parallel)
        memory = memory_of(facts("zaya", ZAYA_8B), Workload(sequence_len=131_072), layout)
        assert memory.total / GB == pytest.approx(estimate, rel=0.20)


def test_states_of_qwen3_30b_take_61_gb_on_8_gpus_and_8_bit_adam_saves_three_eighths() -> None:
    model = facts("qwen3_moe", QWEN3_30B)
    for optimizer, estimate in (("adamw", 61.1), ("adamw_8bit", 61.1 * 10 / 16), ("muon", 61.1 * 12 / 16)):
        memory = memory_of(model, Workload(optimizer=optimizer), Layout(8, fsdp=8))  # type: ignore[arg-type]
        states = memory.parameters + memory.gradients + memory.optimizer
        assert states / GB == pytest.approx(estimate, rel=0.01)


def test_gated_mode_keeps_the_source_as_stored_and_trains_little() -> None:
    model = facts("zaya", ZAYA_8B)
    work = Workload(gated=GatedParts())
    full, gated = (memory_of(model, each, Layout()) for each in (Workload(), work))
    trained = model.gated_parameters(GatedParts())
    assert gated.parameters == model.stored_bytes + 4 * trained
    assert gated.gradients == 4 * trained
    assert gated.optimizer == 8 * trained
    assert gated.total < full.total / 5
    four = memory_of(model, Workload(gated=GatedParts(), source_bits=4), Layout())
    assert model.stored_bytes / four.parameters == pytest.approx(2.8, rel=0.1)
    as_loaded = memory_of(model, Workload(gated=GatedParts(), source_bits=32), Layout())
    assert as_loaded.parameters - gated.parameters == 2 * model.total


def test_a_gated_clean_half_leaves_its_keys_and_values_only() -> None:
    model = facts("zaya", ZAYA_8B)
    tokens = 1024
    short, long = (
        memory_of(model, Workload(gated=GatedParts(), sequence_len=length), Layout()).packed_sequence
        for length in (4096, 4096 + tokens)
    )
    keys_and_values = 2 * model.kv_width
    layer_inputs = model.layers * (4 * model.hidden + 2 * model.carried)
    assert (long - short) / tokens == keys_and_values + layer_inputs + 5 * 4 * model.hidden


def test_checkpointing_trades_activations_for_layer_inputs() -> None:
    model = facts("zaya", ZAYA_8B)
    without, with_it = (memory_of(model, Workload(gradient_checkpointing=each), Layout()) for each in (False, True))
    assert without.activations == pytest.approx(model.layers * with_it.activations)
    assert with_it.packed_sequence > without.packed_sequence
    assert with_it.total < without.total


def test_parts_add_up() -> None:
    memory = memory_of(facts("zaya", ZAYA_8B), Workload(), Layout(8, fsdp=8, context_parallel=2))
    assert memory.total == sum(memory.parts().values())
    assert all(size > 0 for size in memory.parts().values())
