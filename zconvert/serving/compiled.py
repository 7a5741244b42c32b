"""An engine whose forwards over texts torch has compiled, made ready before anybody waits for it."""

from __future__ import annotations

import warnings

import torch

from zconvert.errors import UserError, out_of_memory
from zconvert.tidar.acceptance import Sampling
from zconvert.tidar.cache import GROWTH
from zconvert.tidar.decoding import DecodePlan, Request
from zconvert.tidar.engine import Counters, Engine
from zconvert.tidar.model import LayoutModel


def compiled_engine(
    model: LayoutModel,
    plan: DecodePlan,
    max_batch: int,
    mode: str = "default",
) -> Engine:
    """An engine of fixed shapes, after forwards of all its shapes: this takes a minute or more.

    Args:
        model: its decoder is compiled once, whatever engines follow.
        plan: may not change afterwards, or is compiled for again.
        max_batch: texts decoded at a time.
        mode: of torch.compile; `reduce-overhead` adds CUDA graphs.

    Raises:
        UserError: the model does not compile here.
    """
    if not model.compiled:
        model.compile(mode=mode)
    engine = Engine(model, plan, max_batch=max_batch, fixed_shapes=True)
    # About what transformers caches by its own versions, which stay as they are.
    warnings.filterwarnings("ignore", message="Dynamo detected a call to a `functools.lru_cache`")
    # One row, then several, and texts of more slots: torch, which takes a size for granted until it changes, then knows
    # which ones vary.
    rounds = [(rows, length) for rows in sorted({1, min(2, max_batch), max_batch}) for length in (1, GROWTH + 1)]
    for rows, length in rounds:
        try:
            _decode_some(engine, rows, length)
        except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
            if out_of_memory(error) is not None:
                raise
            cause = getattr(error, "inner_exception", error)  # what torch wraps up with advice for its developers
            raise UserError(
                "torch cannot compile this model here",
                found=f"{type(cause).__name__}: {str(cause).partition(chr(10))[0]}",
                expected="on a CPU, a C++ compiler such as g++; on a GPU, triton",
                fix="install it, or leave --compile out",
            ) from error
    engine.counters = Counters()
    return engine


def _decode_some(engine: Engine, rows: int, length: int) -> None:
    """Both forwards of a text that takes two kinds in turn, over some rows; then they are cancelled."""
    token = 1 if engine.plan.mask_token_id == 0 else 0
    request = Request([token] * length, 4 * engine.plan.block_size, Sampling(), eos_token_ids=frozenset())
    texts = [engine.add(request) for _ in range(rows)]
    for _ in range(2):
        engine.step()
    for text in texts:
        engine.cancel(text)
    while not engine.idle:
        engine.step()
