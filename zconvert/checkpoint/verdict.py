"""Whether a checkpoint can be converted, by its `config.json` and headers: what inspect says and convert-init obeys."""

from __future__ import annotations

from typing import Any

from zconvert.checkpoint.headers import Headers
from zconvert.checkpoint.quantisation import quantisation_problem
from zconvert.errors import UserError
from zconvert.tidar.families import FAMILIES, REFUSED, judge


def refusal(config: dict[str, Any], headers: Headers | None = None, *, gated: bool = False) -> str | None:
    """Why a checkpoint cannot be converted, in one sentence; None where it can.

    Args:
        config: its `config.json`.
        headers: its tensors; None where they are not known yet.
        gated: the conversion leaves every weight as it is.
    """
    packed = quantisation_problem(config, headers or Headers({}, ()), gated=gated)
    return own_code_of(config) or judge(config).reason or packed


def require_convertible(
    name: str, config: dict[str, Any], headers: Headers | None = None, *, gated: bool = False
) -> None:
    """Refuses a checkpoint that cannot be converted.

    Args:
        name: of the checkpoint, for the message.
        config: its `config.json`.
        headers: its tensors; None where they are not known yet.
        gated: the conversion leaves every weight as it is.

    Raises:
        UserError: it cannot be converted.
    """
    reason = refusal(config, headers, gated=gated)
    if reason is not None:
        raise UserError(
            f"{name} cannot be converted",
            found=reason,
            expected="a model of a known family whose layers mix tokens by attention (or CCA) alone, not quantised",
            fix="choose another checkpoint; `zconvert inspect` says which can be converted",
        )


def own_code_of(config: dict[str, Any]) -> str | None:
    """Why a checkpoint that needs code of its own is refused; None where it needs none.

    Code beside a model of a known family is no hindrance: transformers' own model is used.
    """
    brought, model_type = config.get("auto_map"), config.get("model_type")
    if not brought or (isinstance(model_type, str) and model_type in FAMILIES | REFUSED):
        return None
    if isinstance(config.get("text_config"), dict):
        return None  # judged by its text model
    references = brought.values() if isinstance(brought, dict) else ()
    files = sorted({f"{text.split('--')[-1].split('.')[0]}.py" for text in references if isinstance(text, str)})
    return (
        f"model_type {model_type!r} is of no known family, and the code that the checkpoint brings for it "
        f"({', '.join(files) or 'auto_map'}) is never run: it needs a model of transformers itself and a row in the "
        "family table (CONTRIBUTING.md shows how)"
    )


def sentence(error: UserError) -> str:
    """An error in one line, as a reason: what is wrong, what was found, what to do."""
    found = f" ({error.found})" if error.found else ""
    return " ".join(f"{error.what}{found}{f': {error.fix}' if error.fix else ''}".split())
