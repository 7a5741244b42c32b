"""The optimizers: which weights they decay, what Muon moves and how, and that each resumes exactly."""

from __future__ import annotations

import io
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from tests.contracts.models import make_model
from tests.training.runs import make_run
from zconvert.errors import UserError
from zconvert.recipe import MidtrainRecipe
from zconvert.training import stages
from zconvert.training.loop import Progress, Trainer
from zconvert.training.observers import Observer
from zconvert.training.optimizer import Muon, make_optimizer, orthogonal, set_learning_rate


def recipe(**changes: Any) -> MidtrainRecipe:
    return MidtrainRecipe(
        **{
            **{"base_model": "x", "output_dir": "y", "datasets": [{"path": "z"}], "max_steps": 1},
            **{"learning_rate": 0.01, "weight_decay": 0.2, **changes},
        }
    )


def give_gradients(model: nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)


def test_matrices_are_decayed_and_vectors_are_not() -> None:
    model = make_model("zaya")
    model.model.embed_tokens.requires_grad_(False)
    for name in ("adamw", "muon"):
        optimizer = make_optimizer(model.named_parameters(), recipe(optimizer=name))
        decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
        trained = [p for p in model.parameters() if p.requires_grad]
        assert len(decays) == len(trained) == sum(len(group["params"]) for group in optimizer.param_groups)
        assert all(decays[p] == (0.2 if p.ndim >= 2 else 0.0) for p in trained)


def test_a_run_steps_by_the_rate_of_its_schedule_along_clipped_gradients(tmp_path: Path) -> None:
    changes = {"max_steps": 2, "warmup_steps": 2, "learning_rate": 0.01, "weight_decay": 0.0, "max_grad_norm": 0.05}
    settings = make_run(tmp_path, "qwen3_moe", **changes)
    start = load_file(tmp_path / "init" / "model.safetensors")["model.embed_tokens.weight"].float()
    norms, moved = [], []

    class Look(Observer):
        def on_step(self, trainer: Trainer) -> None:  # type: ignore[override]
            gradients = [p.grad for p in trainer.trained.parameters() if p.grad is not None]
            norms.append(float(nn.utils.get_total_norm(gradients)))
            moved.append(float((trainer.model.get_input_embeddings().weight.detach() - start).abs().max()))

    stages.train(MidtrainRecipe(**settings), lambda _progress: None, observers=[Look()])
    assert norms == pytest.approx([0.05, 0.05], rel=1e-4)
    assert moved[0] == pytest.approx(0.01 / 2, rel=1e-3), "the first step of Adam moves a weight by the rate"


def test_muon_takes_hidden_matrices_and_experts_and_leaves_the_rest_to_adamw() -> None:
    model = make_model("zaya", tie_word_embeddings=False)
    optimizer = make_optimizer(model.named_parameters(), recipe(optimizer="muon"))
    by_muon = {p for group in optimizer.param_groups if group["muon"] for p in group["params"]}
    names = {name for name, p in model.named_parameters() if p in by_muon}
    assert any("experts.gate_up_proj" in name for name in names)
    assert any("q_proj" in name for name in names)
    assert not any(word in name for name in names for word in ("embed", "lm_head", "norm", "bias", "conv"))
    left = {name for name, p in model.named_parameters() if p.ndim >= 2} - names
    assert left
    assert all(any(word in name for word in ("embed", "lm_head", "conv")) for name in left), left


def test_muon_moves_a_matrix_as_torchs_own_and_every_expert_as_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    for shape in ((12, 20), (20, 12)):
        stack = nn.Parameter(torch.randn(3, *shape, generator=generator))
        matrices = [nn.Parameter(expert.clone()) for expert in stack.detach()]
        single = nn.Parameter(stack.detach()[0].clone())
        options = {"lr": 0.02, "weight_decay": 0.2, "momentum": 0.9}
        ours = Muon([{"params": [stack, single], "muon": True, **options}])
        theirs = torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options)
        for _ in range(3):
            stack.grad = torch.randn(stack.shape, generator=generator)
            single.grad = stack.grad[0].clone()
            for matrix, gradient in zip(matrices, stack.grad, strict=True):
                matrix.grad = gradient.clone()
            ours.step()
            theirs.step()
        # Bfloat16 products, made in another order.
        torch.testing.assert_close(stack.detach(), torch.stack([m.detach() for m in matrices]), rtol=0, atol=2e-3)
        torch.testing.assert_close(single.detach(), matrices[0].detach(), rtol=0, atol=2e-3)


