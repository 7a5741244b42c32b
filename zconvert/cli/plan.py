"""`zconvert plan`: will it fit, how long, how much, and will it decode faster. No weights are loaded or fetched."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from zconvert.checkpoint.anatomy import context_of
from zconvert.checkpoint.folder import own_file, write_file
from zconvert.checkpoint.json_patch import read_named_json
from zconvert.checkpoint.source import naming_the_recipe
from zconvert.cli import options
from zconvert.cli.convert_init import choices_of
from zconvert.cli.plan_tables import show
from zconvert.cli.ui import err, print_json
from zconvert.errors import UserError
from zconvert.planning.acceptance import DEFAULT_CURVE, PUBLISHED, find_curve
from zconvert.planning.decoding import Device, device_for, predict
from zconvert.planning.heatmap import heat_map
from zconvert.planning.plan import (
    BATCHES,
    CONTEXTS,
    document_of,
    explain,
    plan_stage,
    speed_map,
    with_changes,
)
from zconvert.planning.target import Target, find_target
from zconvert.planning.workload import Workload, frozen_bits, workload_of
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, MAX_BLOCK_SIZE, GatedParts

if TYPE_CHECKING:
    from zconvert.checkpoint.plan import Choices
    from zconvert.recipe import TrainingRecipe

GPUS = ("mi300x", "mi355x", "h100-80gb", "h200", "b200", "a100-80gb", "rtx4090", "rtx5090", "cpu")
"""keys of `MACHINES`, which help must not load: checking numbers takes a library that loads slowly"""

_FULL_ASSUMED = (
    "Nothing given says which weights are trained: all, it is assumed. For a frozen source, name its convert-init "
    "recipe too, or add --mode gated."
)
_RECIPES = (".yaml", ".yml")
_SMALL_BYTES = 2e9
_TRAINING = "Training"


def command(
    targets: Annotated[
        list[str],
        typer.Argument(
            metavar="CHECKPOINT|RECIPE",
            help="A checkpoint's folder, a Hub id or a config.json, then recipes if there are any; or a pipeline.",
        ),
    ],
    gpu: Annotated[
        str,
        typer.Option(
            help=f"Device to train and decode on: {', '.join(GPUS)}, or a .yaml file that describes yours.",
            autocompletion=lambda: list(GPUS),
        ),
    ] = "h100-80gb",
    gpus: Annotated[
        int | None, typer.Option(min=1, help="How many of them train and decode.", show_default="8; of cpu 1")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(metavar="600B", help="Clean tokens to train on, in each stage.", rich_help_panel=_TRAINING),
    ] = None,
    mode: Annotated[
        options.Conversion | None,
        typer.Option(
            help="full: every weight is trained; gated: the source is frozen. Default: the checkpoint's, else full.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    sequence_len: Annotated[
        int | None, typer.Option(min=2, help="Clean tokens of a row. Default: the recipe's.", rich_help_panel=_TRAINING)
    ] = None,
    source_bits: Annotated[
        int | None,
        typer.Option(
            help="Bits of a frozen source's weights: 4, 8, 16 or 32. Default: the recipe's.", rich_help_panel=_TRAINING
        ),
    ] = None,
    price: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="US dollars for a device and hour. Default: the device's.", rich_help_panel=_TRAINING
        ),
    ] = None,
    efficiency: Annotated[
        float | None,
        typer.Option(
            min=0.01,
            max=1.0,
            help="Share of peak FLOP/s that training reaches. Default: the device's.",
            rich_help_panel=_TRAINING,
        ),
    ] = None,
    accepted: Annotated[
        str,
        typer.Option(
            help=f"Acceptance: tokens per forward, a run's folder, or a published one: {', '.join(PUBLISHED)}.",
            autocompletion=lambda: list(PUBLISHED),
            rich_help_panel=options.DECODING,
        ),
    ] = DEFAULT_CURVE,
    block_size: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=MAX_BLOCK_SIZE,
            help="Tokens of a diffusion block. Default: the checkpoint's, else 16.",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    proposals: Annotated[
        str | None,
        typer.Option(
            metavar="1,3,5",
            help="Accepted counts that get a block of drafts for the next forward. Default: the best for each cell.",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    batch: Annotated[
        str | None,
        typer.Option(metavar="1,8,32", help="Batch sizes of the map of speeds.", rich_help_panel=options.DECODING),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(
            metavar="4096,32768",
            help="Lengths of context of the map, in tokens. Default: from 1024 on, as far as the model goes.",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    why: Annotated[
        str | None,
        typer.Option(
            "--explain",
            metavar="batch=8,context=32768",
            help="Show the arithmetic behind a cell of the map.",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    heatmap: Annotated[
        Path | None, typer.Option(help="Write the map into this .html file.", rich_help_panel=options.DECODING)
    ] = None,
    calibrate: Annotated[
        bool,
        typer.Option(
            "--calibrate",
            help="Measure the device at hand with small models and predict decoding on it; --gpu cpu: training too.",
            rich_help_panel=options.DECODING,
        ),
    ] = False,
    bench: Annotated[
        Path | None,
        typer.Option(
            help="What `zconvert bench --json` printed, to lay over what --calibrate predicts.",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Tell what a conversion costs and whether it pays, before anything is spent.

    Memory, layout, time and price of training, and the speed of decoding against AR, by arithmetic from headers or a
    bare config.json; docs/planning.md says how, and how well.
    """
    from zconvert.planning.machines import find_machine

    counts = options.accepted_counts(proposals, block_size)
    batches = BATCHES if batch is None else options.numbers(batch, "--batch")
    contexts = None if context is None else options.numbers(context, "--context")
    cell_wanted = None if why is None else _cell_of(why)
    budget = None if tokens is None else parse_count(tokens)
    if source_bits not in (None, 4, 8, 16, 32):
        raise typer.BadParameter(f"{source_bits} is none of 4, 8, 16 and 32", param_hint="--source-bits")
    if heatmap is not None and heatmap.suffix.lower() not in (".html", ".htm"):
        raise typer.BadParameter(f"{heatmap} does not end in .html", param_hint="--heatmap")
    if bench is not None and not calibrate:
        raise typer.BadParameter("it is compared with a measured device: add --calibrate", param_hint="--bench")
    machine = find_machine(gpu)
    on_cpu = machine.name == "cpu"
    gpus = gpus or (1 if on_cpu else 8)
    with err.status(Text(f"Reading {targets[0]} …")):
        target, conversion, recipes = _read(targets, revision, token)
    diffusion = target.settings if conversion is None else conversion
    size = block_size or (DEFAULT_BLOCK_SIZE if diffusion is None else diffusion.block_size)
    parts = None if diffusion is None else diffusion.gated
    works = _stages(parts, recipes, size, mode, sequence_len, source_bits, machine_is_cpu=on_cpu)
    contexts = contexts or _contexts_of(target, recipes)
    curve = find_curve(accepted, size)
    facts = target.facts
    measured = _measure(target, bench, works[-1] if on_cpu else None) if calibrate else None
    if measured is not None and measured.device.machine.training_efficiency is not None:
        machine = measured.device.machine
    machine = with_changes(machine, price=price, efficiency=efficiency)
    stages = [plan_stage(facts, work, machine, gpus, budget) for work in works]
    gated = works[-1].gated
    masks_pass_experts = gated is None or gated.mlp != "replace" or not facts.experts
    if measured is None:
        device = device_for(facts, machine, gpus, masks_pass_experts=masks_pass_experts)
    else:
        device = replace(measured.device, masks_pass_experts=masks_pass_experts)
    cells = speed_map(facts, device, curve, batches, contexts, counts)
    document = document_of(facts, stages, machine, gpus, device, curve, cells)
    document["model"]["source"] = target.source
    if diffusion is None and mode is None and recipes:
        document["summary"].append(_FULL_ASSUMED)
    if measured is not None:
        document["calibration"] = measured.document
    if cell_wanted is not None:
        chosen = predict(facts, device, curve, *cell_wanted, proposals=counts)
        document["explain"] = [explain(facts, device, curve, cell) for cell in chosen]
    if heatmap is not None:
        title = f"{facts.name} on {device.gpus} × {machine.name}"
        with own_file(heatmap):
            write_file(heatmap, heat_map(cells, title, [*document["summary"], f"Acceptance: {curve.source}."]))
    if as_json:
        print_json(document)
    else:
        show(document, cells)


