"""`zconvert export`: a converted checkpoint as a folder that runs without zconvert."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from zconvert.checkpoint.source import RUN_CHECKPOINT, Source, resolve
from zconvert.cli import options
from zconvert.cli.ui import err, facts, out, print_json, size
from zconvert.tidar.settings import GATED_FILE

RUN_RECIPE = "recipe.yaml"


def command(
    checkpoint: options.Checkpoint,
    output: Annotated[Path, typer.Option("--out", help="Folder to write; must not exist. Its name titles the card.")],
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `zconvert bench --json` printed, for the model card.")
    ] = None,
    merge: Annotated[
        bool,
        typer.Option("--merge-to-ar", help="Write the source of a gated checkpoint instead, every file as it was."),
    ] = False,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Write a folder to hand on: weights, tokenizer, model card, and the code for decoding with trust_remote_code."""
    from zconvert.checkpoint.json_patch import parse_json_object, read_json_text

    if merge and results is not None:
        raise typer.BadParameter("the source gets no card: leave it out with --merge-to-ar", param_hint="--results")
    if merge:
        _merge(resolve(checkpoint, revision=revision, token=token), output, as_json)
        return
    measured = None if results is None else parse_json_object(read_json_text(results), str(results))
    report = export_shown(checkpoint, output, results=measured, revision=revision, token=token)
    if as_json:
        print_json(report)
    else:
        _show(report)


def _merge(source: Source, output: Path, as_json: bool) -> None:
    from zconvert.checkpoint.merge import merge_to_ar

    with err.status(Text(f"Merging {source.name} …")) as status:
        report = merge_to_ar(
            source,
            output,
            on_file=lambda name, n, count: status.update(Text(f"Writing {name} ({n} of {count}) …")),
        )
    if as_json:
        print_json(report)
        return
    files = report["files"].values()
    hashed = sum(file["sha256"] is not None for file in files)
    out.print(Text(f"Wrote {report['out']}, which is {report['base_model'] or 'the source'} again"), soft_wrap=True)
    verified = f"{hashed} by their sha256, {len(files) - hashed} by their size"
    out.print(facts([("files", f"{len(files)}, {size(sum(file['bytes'] for file in files))}"), ("verified", verified)]))


def export_shown(
    checkpoint: str,
    output: Path,
    *,
    results: dict[str, Any] | None = None,
    revision: str | None = None,
    token: str | None = None,
) -> dict[str, Any]:
    """Exports with progress on stderr; returns what was written."""
    from zconvert.checkpoint.export import export
    from zconvert.checkpoint.json_patch import read_json_text

    source = resolve(checkpoint, revision=revision, token=token)
    recipe = source.folder.parent / RUN_RECIPE if source.folder.name == RUN_CHECKPOINT else None
    with err.status(Text(f"Exporting {checkpoint} …")) as status:
        return export(
            source,
            output,
            recipe_text=read_json_text(recipe) if recipe is not None and recipe.is_file() else None,
            results=results,
            on_shard=lambda name, n, count: status.update(Text(f"Copying {name} ({n} of {count}) …")),
        )


def _show(report: dict[str, Any]) -> None:
    total = sum(shard["bytes"] for shard in report["weights"].values())
    shards = "1 weight file" if len(report["weights"]) == 1 else f"{len(report['weights'])} weight files"
    rows = [("weights", f"{shards}, {size(total)}, checksums in provenance.json")]
    if report["mode"] == "gated":
        gated = size(report["weights"][GATED_FILE]["bytes"])
        rows.append(("mode", f"gated: the source's weights as they are, and {gated} in {GATED_FILE}"))
    rows.append(("stages", ", ".join(report["stages"]) or "none: not trained yet"))
    rows.append(("recipe", "zconvert_config.yaml" if report["recipe"] else "not found beside the checkpoint"))
    rows.append(("licence", report["license"] or "not known from its files: look it up before you publish"))
    out.print(Text(f"Wrote {report['out']}"), soft_wrap=True)
    out.print(facts(rows))
