"""Options that several commands share, so that each is worded, checked and named in one place. No torch here."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from zconvert.cli.ui import err
from zconvert.errors import UserError
from zconvert.tidar.settings import TidarSettings, check_proposals

if TYPE_CHECKING:
    from zconvert.tidar.acceptance import Sampling
    from zconvert.tidar.decoding import DecodePlan
    from zconvert.tidar.engine import Engine
    from zconvert.tidar.model import LayoutModel


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


class Sampler(StrEnum):
    """Values of --sampler."""

    LOSSLESS = "lossless"
    MIXED = "mixed"
    AR = "ar"


class Mode(StrEnum):
    """Values of --mode."""

    SINGLE = "single"
    TWO = "two"
    AUTO = "auto"


class Conversion(StrEnum):
    """Values of --mode where a checkpoint is converted, or trained."""

    FULL = "full"
    GATED = "gated"


class Compile(StrEnum):
    """Values of --compile, modes of torch.compile."""

    DEFAULT = "default"
    REDUCE_OVERHEAD = "reduce-overhead"


DECODING = "Decoding"
SAMPLING = "Sampling"
MACHINE = "Machine and Hub"
"""themes under which --help puts options"""

Checkpoint = Annotated[
    str, typer.Argument(metavar="CHECKPOINT", help="A checkpoint's folder, a training run's folder, or a Hub id.")
]
BlockSize = Annotated[
    int | None,
    typer.Option(
        min=2,
        help="Tokens a forward can yield at most. Default: as trained, which is the most.",
        rich_help_panel=DECODING,
    ),
]
Proposals = Annotated[
    str | None,
    typer.Option(
        metavar="1,3,5",
        help="Accepted counts that get a block of drafts for the next forward. Default: the checkpoint's.",
        rich_help_panel=DECODING,
    ),
]
SamplerOption = Annotated[
    Sampler,
    typer.Option(
        help="lossless: as AR would sample; mixed: faster, not exact; ar: one token a forward.",
        rich_help_panel=DECODING,
    ),
]
MixWeight = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="With --sampler mixed: AR's share in what drafts are verified by. Default: 0.5.",
        rich_help_panel=DECODING,
    ),
]
ModeOption = Annotated[
    Mode,
    typer.Option(
        help="single: forwards verify and draft at once; two: they take turns; auto: whichever is faster here.",
        rich_help_panel=DECODING,
    ),
]
CompileOption = Annotated[
    Compile | None,
    typer.Option(
        "--compile",
        help="Compile the decoder first (minutes), for faster forwards. reduce-overhead: with CUDA graphs.",
        rich_help_panel=DECODING,
    ),
]
TopP = Annotated[
    float,
    typer.Option(help="Sample among the likeliest tokens of this total probability.", rich_help_panel=SAMPLING),
]
DtypeOption = Annotated[
    Dtype, typer.Option(help="Type of the weights. auto: the checkpoint's own.", rich_help_panel=MACHINE)
]
DeviceOption = Annotated[
    Device, typer.Option(help="Where the model runs. auto: a GPU where there is one.", rich_help_panel=MACHINE)
]
Threads = Annotated[
    int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.", rich_help_panel=MACHINE)
]
Revision = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a Hub id. Default: main.", rich_help_panel=MACHINE)
]
Token = Annotated[
    str | None,
    typer.Option(
        help="Token for the Hub. Default: HF_TOKEN, or what `hf auth login` stored.",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout instead of text.")]


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


def size_in_bytes(text: str, option: str) -> int:
    """A size as people write it.

    Args:
        text: a number with B, KB, MB, GB or TB behind it; units are powers of 1000.
        option: that it is the value of.

    Raises:
        typer.BadParameter: it is no such size.

    >>> size_in_bytes("1.5GB", "--max-shard-size")
    1500000000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B", text.strip(), re.IGNORECASE)
    count = int(float(match[1]) * 1000 ** ("KMGT".find(match[2].upper()) + 1 if match[2] else 0)) if match else 0
    if count < 1:
        raise typer.BadParameter(f"{text!r} is no size, such as 5GB or 500MB", param_hint=option)
    return count


