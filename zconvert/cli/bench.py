"""`zconvert bench`: the speed of one checkpoint's ways of decoding, on the same prompts in the same run."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from zconvert.checkpoint.source import Source, require_converted, resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, plural, print_json, progress, show_table
from zconvert.errors import UserError
from zconvert.tidar.settings import TidarSettings

if TYPE_CHECKING:
    from zconvert.serving.timing import Known

BUILT_IN_PROMPTS = (
    "The sun rises in the east and",
    "To make a cup of tea, first",
    "A list of the months of the year: January,",
    "Once upon a time, in a small village by the sea,",
    "Water boils when",
    "The capital of France is Paris, and the capital of Italy is",
    "Question: What is 12 plus 30?\nAnswer:",
    "Dear Sir or Madam,\n",
)
"""used where the user names none"""

_BARS = " ▁▂▃▄▅▆▇█"
_RIVALS = "Rivals"


def command(
    checkpoint: options.Checkpoint,
    prompts: Annotated[
        Path | None,
        typer.Option(help="JSONL file of prompts, as of `generate --prompts`. Default: a few English sentences."),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Take only the first N prompts.")] = None,
    batch_size: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Texts decoded at a time; may be given several times.", show_default="1"),
    ] = None,
    max_new_tokens: Annotated[
        list[int] | None,
        typer.Option(min=1, help="Tokens of a text at most; may be given several times.", show_default="128"),
    ] = None,
    prompt_tokens: Annotated[
        list[int] | None, typer.Option(min=1, help="Cut or repeat each prompt to N tokens; may be given several times.")
    ] = None,
    mode: Annotated[
        list[options.Mode] | None,
        typer.Option(
            help="single: forwards verify and draft at once; two: they take turns; auto: whichever is faster here; "
            "may be given several times.",
            show_default="single",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    proposals: Annotated[
        list[str] | None,
        typer.Option(
            metavar="1,3,5",
            help="Accepted counts that get a block of drafts for the next forward; may be given several times. "
            "Default: the checkpoint's.",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    block_size: options.BlockSize = None,
    compiled: options.CompileOption = None,
    mix_weight: Annotated[
        list[float] | None,
        typer.Option(
            min=0.0,
            max=1.0,
            help="Of the mixed sampler: AR's share in what drafts are verified by; may be given several times.",
            show_default="0.5",
            rich_help_panel=options.DECODING,
        ),
    ] = None,
    baseline: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Another checkpoint, such as the source: its plain AR, and whether texts are the same as its.",
            rich_help_panel=_RIVALS,
        ),
    ] = None,
    stock: Annotated[
        bool, typer.Option(help="Measure `generate` of stock transformers, too.", rich_help_panel=_RIVALS)
    ] = True,
    prompt_lookup: Annotated[
        bool,
        typer.Option(
            "--prompt-lookup",
            help="Measure transformers' prompt lookup, too, which needs no conversion.",
            rich_help_panel=_RIVALS,
        ),
    ] = False,
    assistant: Annotated[
        str | None,
        typer.Option(
            metavar="CHECKPOINT",
            help="Measure transformers' assisted decoding, too, with this smaller checkpoint as the assistant.",
            rich_help_panel=_RIVALS,
        ),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="Show what --mode auto knows of this machine and would choose.")
    ] = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: greedy.", rich_help_panel=options.DECODING)] = 0.0,
    plot: Annotated[Path | None, typer.Option(help="Draw the speeds into this PNG file.")] = None,
    dtype: options.DtypeOption = options.Dtype.FLOAT32,
    device: options.DeviceOption = options.Device.AUTO,
    threads: options.Threads = None,
    seed: Annotated[
        int, typer.Option(min=0, help="Seed of sampling above temperature 0.", rich_help_panel=options.DECODING)
    ] = 0,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Measure decoding speed against plain AR and stock transformers, on the same prompts, in turns.

    Every combination of the options that may be given several times is measured. `--json > bench.json` keeps the
    numbers for `export --results`, which puts them into the model card.
    """
    options.require_fixed(mode or [], compiled)
    sets = [options.accepted_counts(each, block_size) for each in dict.fromkeys(proposals or [])] or [None]
    from zconvert.serving.prompts import Row, read_rows

    if prompts is None:
        rows = [Row(line=number, prompt=text) for number, text in enumerate(BUILT_IN_PROMPTS, 1)]
    else:
        rows = read_rows(prompts)
    rows = rows[:num_prompts]
    if plot is not None and not plot.absolute().parent.is_dir():
        raise UserError(
            f"--plot {plot}: there is no such folder", found=plot.parent, fix="make it, or choose another one"
        )
    with err.status(Text(f"Reading {checkpoint} …")):
        # Settings are checked before whole weights are fetched or read.
        source = resolve(checkpoint, revision=revision, token=token, weights=False)
        settings = require_converted(source)
        for counts in sets:
            options.require_fit(settings, block_size, counts)
        source = resolve(checkpoint, revision=revision, token=token)
        model, tokenizer = _load(source, str(dtype), str(device), threads)
        plain, helper = (
            None if name is None else _load(resolve(name, token=token), str(dtype), str(device), threads)[0]
            for name in (baseline, assistant)
        )
    from zconvert.checkpoint.load import end_token_ids
    from zconvert.evaluation.bench import bench, points
    from zconvert.evaluation.bench_plot import draw
    from zconvert.serving.batch import row_ids
    from zconvert.serving.timing import known_of
    from zconvert.tidar.generate import layout_model_of
    from zconvert.tidar.model import LayoutModel

    modes = [str(each) for each in mode or [options.Mode.SINGLE]]
    batches, known = batch_size or [1], None
    with progress() as bars:
        if "auto" in modes or tune:
            timing = bars.add_task("Timing forwards", total=None)
            known = known_of(
                layout_model_of(model),
                settings,
                max(batches),
                source.folder,
                on_progress=lambda done, total: bars.update(timing, completed=done, total=total),
            )
        task = bars.add_task("Decoding", total=len(rows))
        rivals = {"stock": stock, "prompt_lookup": prompt_lookup, "assisted": assistant is not None}
        measured = bench(
            layout_model_of(model),
            [row_ids(row, tokenizer) for row in rows],
            settings,
            points(
                batch_sizes=batches,
                max_new_tokens=max_new_tokens or [128],
                prompt_tokens=prompt_tokens or [None],
                modes=modes,
                mix_weights=mix_weight or [0.5],
                proposals=sets,
                block_size=block_size,
                rivals=[name for name, wanted in rivals.items() if wanted],
                baseline=baseline is not None,
            ),
            eos_token_ids=end_token_ids(model, tokenizer),
            temperature=temperature,
            seed=seed,
            known=known,
            baseline=None if plain is None else LayoutModel(plain),
            assistant=helper,
            compiled=None if compiled is None else str(compiled),
            on_progress=lambda done, total: bars.update(task, completed=done, total=total),
        )
    document = {"checkpoint": source.name, "revision": source.revision, "baseline": baseline, **measured}
    if tune:
        assert known is not None
        document["tuning"] = tuning_of(known, settings, document)
    if as_json:
        print_json(document)
    else:
        show(document)
    if plot is not None:  # last: what was measured is told already, whatever becomes of the figure
        draw(document, plot)


