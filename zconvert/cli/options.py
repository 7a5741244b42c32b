"""Options that several commands share, so that each is worded, checked and named in one place. No torch here."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

import typer

from zconvert.tidar.settings import check_proposals


class Dtype(StrEnum):
    """Values of --dtype."""

    AUTO = "auto"
    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"


class Device(StrEnum):
    """Values of --device."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder, a training run's folder, or a Hub id.")
]
BlockSize = Annotated[int | None, typer.Option(min=2, help="Tokens a forward can yield at most. Default: as trained.")]
Proposals = Annotated[
    str | None,
    typer.Option(metavar="1,3,5", help="Accepted counts that get a proposal block. Default: the checkpoint's."),
]
DtypeOption = Annotated[Dtype, typer.Option(help="auto: the checkpoint's own.")]
DeviceOption = Annotated[Device, typer.Option(help="auto: a GPU where there is one.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit, for a Hub id.")]
Token = Annotated[str | None, typer.Option(help="Hub token, where `hf auth login` stored none.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead.")]


def accepted_counts(text: str | None, block_size: int | None = None) -> tuple[int, ...] | None:
    """The value of --proposals as numbers, sorted; None where the option was left out.

    Args:
        text: numbers with commas between them.
        block_size: the largest count that can be; None where a checkpoint says so later.

    Raises:
        typer.BadParameter: it is no such list, or a count is out of range.

    >>> accepted_counts("3,1")
    (1, 3)
    """
    if text is None:
        return None
    try:
        counts = tuple(int(part) for part in text.split(","))
        return check_proposals(counts, max(counts) if block_size is None else block_size)
    except ValueError:
        most = "" if block_size is None else f" to {block_size}"
        raise typer.BadParameter(
            f"{text!r} is no list of accepted counts, from 1{most}, such as 1,3,5", param_hint="--proposals"
        ) from None


def numbers(text: str, option: str) -> list[int]:
    """Whole numbers from 1 with commas between them, in order and without repeats.

    Raises:
        typer.BadParameter: it is no such list.

    >>> numbers("4,1,4", "--k")
    [1, 4]
    """
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = [0]
    if found[0] < 1:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers from 1, such as 1,4,16", param_hint=option)
    return found
