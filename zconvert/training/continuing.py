"""What decides a run's next step: taken from a trainer into a train state, and given back to one."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from zconvert.errors import UserError
from zconvert.formats import TRAIN_STATE, up_to_date
from zconvert.training.metrics import Window
from zconvert.training.state import State, save_state

if TYPE_CHECKING:
    from zconvert.training.loop import Trainer

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


def save_run(trainer: Trainer) -> None:
    """Writes the train state of a trainer between two steps; every process calls it.

    Raises:
        UserError: the disk is full or not writable, or a number is not finite; earlier states are as they were.
    """
    parallel, recipe = trainer.parallel, trainer.recipe
    parallel.rest(trainer.model)
    cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None
    numbers = {
        "format_version": TRAIN_STATE,
        "step": trainer.step,
        "tokens_seen": trainer.tokens_seen,
        "data": trainer.rows.state_dict(),
        "random": parallel.gather((torch.get_rng_state(), cuda)),
        "window": vars(trainer.window),
        "observers": [observer.state_dict() for observer in trainer.observers],
    }
    tensors = _tensors_of(trainer, _optimizer_state(trainer))
    # Buffers may hold infinities by design.
    fixed = _named("model.", dict(trainer.trained.named_buffers()))
    learned = {name: tensor for name, tensor in tensors.items() if name not in fixed}
    spoilt = [name for names in parallel.gather(list(_not_finite(learned))) for name in names]
    if spoilt:
        raise UserError(
            f"step {trainer.step} of {recipe.stage} left numbers that are not finite; they are not saved",
            found=spoilt[0],
            fix=f"lower learning_rate; {unharmed(trainer.run_dir)}",
        )
    save_state(trainer.run_dir, trainer.step, numbers, tensors, recipe.save_total_limit, parallel)


def resume_run(trainer: Trainer, state: State) -> None:
    """Puts a trainer to where `save_run` was called; every process calls it.

    Args:
        trainer: before its run.
        state: of the run, found whole.

    Raises:
        UserError: the state is of other data or another model.
    """
    parallel = trainer.parallel
    numbers = up_to_date(
        state.numbers, f"the train state {state.folder}", TRAIN_STATE, [lambda old: _with_tokens_seen(trainer, old)]
    )
    trainer.rows.load_state_dict(numbers["data"])
    optimizer = _optimizer_state(trainer)
    state.read_into(_tensors_of(trainer, optimizer), parallel)
    set_optimizer_state_dict(trainer.trained, trainer.optimizer, optimizer, options=_FLAT)
    trainer.step, trainer.tokens_seen = numbers["step"], numbers["tokens_seen"]
    trainer.window = Window(**numbers["window"])
    # A recipe may ask for an evaluation, the last of them, that it did not ask for before; or no more.
    for observer, observed in zip(trainer.observers, numbers["observers"], strict=False):
        observer.load_state_dict(observed)
    if len(numbers["random"]) == parallel.world:
        cpu, cuda = numbers["random"][parallel.rank]
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state(cuda)


def unharmed(run_dir: Path) -> str:
    """What is said where a run stops before it spoils anything."""
    return f"the newest state in {run_dir} is as it was, and the same command goes on from there"


def _tensors_of(trainer: Trainer, optimizer: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a state by name, tied weights once; they share the memory of model and optimizer."""
    seen: dict[int, str] = {}
    weights = trainer.trained.state_dict(keep_vars=True)
    once = {name: t.detach() for name, t in weights.items() if seen.setdefault(id(t), name) == name}
    return {**_named("model.", once), **_named("optimizer.", _tensors(optimizer))}


def _optimizer_state(trainer: Trainer) -> dict[str, Any]:
    """By names of parameters, so that it does not depend on how they are grouped."""
    return get_optimizer_state_dict(trainer.trained, trainer.optimizer, options=_FLAT)


def _with_tokens_seen(trainer: Trainer, numbers: dict[str, Any]) -> dict[str, Any]:
    """A state of version 0 did not count them: every step had as many, unless the number of processes changed."""
    recipe, processes = trainer.recipe, len(numbers["random"]) // trainer.parallel.context
    rows = recipe.micro_batch_size * recipe.gradient_accumulation_steps * processes
    return {**numbers, "tokens_seen": numbers["step"] * rows * recipe.sequence_len}


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _not_finite(tensors: dict[str, Tensor]) -> Iterator[str]:
    """The first of them that holds NaN or infinity in this process's shard."""
    for name, tensor in tensors.items():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
        # Smallest and largest see both, and take no memory. Numbers in 8 bits have neither.
        if local.dtype.is_floating_point and local.dtype.itemsize > 1 and local.numel():
            low, high = torch.aminmax(local)
            if not (math.isfinite(low) and math.isfinite(high)):
                yield name
                return


def _tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of an optimizer's state; of those that are made of others (in 8 bits, with scales) the others."""
    found: dict[str, Tensor] = {}
    for name, value in state.items():
        if is_traceable_wrapper_subclass(value) and not isinstance(value, DTensor):
            inner, _ = value.__tensor_flatten__()
            found |= _tensors({f"{name}.{part}": getattr(value, part) for part in inner})
        elif isinstance(value, Tensor) and name.startswith("state."):  # the rest is in the recipe
            found[name] = value
    return found