@dataclass(frozen=True)
class _Measured:
    """The device that this runs on, and what is told of it."""

    device: Device
    document: dict[str, Any]


def _measure(target: Target, bench: Path | None, trained: Workload | None) -> _Measured:
    """Measures the device at hand; how fast it trains too, where that is the CPU that training is planned on."""
    import torch

    from zconvert.planning import calibrate as library

    document = None if bench is None else read_named_json(bench)  # before minutes of measuring
    name = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = "bfloat16" if name == "cuda" else "float32"
    with err.status(Text("Measuring this device …")):
        whole = _whole(target, name, dtype)
        work = trained if name == "cpu" else None
        calibrated = library.calibrate(target.config, device=name, dtype=dtype, whole=whole, work=work)
    size = 2 if dtype == "bfloat16" else 4
    told = {
        "machine": calibrated.machine.model_dump(mode="json"),
        "dtype": dtype,
        "coefficients": asdict(calibrated.calibration),
        "forwards": library.errors(target.facts, calibrated, size),
        "bench": [] if document is None else library.against_bench(target.facts, calibrated, document),
    }
    return _Measured(Device(calibrated.machine, 1, size, size, calibration=calibrated.calibration), told)


def _whole(target: Target, device: str, dtype: str) -> Any:
    """The model itself, to check predictions on, where it is small and lies here."""
    if target.folder is None or target.facts.stored_bytes > _SMALL_BYTES:
        return None
    from zconvert.checkpoint.load import load_model
    from zconvert.checkpoint.source import resolve
    from zconvert.tidar.generate import layout_model_of

    return layout_model_of(load_model(resolve(target.folder), dtype=dtype, device=device)[0])


