"""`zconvert lm-eval`: EleutherAI's evaluation harness, which then knows the model `zconvert`."""

from __future__ import annotations

import importlib.util

import typer

from zconvert.errors import UserError

CONTEXT = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}
"""everything is lm-eval's own, --help too"""


def command(context: typer.Context) -> None:
    """Run EleutherAI's lm-eval with `--model zconvert`; everything behind is its own."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed", fix="pip install 'zconvert[lm-eval]'")
    from zconvert.evaluation.lm_eval_model import main

    main(context.args)