def show(document: dict[str, Any]) -> None:
    """Prints the document for people."""
    results = document["results"]
    out.print(Text(f"{document['checkpoint']}", style="bold"))
    out.print(
        f"{plural(document['prompts'], 'prompt')}; {document['dtype']} on {document['device']}, "
        f"{plural(document['threads'], 'thread')}; temperature {document['temperature']:g}; "
        f"blocks of {document['block_size']}{'' if document['compiled'] is None else '; decoder compiled'}"
    )
    if document["mode"] == "gated":
        out.print("gated: AR is the source itself, and so lossless text is the source's")
    for place in dict.fromkeys(_place(entry) for entry in results):
        out.print()
        out.print(place)
        show_table(_table([entry for entry in results if _place(entry) == place], document))
    for entry in results:
        if "unavailable" in entry:
            out.print(Text(f"{entry['name']} does not work for this model: {entry['unavailable']}", style="yellow"))
    if "tuning" in document:
        _show_tuning(document["tuning"])
    out.print()
    for line in _verdicts(results):
        out.print(line)


def _place(entry: dict[str, Any]) -> str:
    prompt = "" if entry["prompt_tokens"] is None else f"{entry['prompt_tokens']} tokens of prompt, "
    at_once = "one text at a time" if entry["batch_size"] == 1 else f"{entry['batch_size']} texts at a time"
    return f"{at_once}, {prompt}at most {entry['max_new_tokens']} new tokens"


