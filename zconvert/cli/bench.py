"""`zconvert bench`: AR, lossless and mixed decoding of one checkpoint, on the same prompts in the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from zconvert.checkpoint.source import Source, require_converted, resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, print_json
from zconvert.errors import UserError
from zconvert.tidar.settings import TidarSettings

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


def command(
    checkpoint: options.Checkpoint,
    prompts: Annotated[
        Path | None,
        typer.Option(help='JSONL file, one {"prompt": …} (or {"text": …}) a line. Default: a few English sentences.'),
    ] = None,
    num_prompts: Annotated[int | None, typer.Option(min=1, help="Take only so many, from the start.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens for a prompt.")] = 128,
    mix_weight: Annotated[
        list[float] | None,
        typer.Option(min=0.0, max=1.0, help="w of a mixed sampler; may be given several times.", show_default="0.5"),
    ] = None,
    baseline: Annotated[
        str | None, typer.Option(help="Another checkpoint, such as the source: plain AR, and whether texts are its.")
    ] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    proposals: options.Proposals = None,
    block_size: options.BlockSize = None,
    dtype: options.DtypeOption = options.Dtype.FLOAT32,
    device: options.DeviceOption = options.Device.AUTO,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads. Default: torch's choice.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random numbers above temperature 0.")] = 0,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Measure decoding speed: plain AR, lossless and mixed, on the same prompts, one sequence at a time."""
    counts = options.accepted_counts(proposals, block_size)
    texts = list(BUILT_IN_PROMPTS) if prompts is None else read_prompts(prompts)
    texts = texts[:num_prompts]
    with err.status(Text(f"Reading {checkpoint} …")):
        # Settings are checked before whole weights are fetched or read.
        source = resolve(checkpoint, revision=revision, token=token, weights=False)
        settings = require_converted(source)
        _check_fit(settings, block_size, counts)
        source = resolve(checkpoint, revision=revision, token=token)
        model, tokenizer = _load(source, str(dtype), str(device), threads)
        plain = None
        if baseline is not None:
            plain, _ = _load(resolve(baseline, token=token), str(dtype), str(device), threads)
    from zconvert.checkpoint.load import end_token_ids, prompt_ids
    from zconvert.evaluation.bench import bench
    from zconvert.tidar.generate import layout_model_of
    from zconvert.tidar.model import LayoutModel

    with _progress() as progress:
        task = progress.add_task("Decoding", total=len(texts))
        measured = bench(
            layout_model_of(model),
            [prompt_ids(tokenizer, text) for text in texts],
            settings,
            eos_token_ids=end_token_ids(model, tokenizer),
            max_new_tokens=max_new_tokens,
            mix_weights=mix_weight or [0.5],
            temperature=temperature,
            proposals=counts,
            block_size=block_size,
            seed=seed,
            baseline=None if plain is None else LayoutModel(plain),
            on_progress=lambda done, total: progress.update(task, completed=done, total=total),
        )
    document = {"checkpoint": source.name, "revision": source.revision, "baseline": baseline, **measured}
    if as_json:
        print_json(document)
    else:
        show(document)


def read_prompts(path: Path) -> list[str]:
    """The prompts of a JSONL file.

    Raises:
        UserError: it cannot be read, a line is not what it should be, or there is none.
    """
    texts = []
    expected = 'one JSON object a line, with a text under "prompt" or "text"'
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read", found=error.strerror, expected="a JSONL file of prompts") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text", found=error, expected=expected) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON", found=error, expected=expected) from error
        text = row.get("prompt", row.get("text")) if isinstance(row, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{path}, line {number} has no prompt", found=line[:60], expected=expected)
        texts.append(text)
    if not texts:
        raise UserError(f"{path} has no prompts", found="no lines", expected=expected)
    return texts


def show(document: dict[str, Any]) -> None:
    """Prints the document for people."""
    results = document["results"]
    out.print(Text(f"{document['checkpoint']}", style="bold"))
    out.print(
        f"{document['prompts']} prompts of at most {document['max_new_tokens']} new tokens, one at a time; "
        f"{document['dtype']} on {document['device']}, {document['threads']} threads\n"
        f"blocks of {document['block_size']}, proposals after {_list(document['proposals'])} accepted tokens, "
        f"temperature {document['temperature']:g}"
    )
    if document["mode"] == "gated":
        out.print("gated: AR is the source itself")
    out.print()
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("Sampler", no_wrap=True)
    # 80 columns hold either of the two.
    either = "same as\nbaseline" if "baseline" in results else "ms per\nforward"
    for name in ("tokens per\nforward", "tokens/s", "against\nAR", either, "same text\nas AR"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(f"accepted\n1 … {document['block_size']}", no_wrap=True)
    for name, entry in results.items():
        same, histogram = entry.get("identical_prompts"), entry.get("accepted_histogram")
        table.add_row(
            _label(name, entry),
            f"{entry['tokens_per_forward']:.2f}",
            f"{entry['tokens_per_second']:.1f}",
            f"{entry['speedup']:.2f}×" if "speedup" in entry else "",
            _of(entry.get("identical_to_baseline"), document["prompts"])
            if "baseline" in results
            else f"{entry['forward_ms']:.1f}",
            _of(same, document["prompts"]),
            "" if histogram is None else bars(list(histogram.values())),
        )
    out.print(table)
    out.print()
    out.print(_verdict(results))


def bars(counts: list[int]) -> str:
    """A histogram as one line of text, scaled to its largest count; what is there at all shows.

    >>> bars([0, 1, 8])
    ' ▁█'
    """
    top = max([*counts, 1])
    return "".join(_BARS[-(-8 * count // top)] for count in counts)


def _verdict(results: dict[str, Any]) -> Text:
    slower = [_label(name, entry) for name, entry in results.items() if entry.get("speedup", 1.0) < 1]
    if slower:
        return Text(f"Plain AR decoding is faster here than {_list(slower)}.", style="bold yellow")
    best = max((name for name in results if "speedup" in results[name]), key=lambda name: results[name]["speedup"])
    return Text.assemble(
        "Lossless decoding is ",
        (f"{results['lossless']['speedup']:.2f}×", "bold green"),
        " as fast as plain AR",
        f"; {_label(best, results[best])} {results[best]['speedup']:.2f}×." if best != "lossless" else ".",
    )


def _label(name: str, entry: dict[str, Any]) -> str:
    return {"ar": "AR", "lossless": "lossless", "baseline": "baseline"}.get(name) or f"mixed {entry['mix_weight']:g}"


def _of(count: int | None, total: int) -> str:
    return "" if count is None else f"{count}/{total}"


def _list(items: list[Any]) -> str:
    return ", ".join(map(str, items))


def _check_fit(settings: TidarSettings, block_size: int | None, proposals: tuple[int, ...] | None) -> None:
    """Refuses a block or a count larger than the checkpoint was trained for."""
    expected = f"at most {settings.block_size}, the block size of the checkpoint"
    if block_size is not None and block_size > settings.block_size:
        raise UserError("--block-size is larger than the checkpoint's", found=block_size, expected=expected)
    if proposals is not None and proposals[-1] > settings.block_size:
        raise UserError("--proposals go past the checkpoint's blocks", found=proposals[-1], expected=expected)


def _load(source: Source, dtype: str, device: str, threads: int | None) -> tuple[Any, Any]:
    import torch

    from zconvert.checkpoint.load import load_model

    if threads is not None:
        torch.set_num_threads(threads)
    return load_model(source, dtype=dtype, device=device)


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=True,
        disable=not err.is_terminal,
    )
