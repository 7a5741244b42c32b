"""`zconvert convert-init`: a checkpoint becomes a block-diffusion checkpoint, ready to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from zconvert.checkpoint.source import resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out
from zconvert.tidar.settings import DEFAULT_BLOCK_SIZE, MAX_BLOCK_SIZE

_RECIPE_SUFFIXES = (".yaml", ".yml")


def command(
    context: typer.Context,
    checkpoint: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT|RECIPE",
            help="A checkpoint's folder, a training run's folder, a Hub id, or a recipe (*.yaml) with these settings.",
        ),
    ],
    output: Annotated[Path | None, typer.Option("--out", help="Folder to write; must not exist.")] = None,
    block_size: Annotated[
        int, typer.Option(min=2, max=MAX_BLOCK_SIZE, help="Tokens per diffusion block.")
    ] = DEFAULT_BLOCK_SIZE,
    mask_token: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT|ID", help="Mask token. Default: the tokenizer's own, else a spare row, else a new row."
        ),
    ] = None,
    mask_init: Annotated[
        str, typer.Option(help="Start value of its embedding row: mean, zero, random or copy:<token>.")
    ] = "mean",
    proposals: Annotated[
        str | None,
        typer.Option(metavar="1,3,5", help="Accepted counts that get a proposal block in decoding. Default: all."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of --mask-init random.")] = 0,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Make a block-diffusion checkpoint of an autoregressive one: mask token and settings, no training yet.

    No model is built: bytes and JSON are patched, so that the result is as the source in everything else.
    """
    wanted: str | int | None = int(mask_token) if mask_token is not None and mask_token.isdecimal() else mask_token
    counts = options.accepted_counts(proposals, block_size)
    name = checkpoint
    if checkpoint.endswith(_RECIPE_SUFFIXES):
        _refuse_options_beside_a_recipe(context)
        from zconvert.recipe import ConvertInitRecipe, load_recipe

        recipe = load_recipe(Path(checkpoint), ConvertInitRecipe)
        name, revision, output, seed = recipe.base_model, recipe.revision, Path(recipe.output_dir), recipe.seed
        block_size, wanted = recipe.diffusion.block_size, recipe.diffusion.mask_token
        mask_init = recipe.diffusion.mask_init
        counts = None if recipe.diffusion.proposals is None else tuple(recipe.diffusion.proposals)
    if output is None:
        raise typer.BadParameter("missing, say which folder to write", param_hint="--out")
    from zconvert.checkpoint.graft import convert_init

    with err.status(Text(f"Converting {name} …")):
        source = resolve(name, revision=revision, token=token)
        settings = convert_init(
            source,
            output,
            block_size=block_size,
            mask_token=wanted,
            mask_init=mask_init,
            seed=seed,
            proposals=counts,
        )
    origin = settings.mask_token_source.replace("_", " ")
    out.print(Text(f"Wrote {output}"), soft_wrap=True)
    out.print(Text(f"  block size  {settings.block_size}"))
    out.print(Text(f"  mask token  {settings.mask_token} (id {settings.mask_token_id}, {origin}; {mask_init})"))
    out.print(Text.assemble(("Next: ", "bold"), "zconvert midtrain RECIPE.yaml, with base_model: ", str(output)))


def _refuse_options_beside_a_recipe(context: typer.Context) -> None:
    """A recipe says everything: an option beside it would be lost, or would make the recipe untrue."""
    given = [
        name
        for name in context.params
        if name not in ("checkpoint", "token")
        and str(getattr(context.get_parameter_source(name), "name", "")) == "COMMANDLINE"
    ]
    if given:
        names = {"output": "--out"}
        listed = ", ".join(names.get(name, "--" + name.replace("_", "-")) for name in given)
        raise typer.BadParameter(f"{listed} beside a recipe, which says everything: write it into the recipe")
