"""Routers are watched apart for clean tokens and mask slots, balanced, and left alone where they are frozen."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.contracts.families import FAMILY_MODELS, family_pair, make_family_model
from tests.contracts.models import MASK, make_model, perturb, random_ids
from tests.training.runs import make_run, metrics_of, train_until
from zconvert.data.packing import Batch
from zconvert.recipe import MidtrainRecipe
from zconvert.tidar.families import FAMILIES
from zconvert.tidar.layout import PADDING, packed_layout
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.settings import GatedParts
from zconvert.training import stages
from zconvert.training.balancing import BiasBalancer
from zconvert.training.moe import ROUTING_FILE
from zconvert.training.objective import packed_losses
from zconvert.training.routing import RouterWatch, changed_share, has_aux_loss, health, load_balancing_loss, routers_of

DOCUMENTS = torch.tensor([[0] * 10 + [1] * 5 + [PADDING], [0] * 7 + [1] * 9])
IDS = random_ids((2, 16), 0)
MIXTURES = sorted(name for name in FAMILY_MODELS if not FAMILIES[name].dense)


def packed(model: LayoutModel) -> Tensor:
    layout = packed_layout(DOCUMENTS, 4)
    return model.hidden_states(torch.cat([IDS, torch.full_like(IDS, MASK)], 1), layout)


@pytest.mark.parametrize("name", MIXTURES)
def test_every_mixture_has_routers_that_count_each_token_once_apart_from_padding(name: str) -> None:
    pair = family_pair(name)
    watch = RouterWatch(pair.layout)
    with torch.no_grad():
        packed(pair.layout)
    watch.close()
    counts = watch.take_counts()
    k = 1 if name in ("zaya", "llama4_text") else 2
    assert len(counts) == len(watch.routers) > 0
    assert [c.sum(1).tolist() for c in counts] == [[31 * k, 31 * k]] * len(counts)


@pytest.mark.parametrize("name", ["mixtral", "zaya"])
def test_what_is_counted_for_clean_tokens_is_what_the_plain_model_chooses(name: str) -> None:
    model = LayoutModel(perturb(make_model(name), 0.4))
    watch = RouterWatch(model)
    layout = packed_layout(torch.zeros(2, 16, dtype=torch.long), 4)
    with torch.no_grad():
        model.hidden_states(torch.cat([IDS, torch.full_like(IDS, MASK)], 1), layout)
    clean = [c[0] for c in watch.take_counts()]
    seen: list[Tensor] = []
    for router in watch.routers:

        def listen(_module: Any, _inputs: Any, output: Any, router: Any = router) -> None:
            logits = output[0]
            if name == "zaya":
                chosen = (logits.softmax(-1) + router.module.balancing_biases).argmax(-1)
            else:
                chosen = output[2].flatten()
            seen.append(torch.bincount(chosen, minlength=logits.shape[-1]))

        router.module.register_forward_hook(listen)
    with torch.no_grad():
        model.model(IDS)
    assert all(torch.equal(a, b) for a, b in zip(clean, seen, strict=True))


def test_a_dense_model_has_no_routers() -> None:
    assert routers_of(make_family_model("llama").get_decoder()) == []


def losses(model: LayoutModel, watch: RouterWatch) -> Tensor:
    batch = Batch(IDS, DOCUMENTS, torch.ones_like(IDS, dtype=torch.bool))
    sums = packed_losses(model, batch, mask_token_id=MASK, block_size=4)
    return sums.ar + sums.diffusion + 10 * load_balancing_loss(watch.take_logits(), watch.top_k)


def test_recomputing_layers_changes_neither_counts_nor_gradients() -> None:
    gradients, counts = [], []
    for checkpointing in (False, True):
        model = LayoutModel(make_model("qwen3_moe"))
        watch = RouterWatch(model)
        watch.keep_logits = True
        model.model.train()
        model.model.config.use_cache = False
        if checkpointing:
            model.model.gradient_checkpointing_enable({"use_reentrant": False})
        losses(model, watch).backward()
        assert watch.take_logits() == []
        counts.append(watch.take_counts())
        gradients.append([p.grad for p in model.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*counts, strict=True))
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "dbrx", "granitemoe", "ernie4_5_moe", "minimax_m2"])
def test_the_aux_loss_is_the_familys_own_over_clean_tokens_and_mask_slots(name: str) -> None:
    pair = family_pair(name)
    watch = RouterWatch(pair.layout)
    watch.keep_logits = True
    with torch.no_grad():
        packed(pair.layout)
    watch.close()
    assert has_aux_loss(pair.layout.decoder)
    logits = watch.take_logits()
    own = importlib.import_module(type(pair.plain).__module__).load_balancing_loss_func
    real = torch.cat([DOCUMENTS, DOCUMENTS], 1) != PADDING
    expected = own(tuple(layer for layer, _ in logits), logits[0][0].shape[-1], watch.top_k, real)
    assert load_balancing_loss(logits, watch.top_k) == pytest.approx(float(expected), abs=1e-6)


def test_an_even_load_has_full_entropy_and_a_collapsed_one_none() -> None:
    counts = [torch.tensor([[5, 5, 5, 5], [0, 20, 0, 0]])]
    clean, mask = health(counts, "clean"), health(counts, "mask")
    assert clean is not None
    assert mask is not None
    assert (clean.entropy, clean.dead, clean.busiest) == ([1.0], [0], [1.0])
    assert (mask.entropy, mask.effective, mask.dead, mask.busiest) == ([0.0], [1.0], [3], [4.0])
    assert mask.load == [[0.0, 1.0, 0.0, 0.0]]


def test_the_class_that_skips_a_layer_is_not_a_dead_expert() -> None:
    state = health([torch.tensor([[5, 5, 0], [4, 4, 2]])], "mask", skips=1)
    assert state is not None
    assert (state.dead, state.entropy, state.skipped) == ([0], [1.0], 0.2)


def test_balancing_steps_against_excess_load_and_leaves_the_skipping_class() -> None:
    model = make_model("zaya")
    routers = routers_of(model.get_decoder())
    before = [router.bias.clone() for router in routers if router.bias is not None]
    BiasBalancer(routers, 0.25).step([torch.tensor([[6, 1, 0, 1, 9], [0, 1, 2, 1, 9]])] * len(routers))
    for router, old in zip(routers, before, strict=True):
        assert router.bias is not None
        assert (router.bias - old).tolist() == [-0.25, 0.25, 0.25, 0.25, 0.0]


def test_balancing_spreads_a_lopsided_router() -> None:
    model = LayoutModel(make_model("zaya"))
    watch = RouterWatch(model)
    for router in watch.routers:
        assert router.bias is not None
        router.bias[0] = 0.1
    balancer = BiasBalancer(watch.routers, 0.01)
    loads = []
    for _ in range(30):
        with torch.no_grad():
            packed(model)
        counts = watch.take_counts()
        loads.append(max(float(c.sum(0).max() / c.sum()) for c in counts))
        balancer.step(counts)
    assert loads[0] == 1.0
    assert min(loads[15:]) < 0.7


def test_changed_choices_are_found_whatever_their_order() -> None:
    before = [torch.tensor([[0, 1], [2, 3]]), torch.tensor([[0], [1]])]
    after = [torch.tensor([[1, 0], [3, 2]]), torch.tensor([[0], [2]])]
    assert changed_share(before, after) == [0.0, 0.5]


def test_the_clean_half_alone_gives_the_clean_half_of_the_row() -> None:
    model = LayoutModel(make_model("zaya_sliding"))
    with torch.no_grad():
        alone = model.hidden_states(IDS, packed_layout(DOCUMENTS, 4).halves()[0])
        assert torch.allclose(alone, packed(model)[:, :16], atol=1e-5)


def test_mask_slots_that_never_meet_the_router_are_not_counted() -> None:
    model = LayoutModel(make_model("mixtral"))
    model.add_gated(GatedParts(rank=2, mlp="replace", mlp_width=8))
    watch = RouterWatch(model)
    with torch.no_grad():
        packed(model)
    counts = watch.take_counts()
    assert [c.sum(1).tolist() for c in counts] == [[62, 0]] * len(counts)
    assert health(counts, "mask") is None


def train(settings: dict[str, Any]) -> tuple[Path, list[str]]:
    said: list[str] = []
    folder = stages.train(MidtrainRecipe(**settings), lambda p: said.append(p.message) if p.message else None)
    return folder, said


def test_a_run_tells_health_and_drift_and_writes_the_loads(tmp_path: Path) -> None:
    settings = make_run(tmp_path, "qwen3_moe", max_steps=4, logging_steps=2, moe={"probe_steps": 3})
    _, said = train(settings)
    assert "load-balancing loss: coefficient 0.001, from config.json or its family's default" in said
    rows = metrics_of(tmp_path / "run")
    assert ["drift" in row["moe"] for row in rows] == [False, True]
    assert rows[0]["moe"].keys() >= {"clean", "mask", "aux_loss"}
    assert rows[-1]["moe"]["drift"] > 0
    loads = json.loads((tmp_path / "run" / ROUTING_FILE).read_text())
    assert loads["step"] == 4
    assert [round(sum(load), 6) for load in loads["mask"]] == [1.0] * len(loads["routers"])


def test_frozen_routers_do_not_move(tmp_path: Path) -> None:
    settings = make_run(tmp_path, max_steps=3, save_dtype="float32", moe={"router": "freeze"}, weight_decay=0.5)
    folder, said = train(settings)
    assert any("routers stay as they are" in line for line in said)
    before = load_file(Path(settings["base_model"]) / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    moved = {name for name in before if not torch.equal(before[name].float(), after[name].float())}
    assert moved
    assert not [name for name in moved if ".gate." in name]


def test_balancing_biases_move_by_the_rate_and_are_saved(tmp_path: Path) -> None:
    settings = make_run(tmp_path, max_steps=1, warmup_steps=0, save_dtype="float32", moe={"balancing_rate": 0.25})
    folder, _ = train(settings)
    before = load_file(Path(settings["base_model"]) / "model.safetensors")
    after = load_file(folder / "model.safetensors")
    names = [name for name in before if name.endswith("balancing_biases")]
    assert names
    for name in names:
        steps = ((after[name] - before[name]) / 0.25).tolist()
        assert set(steps) <= {-1.0, 0.0, 1.0}
        assert steps[-1] == 0.0
        assert any(steps)


def test_a_collapse_of_mask_slots_is_told_once(tmp_path: Path) -> None:
    settings = make_run(tmp_path, "mixtral", max_steps=4, moe={"collapse_warning": 1.0, "aux_loss_coef": 0.0})
    _, said = train(settings)
    assert len([line for line in said if "mask slots collapse onto few experts" in line]) == 1


def test_the_aux_loss_moves_the_weights(tmp_path: Path) -> None:
    shared = make_run(tmp_path, "mixtral", max_steps=1, warmup_steps=0, save_dtype="float32", max_grad_norm=1e9)
    without, _ = train({**shared, "moe": {"aux_loss_coef": 0.0}, "output_dir": str(tmp_path / "a")})
    with_it, _ = train({**shared, "moe": {"aux_loss_coef": 10.0}, "output_dir": str(tmp_path / "b")})
    a, b = (load_file(folder / "model.safetensors") for folder in (without, with_it))
    assert any(not torch.equal(a[name], b[name]) for name in a if ".gate." in name)


def test_what_was_counted_before_a_stop_is_told_by_the_run_that_goes_on(tmp_path: Path) -> None:
    settings = make_run(tmp_path, "mixtral", max_steps=8, logging_steps=3, save_steps=4, moe={"probe_steps": 4})
    train({**settings, "output_dir": str(tmp_path / "whole")})
    train_until(MidtrainRecipe(**settings), 6)
    train(settings)
    assert metrics_of(tmp_path / "run") == metrics_of(tmp_path / "whole")
    assert "drift" in metrics_of(tmp_path / "run")[1]["moe"]
