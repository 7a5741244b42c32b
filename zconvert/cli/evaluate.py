"""`zconvert evaluate` and `zconvert score`: pass@k of AR, lossless and mixed decoding, in one report."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.table import Table
from rich.text import Text

from zconvert.checkpoint.run_folder import EVALUATION_FOLDER, RUN_CHECKPOINT
from zconvert.checkpoint.source import Source, require_converted, resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, plural, print_json, show_table


class Mode(StrEnum):
    """Values of --mode; not auto, which may change plans on the way, so that no seed would repeat a text."""

    SINGLE = "single"
    TWO = "two"


AllowCodeExec = Annotated[
    bool,
    typer.Option(
        "--allow-code-exec", help="Run the programs that the model wrote, in a sandbox, to score tasks in code."
    ),
]


def task_names(incomplete: str) -> list[str]:
    """For the shell: the tasks that come with zconvert."""
    from zconvert.evaluation.tasks import names

    return [name for name in names() if name.startswith(incomplete)]


def command(
    checkpoint: options.Checkpoint,
    tasks: Annotated[
        str,
        typer.Option(
            metavar="NAME,…",
            help="From `zconvert tasks list`, or .yaml files; NAME=FILE reads the rows from a file.",
            autocompletion=task_names,
        ),
    ],
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT", help="The source, or another checkpoint: its plain AR is what all is held against."
        ),
    ] = None,
    samplers: Annotated[
        str,
        typer.Option(
            metavar="ar,lossless,mix:0.5",
            help="Ways to decode; mix:W is the mixed sampler with AR's share W.",
            rich_help_panel=options.DECODING,
        ),
    ] = "ar,lossless",
    k: Annotated[
        str,
        typer.Option(
            metavar="1,4,16",
            help="Of pass@k: the share of problems of which one of k samples is right.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = "1",
    n: Annotated[
        int | None,
        typer.Option(min=1, help="Samples of each problem. Default: the largest k.", rich_help_panel=options.SAMPLING),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            min=0.0,
            help="0: greedy. Default: 0 for one sample of a problem, else 0.8.",
            rich_help_panel=options.SAMPLING,
        ),
    ] = None,
    top_p: options.TopP = 1.0,
    limit: Annotated[int | None, typer.Option(min=1, help="Take only the first N problems of each task.")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of an answer at most. Default: each task's.")
    ] = None,
    chat: Annotated[
        bool | None,
        typer.Option("--chat/--no-chat", help="Ask with the chat template, or as plain text. Default: each task's."),
    ] = None,
    margin: Annotated[
        float, typer.Option(min=0.01, help="Percentage points of pass@k that matter to the verdict.")
    ] = 2.0,
    batch_size: Annotated[
        int,
        typer.Option(
            min=1, help="Texts decoded at a time, in every column of the report.", rich_help_panel=options.DECODING
        ),
    ] = 8,
    output: Annotated[
        Path | None, typer.Option("--out", help="Folder of the evaluation. Default: evaluation/ in the run's folder.")
    ] = None,
    allow_code_exec: AllowCodeExec = False,
    no_score: Annotated[
        bool, typer.Option("--no-score", help="Make the samples and stop; `zconvert score` goes on from there.")
    ] = False,
    mode: Annotated[
        Mode,
        typer.Option(
            help="single: forwards verify and draft at once; two: they take turns.", rich_help_panel=options.DECODING
        ),
    ] = Mode.SINGLE,
    proposals: options.Proposals = None,
    block_size: options.BlockSize = None,
    dtype: options.DtypeOption = options.Dtype.AUTO,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.Threads = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the samples.", rich_help_panel=options.SAMPLING)] = 0,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Measure quality: pass@k of AR, lossless and mixed decoding on tasks, with speeds and verdicts, in one report.

    Interrupted and run again, it goes on. Samples, scores, results.json and report.html lie in one folder.
    """
    counts = options.accepted_counts(proposals, block_size)
    ks = options.numbers(k, "--k")
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise typer.BadParameter("name at least one task; see `zconvert tasks list`", param_hint="--tasks")
    chosen = _samplers(samplers)
    source = resolve(checkpoint, revision=revision, token=token, weights=False)
    settings = require_converted(source)
    options.require_fit(settings, block_size, counts)
    from zconvert.evaluation.tasks import load_task

    for name in names:  # before weights are fetched or read
        load_task(name)
    with err.status(Text(f"Loading {checkpoint} …")):
        from zconvert.evaluation.evaluate import Plan, evaluate

        samples = n or max(ks)
        heat = temperature if temperature is not None else 0.8 if samples > 1 else 0.0
        plan = Plan(
            tasks=names,
            samplers=chosen,
            k=ks,
            n=samples,
            sampling=options.sampling(temperature=heat, top_p=top_p),
            limit=limit,
            max_new_tokens=max_new_tokens,
            chat=chat,
            batch_size=batch_size,
            seed=seed,
            margin=margin / 100,
            proposals=counts,
            block_size=block_size,
            two_forwards=mode is Mode.TWO,
        )
        plan.decoding(settings)
        loaded = _load(checkpoint, revision, token, str(dtype), str(device), threads)
        source_model = None if baseline is None else _load(baseline, None, token, str(dtype), str(device), threads)
    folder = output or _default_folder(source)
    with progress_bars() as tell:
        results = evaluate(
            folder,
            plan,
            settings,
            loaded,
            source_model,
            with_scores=not no_score,
            allow_code_exec=allow_code_exec,
            on_progress=lambda at: tell(f"{at.task}, {at.column}", "samples", at.done, at.total),
            on_score=lambda task, column, done, total: tell(f"{task}, {column}", "scores", done, total),
        )
    if results is None:
        made = str(folder / "samples")
        print_json({"samples": made}) if as_json else out.print(Text(made), soft_wrap=True)
        return
    _finish(results, folder, as_json)