def _table(entries: list[dict[str, Any]], document: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("", no_wrap=True)
    compared = document["baseline"] is not None
    # 80 columns hold either of the two.
    for name in ("tokens /\nforward", "tokens/s", "against\nAR", "source's\ntext" if compared else "against\nstock"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("AR's\ntext", justify="right", no_wrap=True)
    table.add_column(f"accepted\n1 … {document['block_size']}", no_wrap=True)
    total = document["prompts"]
    for entry in entries:
        if "unavailable" in entry:
            table.add_row(entry["name"], *["–"] * 4)
            continue
        stock = _times(entry.get("speedup_over_stock"))
        histogram = entry.get("accepted_histogram")
        table.add_row(
            entry["name"],
            f"{entry['tokens_per_forward']:.2f}" if "tokens_per_forward" in entry else "",
            f"{entry['tokens_per_second']:.1f}",
            _times(entry.get("speedup")) if entry["mode"] != "ar" else "",
            _of(entry.get("identical_to_baseline"), total) if compared else stock if entry["mode"] != "stock" else "",
            _of(entry.get("identical_prompts"), total),
            "" if histogram is None else bars(list(histogram.values())),
        )
    return table


def tuning_of(known: Known, settings: TidarSettings, document: dict[str, Any]) -> dict[str, Any]:
    """What --mode auto would choose from, at each batch size, by the drafts that this run accepted."""
    from zconvert.evaluation.bench import entry_of
    from zconvert.serving.tuning import choices, options, rates_of_histogram

    lossless = entry_of(document, sampler="lossless")
    rates = rates_of_histogram(lossless["accepted_histogram"] if lossless else {}, settings.block_size)
    worth, ranked = options(rates, known), {}
    for rows in dict.fromkeys(entry["batch_size"] for entry in document["results"]):
        best = choices(known.times, worth, rows)
        ranked[str(rows)] = [
            {
                "mode": choice.option.mode,
                "block_size": choice.option.block_size,
                "proposals": list(choice.option.proposals),
                "tokens_per_forward": choice.option.tokens_per_forward,
                "forward_ms": 1000 * choice.seconds,
                "tokens_per_second": choice.tokens_per_second,
            }
            for choice in best
        ]
    seconds = {str(rows): {str(n): 1000 * s for n, s in row.items()} for rows, row in known.times.seconds.items()}
    return {"machine": known.times.machine, "forward_ms": seconds, "slot_rates": list(rates), "choices": ranked}


def _show_tuning(tuning: dict[str, Any]) -> None:
    out.print()
    out.print(Text(f"Forwards on {tuning['machine']}", style="bold"), soft_wrap=True)
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    tokens = list(next(iter(tuning["forward_ms"].values())))
    shown = [n for n in tokens if n in ("1", "16", "17", "32", "64", "112", "208") or n == tokens[-1]] or tokens
    table.add_column("ms, by rows\nand tokens a row", no_wrap=True)
    for n in shown:
        table.add_column(n, justify="right", no_wrap=True)
    for rows, row in tuning["forward_ms"].items():
        table.add_row(rows, *[f"{row[n]:.1f}" for n in shown])
    show_table(table)
    for rows, ranked in tuning["choices"].items():
        out.print()
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        table.add_column(f"batch {rows}: the best of each mode", no_wrap=True)
        for name in ("block", "proposals", "tokens /\nforward", "ms", "tokens/s"):
            table.add_column(name, justify="right", no_wrap=True)
        seen: set[str] = set()
        for choice in ranked:
            if choice["mode"] not in seen:
                seen.add(choice["mode"])
                table.add_row(
                    choice["mode"],
                    str(choice["block_size"]),
                    _list(choice["proposals"]),
                    f"{choice['tokens_per_forward']:.2f}",
                    f"{choice['forward_ms']:.1f}",
                    f"{choice['tokens_per_second']:.0f}",
                )
        show_table(table)


def bars(counts: list[int]) -> str:
    """A histogram as one line of text, scaled to its largest count; what is there at all shows.

    >>> bars([0, 1, 8])
    ' ▁█'
    """
    top = max([*counts, 1])
    return "".join(_BARS[-(-8 * count // top)] for count in counts)


def _verdicts(results: list[dict[str, Any]]) -> Iterator[Text]:
    """What it comes to, for each place."""
    for place in dict.fromkeys(_place(entry) for entry in results):
        own = [e for e in results if _place(e) == place and e["sampler"] in ("lossless", "mixed") and "speedup" in e]
        at = f"With {place.split(',')[0]}: " if len({_place(entry) for entry in results}) > 1 else ""
        slower = [entry["name"] for entry in own if entry["speedup"] < 1]
        if slower:
            yield Text(f"{at}plain AR decoding is faster here than {'; '.join(slower)}.", style="bold yellow")
        faster = [entry for entry in own if entry["speedup"] >= 1]
        if faster:
            best = max(faster, key=lambda entry: entry["speedup"])
            exact = [entry for entry in faster if entry["sampler"] == "lossless"]
            shown = [max(exact, key=lambda entry: entry["speedup"])] if exact else []
            shown += [best] if best not in shown else []
            speeds = "; ".join(f"{entry['name']} {entry['speedup']:.2f}×" for entry in shown)
            yield Text(f"{at}{speeds} as fast as plain AR.", style="bold green")


def _times(ratio: float | None) -> str:
    return "" if ratio is None else f"{ratio:.2f}×"


def _of(count: int | None, total: int) -> str:
    return "" if count is None else f"{count}/{total}"


def _list(items: list[Any]) -> str:
    return ", ".join(map(str, items))


def _load(source: Source, dtype: str, device: str, threads: int | None) -> tuple[Any, Any]:
    import torch

    from zconvert.checkpoint.load import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(source, dtype=dtype, device=device)