def parse_count(text: str) -> float:
    """A number of tokens as people write it.

    >>> parse_count("600B")
    600000000000.0
    """
    units = {"K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}
    unit = units.get(text[-1:].upper(), 1.0)
    try:
        value = float(text[:-1] if unit > 1 else text) * unit
    except ValueError:
        value = 0.0
    if not 0 < value < 1e18:
        raise typer.BadParameter(f"{text!r} is no number of tokens, such as 600B or 2e9", param_hint="--tokens")
    return value


def _read(
    targets: list[str], revision: str | None, token: str | None
) -> tuple[Target, Choices | None, list[TrainingRecipe]]:
    """The checkpoint, how a recipe would convert it, and the recipes of the training stages."""
    from zconvert.recipe import ConvertInitRecipe, TrainingRecipe, load_stages

    recipes = [each for text in targets if text.lower().endswith(_RECIPES) for each in load_stages(Path(text))]
    conversions = [choices_of(each) for each in recipes if isinstance(each, ConvertInitRecipe)]
    trainings = [each for each in recipes if isinstance(each, TrainingRecipe)]
    others = [text for text in targets if not text.lower().endswith(_RECIPES)]
    if len(others) > 1:
        raise UserError(
            "plan takes one checkpoint",
            found=", ".join(others),
            expected="a checkpoint, then recipes (*.yaml)",
            fix="plan one after another",
        )
    if others:
        target = find_target(others[0], revision=revision, token=token)
    else:
        first = recipes[0]
        with naming_the_recipe(first.base_model):
            target = find_target(first.base_model, revision=revision or first.revision, token=token)
    return target, conversions[-1] if conversions else None, trainings


def _contexts_of(target: Target, recipes: list[TrainingRecipe]) -> tuple[int, ...]:
    """Lengths for the map: those that the model has positions for, also after the stages."""
    from zconvert.recipe import ExtendContextRecipe

    most = context_of(language_config(target.config))
    if most is None:
        return CONTEXTS
    most = max([most, *(each.context.target_len for each in recipes if isinstance(each, ExtendContextRecipe))])
    return tuple(length for length in CONTEXTS if length <= most) or (most,)


def _stages(
    parts: GatedParts | None,
    recipes: list[TrainingRecipe],
    block_size: int,
    mode: options.Conversion | None,
    sequence_len: int | None,
    source_bits: int | None,
    *,
    machine_is_cpu: bool,
) -> list[Workload]:
    if mode is not None:
        parts = None if mode == options.Conversion.FULL else parts or GatedParts()
    if source_bits is not None and parts is None:
        raise typer.BadParameter("only a frozen source is packed: add --mode gated", param_hint="--source-bits")
    works = [workload_of(recipe, block_size, parts) for recipe in recipes]
    if not works:
        number = 4 if machine_is_cpu else 2
        works = [Workload(gated=parts, block_size=block_size, compute_bytes=number, source_bits=frozen_bits(number))]
    if source_bits is not None:
        works = [replace(work, source_bits=source_bits) for work in works]
    return works if sequence_len is None else [replace(work, sequence_len=sequence_len) for work in works]


def _cell_of(text: str) -> tuple[int, int]:
    try:
        values = {key.strip(): int(value) for key, value in (part.split("=") for part in text.split(","))}
    except ValueError:
        values = {}
    if set(values) != {"batch", "context"} or min(values.values()) < 1:
        raise typer.BadParameter(f"{text!r} is not like batch=8,context=32768", param_hint="--explain")
    return values["batch"], values["context"]