def score(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", help="What --out of `zconvert evaluate` was, such as ./my-run/evaluation."),
    ],
    allow_code_exec: AllowCodeExec = False,
    as_json: options.Json = False,
) -> None:
    """Score the samples of an evaluation anew, as its task files say now.

    No model is needed: the samples lie in the folder. results.json and report.html are written anew.
    """
    from zconvert.evaluation.evaluate import rescore

    with progress_bars() as tell:
        results = rescore(
            folder,
            allow_code_exec=allow_code_exec,
            on_score=lambda task, column, done, total: tell(f"{task}, {column}", "scores", done, total),
        )
    _finish(results, folder, as_json)


def show(results: Mapping[str, Any]) -> None:
    """Prints results for people, in 80 columns."""
    from zconvert.evaluation.report import column_label, faults, sentences

    ks = [f"pass@{k}" for k in results["k"]]
    for task, told in results["tasks"].items():
        counts = f"{plural(told['problems'], 'problem')}, {plural(results['n'], 'sample')} each"
        out.print(Text(f"{task}: {counts}", style="bold"))
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("", overflow="fold", max_width=24)
        for name in (*(f"{k}, %" for k in ks), "tokens per\nforward", "tokens/s", "tokens\neach"):
            table.add_column(name, justify="right", no_wrap=True)
        for name, entry in told["columns"].items():
            table.add_row(
                Text(column_label(name, results)),
                *(f"{100 * entry[k]:.1f}" for k in ks),
                f"{entry['tokens_per_forward']:.2f}",
                f"{entry['tokens_per_second']:,.1f}",
                f"{entry['mean_tokens']:,.0f}",
            )
        show_table(table)
        for sentence in (*faults(results, task), *sentences(results, task)):
            out.print(Text(f"- {sentence}"))
        out.print()


def _finish(results: dict[str, Any], folder: Path, as_json: bool) -> None:
    if as_json:
        print_json(results)
        return
    show(results)
    out.print(Text(str(folder / "report.html")), soft_wrap=True)


def _samplers(text: str) -> list[str]:
    from zconvert.evaluation.samplers import sampler_weights

    try:
        return list(sampler_weights([name.strip() for name in text.split(",") if name.strip()]))
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--samplers") from None


def _load(name: str, revision: str | None, token: str | None, dtype: str, device: str, threads: int | None) -> Any:
    from zconvert.checkpoint.load import load_model
    from zconvert.evaluation.evaluate import Loaded

    source = resolve(name, revision=revision, token=token)
    model, tokenizer = load_model(source, dtype=dtype, device=device)
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    return Loaded(source, model, tokenizer)


def _default_folder(source: Source) -> Path:
    """Where `zconvert export` looks for results: in the run's folder, or the checkpoint's."""
    if source.revision is not None:
        return Path(EVALUATION_FOLDER)
    return (source.folder.parent if source.folder.name == RUN_CHECKPOINT else source.folder) / EVALUATION_FOLDER


@contextmanager
def progress_bars() -> Iterator[Callable[[str, str, int, int], None]]:
    """Bars on stderr; yields what is told of each: a name, what is counted, how many, of how many."""
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[what]}"),
    )
    shown = err.is_terminal  # into a file, an empty line would be all
    with Bars(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=err, disable=not shown) as bars:
        tasks: dict[str, Any] = {}

        def tell(name: str, what: str, done: int, total: int) -> None:
            if what not in tasks:
                # What an earlier run made does not count for the time that is left.
                tasks[what] = bars.add_task(name, total=total, completed=done - 1, what=what)
            bars.update(tasks[what], description=name, completed=done, total=total)

        yield tell
