"""`zconvert convert-init`: a checkpoint becomes a block-diffusion checkpoint, ready to be trained."""

from __future__ import annotations

import shlex
from contextlib import suppress
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from zconvert.checkpoint.source import resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, print_json, show_facts, show_table, size
from zconvert.errors import UserError
from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, DEFAULT_MASK_INIT, MAX_BLOCK_SIZE, GatedParts

if TYPE_CHECKING:
    from zconvert.checkpoint.graft import Report
    from zconvert.checkpoint.plan import Choices, Plan
    from zconvert.recipe import ConvertInitRecipe

_RECIPE_SUFFIXES = (".yaml", ".yml")
_BESIDE_A_RECIPE = ("checkpoint", "token", "copy", "verify", "dry_run", "as_json")
"""parameters that do not change what is made, only how"""


class Verify(StrEnum):
    """Values of --verify."""

    AUTO = "auto"
    BYTES = "bytes"
    LOGITS = "logits"
    NONE = "none"


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RECIPE",
            help="A checkpoint's folder, a training run's folder, a Hub id, or a recipe (*.yaml) with these settings.",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; must not exist. Needed, unless a recipe names it.")
    ] = None,
    block_size: Annotated[
        int, typer.Option(min=2, max=MAX_BLOCK_SIZE, help="Tokens of a diffusion block.")
    ] = DEFAULT_BLOCK_SIZE,
    mask_token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|ID",
            help="Mask token. Default: the tokenizer's own, else a spare row, else a new row; gated: a virtual one.",
        ),
    ] = None,
    mask_init: Annotated[
        str, typer.Option(help="Start value of its embedding row: mean, zero, random or copy:<token>.")
    ] = DEFAULT_MASK_INIT,
    proposals: Annotated[
        str | None,
        typer.Option(metavar="1,3,5", help="Accepted counts that get a block of drafts in decoding. Default: all."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --mask-init random.")] = 0,
    mode: Annotated[
        options.Conversion,
        typer.Option(help="full: training moves every weight. gated: the source stays, small weights are added."),
    ] = options.Conversion.FULL,
    copy: Annotated[
        bool, typer.Option("--copy", help="Copy weight files that do not change, too, instead of linking them.")
    ] = False,
    verify: Annotated[
        Verify,
        typer.Option(help="What to compare afterwards. auto: all bytes, and the logits where the model is small."),
    ] = Verify.AUTO,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Tell what would happen to each file; write nothing.")
    ] = False,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Make a block-diffusion checkpoint of an autoregressive one: mask token and settings, no training yet.

    No model is built: bytes and JSON are patched, so that the result is as the source in everything else. Weight files
    that do not change are linked, not copied.
    """
    counts = options.accepted_counts(proposals, block_size)
    recipe_file: Path | None = None
    if checkpoint.endswith(_RECIPE_SUFFIXES):
        _refuse_options_beside_a_recipe(context)
        from zconvert.recipe import ConvertInitRecipe, load_recipe

        recipe_file = Path(checkpoint)
        recipe = load_recipe(recipe_file, ConvertInitRecipe)
        checkpoint, revision, output = recipe.base_model, recipe.revision, Path(recipe.output_dir)
        choices = choices_of(recipe)
    else:
        from zconvert.checkpoint.plan import Choices

        wanted: str | int | None = int(mask_token) if mask_token is not None and mask_token.isdecimal() else mask_token
        gated = GatedParts() if mode is options.Conversion.GATED else None
        choices = Choices(block_size, wanted, mask_init, seed, counts, gated)
    if output is None:
        raise typer.BadParameter("missing, say which folder to write", param_hint="--out")
    plan = _plan(checkpoint, output, choices, copy=copy, dry_run=dry_run, revision=revision, token=token)
    if dry_run:
        if as_json:
            print_json({**plan.to_dict(), "dry_run": True})
        else:
            _show_plan(plan)
        return
    report = _carry_out(plan, verify)
    if as_json:
        print_json({**report.to_dict(), "dry_run": False})
    else:
        _show(report, recipe_file)


def run_recipe(recipe: ConvertInitRecipe) -> None:
    """Converts by a recipe, with progress on stderr."""
    output = Path(recipe.output_dir)
    _carry_out(_plan(recipe.base_model, output, choices_of(recipe), revision=recipe.revision), Verify.AUTO)


def choices_of(recipe: ConvertInitRecipe) -> Choices:
    """What a recipe decides."""
    from zconvert.checkpoint.plan import Choices

    diffusion = recipe.diffusion
    return Choices(
        diffusion.block_size,
        diffusion.mask_token,
        diffusion.mask_init,
        recipe.seed,
        None if diffusion.proposals is None else tuple(diffusion.proposals),
        GatedParts(**diffusion.gated.model_dump()) if diffusion.mode == "gated" else None,
    )


def _plan(
    name: str,
    output: Path,
    choices: Choices,
    *,
    copy: bool = False,
    dry_run: bool = False,
    revision: str | None = None,
    token: str | None = None,
) -> Plan:
    from zconvert.checkpoint.folder import refuse_existing
    from zconvert.checkpoint.plan import plan_conversion
    from zconvert.checkpoint.verdict import require_convertible

    refuse_existing(output)  # before anything is fetched, and so are checkpoints that cannot be converted
    with err.status(Text(f"Reading {name} …")) as status:
        source = resolve(
            name,
            revision=revision,
            token=token,
            weights=not dry_run,
            on_progress=lambda done, total: status.update(Text(f"Fetching {name}: {size(done)} of {size(total)} …")),
            accept=lambda config, headers: require_convertible(name, config, headers, gated=choices.gated is not None),
        )
        return plan_conversion(source, output, choices, copy=copy)


def _carry_out(plan: Plan, verify: Verify) -> Report:
    from zconvert.checkpoint.graft import carry_out

    with err.status(Text(f"Writing {plan.out} …")) as status:
        return carry_out(plan, level=verify.value, on_step=lambda step: status.update(Text(f"{step} …")))


def _show_plan(plan: Plan) -> None:
    document = plan.to_dict()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("File", no_wrap=True)
    table.add_column("What happens", no_wrap=True)
    table.add_column("Size", justify="right", no_wrap=True)
    table.add_column("Written", justify="right", no_wrap=True)
    for step in plan.steps:
        style = "dim" if step.action == "link" else ""
        cells = (step.name, step.action, size(step.bytes), size(step.written) if step.written else "-")
        table.add_row(*(Text(cell) for cell in cells), style=style)
    show_table(table)
    free = "" if document["bytes_free"] is None else f"; {size(document['bytes_free'])} are free there"
    out.print()
    out.print(Text(f"Would write {size(document['bytes_written'])} to {plan.out}{free}"), soft_wrap=True)
    show_facts(_choices(plan))


def _show(report: Report, recipe_file: Path | None) -> None:
    plan = report.plan
    out.print(Text(f"Wrote {plan.out}"), soft_wrap=True)
    show_facts([*_choices(plan), ("written", _written(plan)), ("verified", "\n".join(_verified(report)))])
    trains = None if recipe_file is None else _midtrain_beside(recipe_file, plan.out)
    if trains is None:
        out.print(Text.assemble(("Next: ", "bold"), "zconvert recipes list"))
        out.print(Text(f"  copy the nearest, and set base_model: {plan.out} in its midtrain recipe"), soft_wrap=True)
    else:
        out.print(Text.assemble(("Next: ", "bold"), f"zconvert midtrain {shlex.quote(str(trains))}"), soft_wrap=True)


def _midtrain_beside(recipe_file: Path, made: Path) -> Path | None:
    """The recipe in the same folder that trains what was made."""
    from zconvert.recipe import MidtrainRecipe, load_recipe

    for path in sorted(recipe_file.parent.glob("*.yaml")):
        with suppress(UserError):
            if Path(load_recipe(path, MidtrainRecipe).base_model).expanduser() == made:
                return path
    return None


def _choices(plan: Plan) -> list[tuple[str, str]]:
    gated = plan.settings.gated
    start = plan.choices.mask_init if gated is None else "its row stays"
    mask = f"{plan.mask.text} (id {plan.mask.id}, {plan.mask.source.replace('_', ' ')}; {start})"
    if plan.settings.virtual:
        mask = f"virtual (id {plan.mask.id}, no token of the vocabulary)"
    rows = [("block size", str(plan.settings.block_size)), ("mask token", mask)]
    return [*rows, ("mode", f"gated, the source is frozen: {gated.described()}")] if gated is not None else rows


def _written(plan: Plan) -> str:
    document = plan.to_dict()
    linked = [step for step in plan.steps if step.action in ("link", "reflink")]
    shared = f"; {len(linked)} linked, {size(sum(step.bytes for step in linked))}" if linked else ""
    return f"{size(document['bytes_written'])} in {len(plan.steps) - len(linked)} files{shared}"


def _verified(report: Report) -> list[str]:
    verified = report.verified
    if verified.level == "none":
        return ["nothing but names, types and shapes"]
    lines = [f"{size(verified.bytes_compared)} equal the source's; tokenizer and configuration agree"]
    if verified.logits_difference is not None:
        same = f"largest difference {verified.logits_difference:.1g}" if verified.logits_difference else "the same"
        lines.append(f"logits on {verified.logits_compared} tokens: {same}")
    elif verified.logits_skipped is not None:
        lines.append(f"logits not compared, {verified.logits_skipped}")
    return lines


def _refuse_options_beside_a_recipe(context: typer.Context) -> None:
    """A recipe says everything: an option beside it would be lost, or would make the recipe untrue."""
    given = [
        name
        for name in context.params
        if name not in _BESIDE_A_RECIPE
        and str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"
    ]
    if given:
        names = {"output": "--out"}
        listed = ", ".join(names.get(name, "--" + name.replace("_", "-")) for name in given)
        raise typer.BadParameter(f"{listed} beside a recipe, which says everything: write it into the recipe")
