"""The optimizers of training, by name: AdamW, Muon with AdamW for what is no hidden matrix, and AdamW in 8 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from zconvert.errors import UserError
from zconvert.recipe import TrainingRecipe

OUTER = ("embed", "wte", "lm_head")
"""what an embedding or output head has in its name: Muon is for the matrices between them"""
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
"""coefficients of the iteration, as in torch.optim.Muon"""
NEWTON_SCHULZ_STEPS = 5


def make_optimizer(
    named_parameters: Iterable[tuple[str, nn.Parameter]], recipe: TrainingRecipe
) -> torch.optim.Optimizer:
    """An optimizer over what is trained. Matrices are decayed; norms, biases and scales are not.

    Args:
        named_parameters: of the model; those without gradients are left out.
        recipe: its optimizer, learning rate, decay and Adam's settings.

    Returns:
        An optimizer whose `state_dict` resumes it exactly.

    Raises:
        UserError: the library that it takes is not installed.
    """
    named = [(name, p) for name, p in named_parameters if p.requires_grad]
    vectors = {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0}
    matrices = [(name, p) for name, p in named if p.ndim >= 2]
    options: dict[str, Any] = {
        "lr": recipe.learning_rate,
        "betas": (recipe.adam_beta1, recipe.adam_beta2),
        "eps": recipe.adam_epsilon,
    }
    if recipe.optimizer == "muon":
        hidden = [p for name, p in matrices if _is_hidden(name, p)]
        others = [p for name, p in matrices if not _is_hidden(name, p)]
        groups = [
            {"params": others, "weight_decay": recipe.weight_decay, "muon": False},
            {**vectors, "muon": False},
            {"params": hidden, "weight_decay": recipe.weight_decay, "muon": True, "momentum": recipe.muon_momentum},
        ]
        return Muon([group for group in groups if group["params"]], **options, fused=True)
    groups = [{"params": [p for _, p in matrices], "weight_decay": recipe.weight_decay}, vectors]
    if recipe.optimizer == "adamw_8bit":
        return _eight_bit()([group for group in groups if group["params"]], **options)
    return torch.optim.AdamW(groups, **options, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Sets the learning rate of every group."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)  # compiled optimizers (torchao's) hold it in a tensor
        else:
            group["lr"] = rate


def _is_hidden(name: str, parameter: nn.Parameter) -> bool:
    """A matrix inside the model, or a layer's experts' matrices stacked; no embedding, head or convolution."""
    between = not any(word in name for word in OUTER)
    return between and (parameter.ndim == 2 or (parameter.ndim == 3 and "experts" in name))


def _eight_bit() -> Any:
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise UserError(
            "optimizer adamw_8bit needs the library torchao",
            found=error,
            fix="pip install 'zconvert[8bit]', or set optimizer to adamw",
        ) from error
    return AdamW8bit


class Muon(torch.optim.AdamW):
    """Muon for groups marked `muon`, AdamW for the others; one state for both.

    As `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, under which AdamW's learning rate and decay serve both.
    That one takes matrices alone; here each expert of a stack (experts, out, in) is a matrix of its own, since in a
    mixture of experts nearly all weights are.

    Source: Jordan's Muon, and Muon is Scalable for LLM Training (arXiv 2502.16982).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Moves every parameter that has a gradient."""
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group["muon"]]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        for group in groups:
            if group["muon"]:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self._move(parameter, group)
        return loss

    def _move(self, parameter: nn.Parameter, group: dict[str, Any]) -> None:
        gradient, state, momentum = parameter.grad, self.state[parameter], group["momentum"]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)  # AdamW looks for it when a state is loaded
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state["step"] += 1
        state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = orthogonal(gradient.lerp(state["momentum_buffer"], momentum))
        rate = group["lr"] * 0.2 * max(parameter.shape[-2:]) ** 0.5
        parameter.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-rate)


def orthogonal(matrices: Tensor) -> Tensor:
    """(…, m, n) -> (…, m, n) bfloat16: the nearest matrices with singular values of about 1, by Newton and Schulz."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16().view(-1, *matrices.shape[-2:])
    tall = x.shape[-2] > x.shape[-1]
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).reshape(matrices.shape)
