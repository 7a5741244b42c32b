"""`zconvert export`: a converted checkpoint as a folder that runs without zconvert, or on the Hub."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from zconvert.checkpoint.folder import temporary_folder
from zconvert.checkpoint.json_patch import read_named_json
from zconvert.checkpoint.source import Source, resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, print_json, show_facts, show_table, size
from zconvert.tidar.settings import GATED_FILE

if TYPE_CHECKING:
    from zconvert.checkpoint.push_plan import PushPlan, Step, Target


class EngineName(StrEnum):
    """Values of --check: the rows of the table in zconvert/checkpoint/engines.py, and all of them."""

    ALL = "all"
    TRANSFORMERS = "transformers"
    VLLM = "vllm"
    SGLANG = "sglang"
    LLAMA_CPP = "llama.cpp"


_TO_HUB = "Push to the Hub"
_ELSE = "Instead of exporting"


def command(
    checkpoint: options.Checkpoint,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder to write; must not exist. Its name titles the card.")
    ] = None,
    hub: Annotated[
        str | None, typer.Option(metavar="ORG/NAME", help="Repository to push to, instead of a folder to write.")
    ] = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    max_shard_size: Annotated[
        str | None,
        typer.Option(metavar="5GB", help="Bytes that a weight file holds at most. Default: the files as they are."),
    ] = None,
    results: Annotated[
        Path | None, typer.Option(metavar="FILE", help="What `zconvert bench --json` printed, for the model card.")
    ] = None,
    verify: Annotated[
        bool,
        typer.Option("--verify/--no-verify", help="Reload the export on its own and compare, before it gets its name."),
    ] = True,
    private: Annotated[
        bool, typer.Option("--private", help="Make a new repository private.", rich_help_panel=_TO_HUB)
    ] = False,
    revision: Annotated[
        str | None,
        typer.Option(
            help="With --hub the branch to push to; else the revision of a CHECKPOINT on the Hub.",
            rich_help_panel=options.MACHINE,
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request.", rich_help_panel=_TO_HUB)
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Message of the commit.", rich_help_panel=_TO_HUB)
    ] = None,
    force: Annotated[
        bool,
        typer.Option("--force", help="Overwrite a repository that holds something else.", rich_help_panel=_TO_HUB),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="List what would be pushed; change nothing.", rich_help_panel=_TO_HUB),
    ] = False,
    merge: Annotated[
        bool,
        typer.Option(
            "--merge-to-ar",
            help="Write the source of a gated checkpoint to --out, every file as it was.",
            rich_help_panel=_ELSE,
        ),
    ] = False,
    check: Annotated[
        EngineName | None,
        typer.Option(
            metavar="ENGINE",
            help=f"Say whether it loads there: {', '.join(EngineName)}.",
            rich_help_panel=_ELSE,
        ),
    ] = None,
    as_json: options.Json = False,
    token: options.Token = None,
) -> None:
    """Write a folder to hand on, or push it to the Hub.

    It has weights, tokenizer, model card and the code for trust_remote_code, and needs no zconvert: without
    trust_remote_code it is the plain AR model. One of --out, --hub and --check says what to do.
    """
    pushing = {"--private": private, "--create-pr": create_pr, "--force": force, "--dry-run": dry_run}
    pushing["--commit-message"] = commit_message is not None
    shaping = {"--results": results is not None, "--dtype": dtype is not options.Dtype.AUTO}
    shaping["--max-shard-size"] = max_shard_size is not None
    _check_usage(output, hub, check, merge, pushing, shaping)
    if create_pr and revision is not None:
        raise typer.BadParameter("a pull request is against main: leave --revision out", param_hint="--create-pr")
    if check is not None:
        _check(resolve(checkpoint, revision=revision, token=token, weights=False), check, as_json)
        return
    if merge:
        assert output is not None
        _merge(resolve(checkpoint, revision=revision, token=token), output, as_json)
        return
    choices: dict[str, Any] = {
        "results": None if results is None else read_named_json(results),
        "dtype": "source" if dtype is options.Dtype.AUTO else str(dtype),
        "max_shard_size": None if max_shard_size is None else options.size_in_bytes(max_shard_size, "--max-shard-size"),
        "verify": verify,
    }
    if hub is None:
        assert output is not None
        report = export_shown(checkpoint, output, revision=revision, token=token, **choices)
        print_json(report) if as_json else _show(report)
        return
    from zconvert.checkpoint.push_plan import Target

    target = Target(hub, revision, private, create_pr, commit_message, force, token)
    _push(checkpoint, target, dry_run, as_json, choices)


def _check_usage(
    output: Path | None,
    hub: str | None,
    check: object,
    merge: bool,
    pushing: dict[str, bool],
    shaping: dict[str, bool],
) -> None:
    """One thing is to be done, and only with the options that belong to it."""

    def given(asked: dict[str, bool]) -> list[str]:
        return [name for name, there in asked.items() if there]

    places = given({"--out": output is not None, "--hub": hub is not None, "--check": check is not None})
    if len(places) != 1:
        found = f"{' and '.join(places)} were given: they exclude each other" if places else "give one of them"
        raise typer.BadParameter(found, param_hint="--out, --hub or --check")
    if merge and output is None:
        raise typer.BadParameter("it writes a folder: say which with --out", param_hint="--merge-to-ar")
    if given(pushing) and hub is None:
        raise typer.BadParameter("it goes with --hub", param_hint=given(pushing)[0])
    if given(shaping) and (merge or check is not None):
        raise typer.BadParameter("nothing is exported with --merge-to-ar or --check", param_hint=given(shaping)[0])
    if hub is not None and hub.count("/") != 1:
        raise typer.BadParameter(f"{hub!r} is no repository, such as org/name", param_hint="--hub")


def _check(source: Source, wanted: EngineName, as_json: bool) -> None:
    from zconvert.checkpoint.engines import ENGINES, check

    names = list(ENGINES) if wanted is EngineName.ALL else [str(wanted)]
    verdicts = [check(source, ENGINES[name]) for name in names]
    if as_json:
        print_json([verdict.to_dict() for verdict in verdicts])
        return
    for verdict in verdicts:
        out.print(Text(f"{verdict.engine} {verdict.version}: loads autoregressively: {verdict.loads}"), soft_wrap=True)
        command = [("run", verdict.command)] if verdict.command is not None else []
        show_facts([("why", verdict.why), *command, ("TiDAR needs", verdict.tidar)])


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
    show_facts([("files", f"{len(files)}, {size(sum(file['bytes'] for file in files))}"), ("verified", verified)])


def export_shown(
    checkpoint: str, output: Path, *, revision: str | None = None, token: str | None = None, **choices: Any
) -> dict[str, Any]:
    """Exports with progress on stderr; returns what was written.

    Args:
        checkpoint: as the user named it.
        output: folder to write.
        revision: of a checkpoint on the Hub.
        token: for the Hub.
        choices: see `zconvert.checkpoint.export.export`.
    """
    from zconvert.checkpoint.export import export

    source = resolve(checkpoint, revision=revision, token=token)
    with err.status(Text(f"Exporting {checkpoint} …")) as status:
        return export(
            source,
            output,
            on_shard=lambda name, n, count: status.update(Text(f"Writing {name} ({n} of {count}) …")),
            tell=lambda text: status.update(Text(f"{text} …")),
            **choices,
        )


def _push(checkpoint: str, target: Target, dry_run: bool, as_json: bool, choices: dict[str, Any]) -> None:
    from zconvert.checkpoint.push import check_login, plan_push, push

    if not dry_run:
        check_login(target)

    def tell(step: Step, number: int, count: int) -> None:
        err.print(Text(f"Uploading {step.name} ({number} of {count}, {size(step.bytes)})"), soft_wrap=True)

    # Only read, and gone again: so weights that do not change are links.
    with temporary_folder("zconvert-export-") as work:
        folder = work / target.repo.rsplit("/", 1)[-1]
        verify = choices.pop("verify") and not dry_run
        report = export_shown(checkpoint, folder, token=target.token, as_links=True, verify=verify, **choices)
        if dry_run:
            plan = plan_push(folder, target)
            print_json({**plan.to_dict(), "dry_run": True}) if as_json else _show_plan(plan)
            return
        err.print(Text(f"Pushing to {target.repo}"), soft_wrap=True)
        pushed = push(folder, target, on_file=tell, bars=err.is_terminal)
    if as_json:
        print_json({**pushed.to_dict(), "verified": report["verified"], "dry_run": False})
        return
    if pushed.commit is None:
        out.print(Text(f"{pushed.url} is up to date"), soft_wrap=True)
        return
    out.print(Text(f"Pushed to {pushed.pull_request or pushed.url}"), soft_wrap=True)
    total = pushed.plan.to_dict()["bytes"]
    show_facts(
        [
            ("commit", pushed.commit),
            ("uploaded", size(total["upload"])),
            *([("copied", f"{size(total['copy'])} on the server, from the base model")] if total["copy"] else []),
            ("unchanged", size(total["keep"])),
            ("verified", _verified(report)),
        ]
    )


def _show_plan(plan: PushPlan) -> None:
    where = "" if plan.exists else ", which would be made"
    out.print(Text(f"Would push to {plan.target.repo}{where}; nothing was changed"), soft_wrap=True)
    table = Table(box=None, pad_edge=False)
    table.add_column("file", no_wrap=True)
    table.add_column("action", no_wrap=True)
    table.add_column("bytes", justify="right", no_wrap=True)
    for step in plan.steps:
        table.add_row(Text(step.name), step.action, f"{step.bytes:,}")
    show_table(table)
    total = plan.to_dict()["bytes"]
    words = {"upload": "to upload", "copy": "to copy from the base model", "keep": "unchanged"}
    out.print(Text(", ".join(f"{size(total[action])} {text}" for action, text in words.items())), soft_wrap=True)


def _show(report: dict[str, Any]) -> None:
    total = sum(shard["bytes"] for shard in report["weights"].values())
    shards = "1 weight file" if len(report["weights"]) == 1 else f"{len(report['weights'])} weight files"
    rows = [("weights", f"{shards}, {size(total)}, checksums in provenance.json")]
    if report["mode"] == "gated":
        gated = size(report["weights"][GATED_FILE]["bytes"])
        rows.append(("mode", f"gated: the source's weights as they are, and {gated} in {GATED_FILE}"))
    rows.append(("stages", ", ".join(report["stages"]) or "none: not trained yet"))
    rows.append(("recipes", "zconvert_config.yaml" if report["recipe"] else "not kept with the checkpoint"))
    rows.append(("licence", report["license"] or "not known from its files: look it up before you publish"))
    rows.append(("verified", _verified(report)))
    out.print(Text(f"Wrote {report['out']}"), soft_wrap=True)
    show_facts(rows)


def _verified(report: dict[str, Any]) -> str:
    verified = report["verified"]
    if verified is None:
        return "no, as you asked"
    if verified["skipped"] is not None:
        return f"files and checksums; it was not run: {verified['skipped']}"
    logits = f"logits at {verified['positions']} positions" if verified["positions"] else "files"
    return f"{logits}, and {verified['prompts']} greedy texts as token by token, with transformers alone"
