"""`zconvert lm-eval`: EleutherAI's evaluation harness, which then knows the model `zconvert`."""

from __future__ import annotations

import importlib.util

import typer

from zconvert.errors import UserError

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "allow_interspersed_args": False}
"""what stands behind is lm-eval's own, `lm-eval run --help` too"""


def command(context: typer.Context) -> None:
    """Run EleutherAI's lm-eval, which then knows `--model zconvert`.

    Every argument is lm-eval's own; `zconvert lm-eval run --help` is its help. --model_args takes
    pretrained=CHECKPOINT, sampler=ar, lossless or mix:W, and block_size, dtype, device, revision and seed.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed", fix="pip install 'zconvert[lm-eval]'")
    from zconvert.evaluation.lm_eval_model import main

    main(context.args)
