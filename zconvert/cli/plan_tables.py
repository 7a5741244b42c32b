"""A plan for people: the answer in words, tables of memory and time, the map of speedups, and why a cell is so."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from zconvert.cli.ui import out, show_table
from zconvert.planning.decoding import Cell
from zconvert.planning.heatmap import MODES
from zconvert.planning.plan import count_of, duration_of
from zconvert.tidar.settings import GatedParts

_MOST_REJECTED = 6
_UNITS = ("gigabytes", "gigaflops", "milliseconds")


def show(document: dict[str, Any], cells: list[Cell]) -> None:
    """Prints the plan for people."""
    for line in document["summary"]:
        out.print(Text(line, style="bold"))
    model = document["model"]
    out.print()
    experts = f", {model['experts_per_token']} of {model['experts']} experts" if model["experts"] else ", dense"
    out.print(
        Text(
            f"{model['name']}: {count_of(model['parameters'])} parameters, {count_of(model['active_parameters'])} "
            f"active{experts} (from {model['source']})"
        )
    )
    for stage in document["stages"]:
        out.print()
        if stage["gated"] is not None:
            trained, parts = count_of(stage["trained_parameters"]), GatedParts(**stage["gated"]).described()
            out.print(Text(f"Beside the frozen source {trained} weights are trained: {parts}."))
        show_table(_stage_table(stage))
        _show_rejected(stage["rejected"])
    for mode, title in MODES.items():
        out.print()
        show_table(_map_table([cell for cell in cells if cell.mode == mode], title))
    decoding = document["decoding"]
    roofline, where = decoding["blocks_under_roofline"], f"{decoding['gpus']} × {document['machine']['name']}"
    if "calibration" in document:
        where = document["calibration"]["machine"]["name"]
    curve = document["acceptance"]
    said = f"Speedup over AR, decoding on {where}, acceptance of {curve['source']}. Dim: does not fit."
    if roofline >= 1:
        free = f"about {roofline:.0f} × {curve['block_size']} tokens a forward"
        said += f" Attention over a long cache costs nothing more up to {free}."
    out.print(Text(said))
    if "calibration" in document:
        _show_calibration(document["calibration"])
    for explained in document.get("explain", ()):
        out.print()
        _show_explained(explained)


def _show_calibration(told: dict[str, Any]) -> None:
    machine = told["machine"]
    out.print()
    out.print(
        Text(
            f"Measured: {machine['bandwidth_gb_s']:,.0f} GB/s, {machine['bf16_tflops']:.2f} TFLOP/s ({told['dtype']}), "
            f"{machine['kernel_us']:.1f} µs a kernel."
        )
    )
    rows = [("a forward", row) for row in told["forwards"]] + [(row["sampler"], row) for row in told["bench"]]
    if not rows:
        return
    table = Table(title="Prediction and measurement", title_justify="left")
    for name in ("", "tokens", "predicted\nms", "measured\nms", "error", "predicted\nspeedup", "measured\nspeedup"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    for name, row in rows:
        speedups = [f"{row[key]:.2f}×" if key in row else "" for key in ("predicted_speedup", "measured_speedup")]
        times = [f"{row[key]:.2f}" for key in ("predicted_ms", "measured_ms")]
        table.add_row(name, f"{row['tokens']:.0f}", *times, f"{row['error']:+.0%}", *speedups)
    show_table(table)


def _stage_table(stage: dict[str, Any]) -> Table:
    memory, time = stage["memory"], stage["time"]
    table = Table(title=f"{stage['stage']}, {stage['mode']}: {stage['layout']['title']}", title_justify="left")
    for name, justify in (("Memory a device", "left"), ("GB", "right"), ("Time", "left"), ("", "right")):
        table.add_column(name, justify="right" if justify == "right" else "left", no_wrap=True)
    names = [name for name in memory if name.endswith("_gb")]
    total = memory["total_gb_per_gpu"]
    digits = 1 if total >= 1 else 3
    left = [(name.removesuffix("_gb").replace("_", " "), f"{memory[name]:.{digits}f}") for name in names]
    left.append(("total", f"{total:.{digits}f} of {memory['usable_gb_per_gpu']:.1f}"))
    unknown = time["step_seconds"] is None
    right = [
        ("step", "unknown" if unknown else f"{time['step_seconds']:.3g} s"),
        ("tokens a step", f"{time['tokens_per_step']:,}"),
        ("tokens/s", "unknown" if unknown else f"{time['tokens_per_second']:,.0f}"),
    ]
    if "days" in time:
        right += [
            ("steps", f"{time['steps']:,}"),
            ("tokens", count_of(time["tokens"])),
            ("time", duration_of(time["days"])),
        ]
        right += [("cost", f"${time['dollars']:,.0f}")] if time["dollars"] is not None else []
    right.append(("disk", f"{sum(stage['disk_gb'].values()):,.{digits}f} GB"))
    for row in range(max(len(left), len(right))):
        table.add_row(*(left[row] if row < len(left) else ("", "")), *(right[row] if row < len(right) else ("", "")))
    return table


def _show_rejected(rejected: list[dict[str, str]]) -> None:
    for entry in rejected[:_MOST_REJECTED]:
        out.print(Text(f"  not {entry['layout']}: {entry['reason']}", style="dim"))
    if len(rejected) > _MOST_REJECTED:
        out.print(Text(f"  and {len(rejected) - _MOST_REJECTED} more: --json has them", style="dim"))


def _map_table(cells: list[Cell], title: str) -> Table:
    batches = sorted({cell.batch_size for cell in cells})
    table = Table(title=title, title_justify="left")
    table.add_column("context \\ batch", justify="right", no_wrap=True)
    for batch in batches:
        table.add_column(str(batch), justify="right", no_wrap=True)
    by_place = {(cell.batch_size, cell.context): cell for cell in cells}
    for context in sorted({cell.context for cell in cells}):
        row = [by_place[batch, context] for batch in batches]
        table.add_row(f"{context:,}", *(_speedup(cell) for cell in row))
    return table


def _speedup(cell: Cell) -> Text:
    style = "dim" if not cell.fits else "green" if cell.speedup > 1 else "red"
    return Text(f"{cell.speedup:.2f}×", style=style)


def _show_explained(explained: dict[str, Any]) -> None:
    """Bytes, operations and time by part; those of two forwards are added up."""
    title = f"{MODES[explained['mode']]}, batch {explained['batch_size']}, context {explained['context']:,}"
    table = Table(title=title, title_justify="left")
    table.add_column("part", no_wrap=True)
    for name in ("AR", "TiDAR"):
        for unit in (f"{name}\nGB", "\nGFLOP", "\nms"):
            table.add_column(unit, justify="right", no_wrap=True)
    for place, part in enumerate(explained["ar"]["parts"]):
        same = [step["parts"][place] for step in explained["tidar"]]
        cells = [f"{sum(each[key] for each in each_kind):,.2f}" for each_kind in ([part], same) for key in _UNITS]
        table.add_row(part["name"], *cells)
    show_table(table)
    tokens = " + ".join(f"{step['tokens']:.0f}" for step in explained["tidar"])
    read = ""
    if explained["ar"]["touched_experts"]:
        touched = explained["tidar"][0]["touched_experts"]
        read = f"; {touched:.1f} experts of a layer are read instead of {explained['ar']['touched_experts']:.1f}"
    out.print(Text(f"{tokens} tokens a sequence instead of 1{read}. {explained['sentence']}."))