def plan(
    settings: TidarSettings,
    sampler: Sampler,
    mix_weight: float | None,
    mode: Mode,
    proposals: tuple[int, ...] | None,
    block_size: int | None,
    **choices: Any,
) -> DecodePlan:
    """The decoding that these options ask for; its end tokens are left open.

    Args:
        settings: of the checkpoint.
        sampler: value of --sampler.
        mix_weight: of --mix-weight.
        mode: of --mode.
        proposals: of --proposals, see `accepted_counts`.
        block_size: of --block-size.
        **choices: fields of `Sampling`.

    Raises:
        UserError: they do not go together, or with the checkpoint.
    """
    from zconvert.tidar.generate import plan_of

    if mode is Mode.AUTO and (proposals, block_size) != (None, None):
        raise typer.BadParameter("it chooses proposals and block sizes itself", param_hint="--mode auto")
    if mix_weight is not None and sampler is not Sampler.MIXED:
        raise typer.BadParameter("it goes with --sampler mixed", param_hint="--mix-weight")
    require_fit(settings, block_size, proposals)
    drawn = sampling(**choices)
    try:
        return plan_of(
            settings,
            drawn,
            frozenset(),
            sampler=str(sampler),
            mix_weight=mix_weight,
            proposals=proposals,
            block_size=block_size,
            mode=str(Mode.SINGLE if mode is Mode.AUTO else mode),
        )
    except ValueError as error:
        raise UserError(f"these options cannot work: {error}", fix="see the command's --help") from error


def sampling(**choices: Any) -> Sampling:
    """How tokens are drawn.

    Args:
        **choices: fields of `Sampling`, which are options of the same names.

    Raises:
        typer.BadParameter: one is out of range.
    """
    from zconvert.tidar.acceptance import Sampling

    try:
        return Sampling(**choices)
    except ValueError as error:
        name = next((name for name in choices if str(error).startswith(f"{name} ")), "")
        said = f"it {str(error).removeprefix(f'{name} ')}" if name else str(error)
        raise typer.BadParameter(said, param_hint=f"--{name.replace('_', '-')}" if name else None) from None


def require_fit(settings: TidarSettings, block_size: int | None, proposals: tuple[int, ...] | None) -> None:
    """Refuses a block or an accepted count larger than the checkpoint was trained for.

    Raises:
        UserError: it is.
    """
    expected = f"at most {settings.block_size}, the block size of the checkpoint"
    if block_size is not None and block_size > settings.block_size:
        fix = "choose a smaller one, or leave it out"
        raise UserError("--block-size is larger than the checkpoint's", found=block_size, expected=expected, fix=fix)
    if proposals is not None and proposals[-1] > settings.block_size:
        fix = "choose smaller ones, or leave it out"
        raise UserError("--proposals go past the checkpoint's blocks", found=proposals[-1], expected=expected, fix=fix)


def numbers(text: str, option: str) -> tuple[int, ...]:
    """Whole numbers from 1 with commas between them, in order and without repeats.

    Raises:
        typer.BadParameter: it is no such list.

    >>> numbers("4,1,4", "--k")
    (1, 4)
    """
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = (0,)
    if found[0] < 1:
        raise typer.BadParameter(f"{text!r} is no list of whole numbers from 1, such as 1,4,16", param_hint=option)
    return found


def warn_untrained(settings: TidarSettings, sampler: Sampler) -> None:
    """Says on stderr that drafts of a checkpoint that no stage has trained are worth nothing."""
    if not settings.stages and sampler is not Sampler.AR:
        said = "Not trained yet: its drafts are chance, which costs time. Next: zconvert midtrain; or --sampler ar."
        err.print(said, style="yellow", soft_wrap=True)


def require_fixed(modes: Iterable[Mode], compiled: Compile | None) -> None:
    """Refuses to compile what changes as it goes.

    Raises:
        typer.BadParameter: it would have to.
    """
    if compiled is not None and Mode.AUTO in modes:
        raise typer.BadParameter(
            "--mode auto changes what would be compiled: `zconvert bench --tune` shows which mode to choose",
            param_hint="--compile",
        )


def engine_maker(
    model: LayoutModel,
    plan: DecodePlan,
    mode: Mode,
    compiled: Compile | None,
    settings: TidarSettings,
    folder: Path,
    batch_size: int,
) -> Callable[[], Engine]:
    """What makes the engine that these options ask for. --mode auto times this machine now, where nobody did yet.

    Args:
        model: of the checkpoint.
        plan: see `plan`.
        mode: of --mode.
        compiled: of --compile; the first engine takes minutes then.
        settings: of the checkpoint.
        folder: of the checkpoint.
        batch_size: texts decoded at a time.
    """
    from zconvert.tidar.engine import Engine

    if compiled is not None:
        from zconvert.serving.compiled import compiled_engine

        return lambda: compiled_engine(model, plan, batch_size, str(compiled))
    replan = None
    if mode is Mode.AUTO:
        from zconvert.serving.timing import known_of
        from zconvert.serving.tuning import AutoPlan

        replan = AutoPlan(known_of(model, settings, batch_size, folder), settings)
    return lambda: Engine(model, plan, max_batch=batch_size, replan=replan)
