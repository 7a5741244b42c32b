"""`zconvert inspect`: what a checkpoint is, whether it can be converted, and what to run next."""

from __future__ import annotations

from typing import Any

from rich.table import Table
from rich.text import Text

from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.source import resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, print_json

_MASK_SOURCES = {
    "existing": "in the tokenizer already",
    "spare_row": "a spare embedding row",
    "grown": "needs new embedding rows",
}


def command(
    checkpoint: options.Checkpoint,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Tell what a checkpoint is and whether it can be converted. No weights are loaded or fetched."""
    with err.status(Text(f"Reading {checkpoint} …")):
        document = describe(resolve(checkpoint, revision=revision, token=token, weights=False))
    if as_json:
        print_json(document)
    else:
        show(document)


def show(document: dict[str, Any]) -> None:
    """Prints what `describe` returned, for people."""
    revision = f" @ {document['revision'][:12]}" if document["revision"] else ""
    out.print(_plain(f"{document['name']}{revision}", "bold"))
    out.print(_verdict(document))
    out.print()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="cyan", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _rows(document):
        table.add_row(name, _plain(text))
    out.print(table)
    if document["next"]:
        out.print()
        # soft_wrap: a command that the terminal folds by itself can still be copied whole
        out.print(Text.assemble(("Next: ", "bold"), _plain(document["next"])), soft_wrap=True)


def _verdict(document: dict[str, Any]) -> Text:
    settings = document["tidar"]
    if document["verdict"] == "refused":
        return Text.assemble(("Cannot be converted: ", "bold red"), _plain(document["reason"]))
    if settings is None:
        return Text("Can be converted", style="bold green")
    trained = f"trained by {', '.join(settings['stages'])}" if settings["stages"] else "not trained yet"
    return Text.assemble(
        ("Converted", "bold green"), _plain(f" from {settings['base_model'] or 'an unknown model'}, {trained}")
    )


def _rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    counts, rows = document["parameters"], []
    architectures = document["architectures"]
    known_as = f" ({', '.join(map(str, architectures))})" if isinstance(architectures, list) and architectures else ""
    rows.append(("Model", f"{_or_unknown(document['model_type'])}{known_as}"))
    rows.append(
        (
            "Parameters",
            f"{_count(counts['total'])}; active for a token {_count(counts['active'])}, "
            f"{_count(counts['active_without_embeddings'])} without embeddings",
        )
    )
    types = document["layer_types"] or {}
    rows.append(("Layers", f"{_or_unknown(document['layers'])}: {_joined(types) or 'of unknown types'}"))
    experts = document["experts"]
    routed = f"{experts['num']} a layer, {_or_unknown(experts['per_token'])} for a token" if experts else "none: dense"
    rows.append(("Experts", routed))
    attention = document["attention"]
    window = attention["sliding_window"]
    rows.append(
        (
            "Attention",
            f"{_or_unknown(attention['heads'])} heads of {_or_unknown(attention['head_dim'])}, "
            f"{_or_unknown(attention['kv_heads'])} for keys and values"
            + (f"; sliding window of {window:,} tokens" if window else ""),
        )
    )
    context = document["context_length"]
    rows.append(("Context", f"{context:,} tokens" if context else "unknown"))
    rows += [("RoPE", _rope(document["rope"]))] if document["rope"] else []
    vocabulary = document["vocabulary"]
    rows.append(
        (
            "Vocabulary",
            f"{_number(vocabulary['tokens'])} tokens in {_number(vocabulary['rows'])} embedding rows "
            f"({_number(vocabulary['spare_rows'])} spare), "
            f"{'tied to the head' if document['tied_embeddings'] else 'head of its own'}",
        )
    )
    mask = document["mask_token"]
    if mask:
        rows.append(("Mask token", f"{mask['text']}, id {mask['id']}: {_MASK_SOURCES.get(mask['source'], '')}"))
    if document["tidar"]:
        rows.append(("TiDAR", _settings(document["tidar"])))
    shards = document["shards"]
    size = _size(sum(shard["bytes"] for shard in shards))
    kinds = ", ".join(f"{dtype} {_size(kind['bytes'])}" for dtype, kind in document["dtypes"].items())
    rows.append(("Weights", f"{size} in {len(shards)} {'file' if len(shards) == 1 else 'files'}: {kinds}"))
    return rows


def _settings(settings: dict[str, Any]) -> str:
    counts = ", ".join(map(str, settings["proposals"] or ())) or f"1 to {settings['block_size']}"
    return f"blocks of {settings['block_size']}, proposals after {counts} accepted tokens"


def _rope(rope: dict[str, Any]) -> str:
    """One line for all layers, or one for each layer type where the parameters differ."""
    nested = {kind: inner for kind, inner in rope.items() if isinstance(inner, dict)}
    if not nested:
        return _rope_line(rope)
    lines = {kind: _rope_line(inner) for kind, inner in nested.items()}
    if len(set(lines.values())) == 1:
        return next(iter(lines.values()))
    return "\n".join(f"{kind}: {line}" for kind, line in lines.items())


def _rope_line(rope: dict[str, Any]) -> str:
    theta = rope.get("rope_theta")
    parts = [str(rope.get("rope_type") or rope.get("type") or "default")]
    parts += [f"base {theta:,.0f}"] if isinstance(theta, int | float) else []
    parts += [f"{key} {rope[key]}" for key in ("factor", "partial_rotary_factor") if key in rope]
    return ", ".join(parts).replace("partial_rotary_factor", "partial rotary factor")


def _joined(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _count(items: int | None) -> str:
    if items is None:
        return "unknown"
    for unit, name in ((10**9, "B"), (10**6, "M"), (10**3, "k")):
        if items >= unit:
            return f"{items / unit:.2f} {name}"
    return str(items)


def _size(size: int) -> str:
    for unit, name in ((10**9, "GB"), (10**6, "MB"), (10**3, "kB")):
        if size >= unit:
            return f"{size / unit:.1f} {name}"
    return f"{size} bytes"


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _or_unknown(value: object) -> str:
    return "unknown" if value is None else str(value)


def _plain(text: object, style: str = "") -> Text:
    """Text of a stranger's file: no markup is read in it, and control characters do not reach the terminal."""
    return Text("".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in str(text)), style)