def test_orthogonal_matrices_have_singular_values_of_about_one() -> None:
    made = orthogonal(torch.randn(4, 6, 16, generator=torch.Generator().manual_seed(0))).float()
    values = torch.linalg.svdvals(made)
    assert values.shape == (4, 6)
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muons_other_groups_are_adamw_bit_for_bit() -> None:
    model = make_model("qwen3_moe")
    twin = deepcopy(model)
    ours = make_optimizer(model.named_parameters(), recipe(optimizer="muon"))
    theirs = make_optimizer(twin.named_parameters(), recipe(optimizer="adamw"))
    for seed in range(3):
        give_gradients(model, seed)
        give_gradients(twin, seed)
        ours.step()
        theirs.step()
    assert torch.equal(model.model.embed_tokens.weight, twin.model.embed_tokens.weight)
    assert torch.equal(model.model.norm.weight, twin.model.norm.weight)
    assert not torch.equal(model.model.layers[0].mlp.experts.down_proj, twin.model.layers[0].mlp.experts.down_proj)


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_saved_state_goes_on_bit_for_bit(name: str) -> None:
    model = make_model("qwen3_moe")
    optimizer = make_optimizer(model.named_parameters(), recipe(optimizer=name))
    give_gradients(model, 0)
    optimizer.step()
    twin = deepcopy(model)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    other = make_optimizer(twin.named_parameters(), recipe(optimizer=name))
    other.load_state_dict(torch.load(stored, weights_only=True))
    for one, which in ((model, optimizer), (twin, other)):
        for seed in (1, 2):
            give_gradients(one, seed)
            which.step()
    for left, right in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_a_run_with_muon_learns_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    settings = make_run(tmp_path, save_dtype="float32", optimizer="muon", max_steps=6, save_steps=3)
    losses: list[float] = []

    def note(progress: Progress) -> None:
        if progress.metrics is not None:
            losses.append(progress.metrics["loss"])

    whole = load_file(stages.train(MidtrainRecipe(**settings), note) / "model.safetensors")
    assert losses[-1] < losses[0]
    state = next((tmp_path / "run").rglob("*step*3*"))
    other = {**settings, "output_dir": str(tmp_path / "other"), "resume_from_checkpoint": str(state)}
    resumed = load_file(stages.train(MidtrainRecipe(**other), note) / "model.safetensors")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_a_missing_library_is_named_with_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UserError, match="torchao") as caught:
        make_optimizer(make_model("qwen3_moe").named_parameters(), recipe(optimizer="adamw_8bit"))
    assert "zconvert[8bit]" in str(caught.value)


def test_a_learning_rate_held_in_a_tensor_stays_in_that_tensor() -> None:
    weight = nn.Parameter(torch.ones(3))
    plain = torch.optim.AdamW([weight], lr=0.1)
    compiled = torch.optim.AdamW([weight], lr=torch.tensor(0.1))
    tensor = compiled.param_groups[0]["lr"]
    for optimizer in (plain, compiled):
        set_learning_rate(optimizer, 0.025)
        assert float(optimizer.param_groups[0]["lr"]) == pytest.approx(0.025)
    assert compiled.param_groups[0]["lr"] is tensor


@pytest.mark.slow
def test_adamw_in_8_bits_resumes_bit_for_bit_and_follows_the_learning_rate() -> None:
    pytest.importorskip("torchao")
    torch.manual_seed(0)
    model = nn.Linear(128, 64, bias=False)
    optimizer = make_optimizer(model.named_parameters(), recipe(optimizer="adamw_8bit"))
    give_gradients(model, 0)
    optimizer.step()
    assert "8bit" in type(optimizer.state[model.weight]["exp_avg"]).__name__
    twin = deepcopy(model)
    stored = io.BytesIO()
    torch.save(optimizer.state_dict(), stored)
    stored.seek(0)
    other = make_optimizer(twin.named_parameters(), recipe(optimizer="adamw_8bit"))
    other.load_state_dict(torch.load(stored, weights_only=True))
    for one, which in ((model, optimizer), (twin, other)):
        set_learning_rate(which, 0.5)
        give_gradients(one, 1)
        before = one.weight.detach().clone()
        which.step()
        assert (one.weight - before).abs().max() > 0.1
    assert torch.equal(model.weight, twin.weight)
