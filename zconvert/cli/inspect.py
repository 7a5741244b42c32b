"""`zconvert inspect`: what a checkpoint is, whether it can be converted, and what to run next."""

from __future__ import annotations

from typing import Any

from rich.text import Text

from zconvert.checkpoint.describe import describe
from zconvert.checkpoint.source import resolve
from zconvert.cli import options
from zconvert.cli.ui import err, out, print_json, show_facts, size
from zconvert.tidar.settings import GATED_FILE, GatedParts

_MASK_SOURCES = {
    "existing": "in the tokenizer already",
    "spare_row": "a spare embedding row",
    "grown": "needs new embedding rows",
    "virtual": "without a row",
}
_ATTENTION = {
    "mha": "multi-head",
    "gqa": "grouped queries",
    "mqa": "one key-value head",
    "mla": "latent (MLA)",
    "cca": "compressed convolutional (CCA)",
}
_CACHES = {
    "full_kv": "all keys and values",
    "sliding_kv": "keys and values of the last {window} tokens",
    "chunked_kv": "keys and values of a chunk of {window} tokens",
    "compressed_kv": "compressed keys and values",
    "mla_latent": "latents (MLA)",
    "cca_state": "the convolutions' state (CCA)",
    "conv_state": "the convolutions' state",
    "recurrent_state": "a recurrent state",
}
_MOST_SHARDS = 4


def command(
    checkpoint: options.Checkpoint,
    as_json: options.Json = False,
    revision: options.Revision = None,
    token: options.Token = None,
) -> None:
    """Tell what a checkpoint is and whether it can be converted.

    Headers and config.json are read; no weights are loaded or fetched. docs/inspect-json.md describes --json.
    """
    with err.status(Text(f"Reading {checkpoint} …")):
        document = describe(resolve(checkpoint, revision=revision, token=token, weights=False))
    if as_json:
        print_json(document)
    else:
        show(document)


def show(document: dict[str, Any]) -> None:
    """Prints what `describe` returned, for people."""
    revision = f" @ {document['revision'][:12]}" if document["revision"] else ""
    out.print(Text(f"{document['name']}{revision}", "bold"))
    out.print(_verdict(document))
    out.print()
    show_facts(_rows(document), indent=0, style="cyan")
    if document["next"]:
        out.print()
        # soft_wrap: a command that the terminal folds by itself can still be copied whole
        out.print(Text.assemble(("Next: ", "bold"), Text(document["next"])), soft_wrap=True)


def _verdict(document: dict[str, Any]) -> Text:
    settings = document["tidar"]
    if document["verdict"] == "refused":
        return Text.assemble(("Cannot be converted: ", "bold red"), Text(document["reason"]))
    if settings is None:
        return Text("Can be converted", style="bold green")
    trained = f"trained by {', '.join(settings['stages'])}" if settings["stages"] else "not trained yet"
    return Text.assemble(
        ("Converted", "bold green"), Text(f" from {settings['base_model'] or 'an unknown model'}, {trained}")
    )


def _rows(document: dict[str, Any]) -> list[tuple[str, str]]:
    rows = []
    architectures = document["architectures"]
    known_as = f" ({', '.join(map(str, architectures))})" if isinstance(architectures, list) and architectures else ""
    dense = ", dense" if document["kind"] == "dense" else ""
    rows.append(("Model", f"{_or_unknown(document['model_type'])}{known_as}{dense}"))
    rows.append(("Parameters", _parameters(document["parameters"])))
    types = document["layer_types"] or {}
    rows.append(("Layers", f"{_or_unknown(document['layers'])}: {_joined(types) or 'of unknown types'}"))
    rows.append(("Experts", _experts(document["experts"])))
    rows += [("Router", _router(document["router"]))] if document["router"] else []
    rows.append(("Attention", _attention(document["attention"])))
    rows += [("Cache", "\n".join(map(_cache, document["cache"])))] if document["cache"] else []
    context = document["context_length"]
    rows.append(("Context", f"{context:,} tokens" if context else "unknown"))
    rows += [("RoPE", _rope(document["rope"]))] if document["rope"] else []
    rows.append(("Vocabulary", _vocabulary(document["vocabulary"], document["tied_embeddings"])))
    mask = document["mask_token"]
    if mask:
        name = f"{mask['text']}, id {mask['id']}" if mask["text"] else f"id {mask['id']}, beyond the vocabulary"
        rows.append(("Mask token", f"{name}: {_MASK_SOURCES.get(mask['source'], '')}"))
    if document["tidar"]:
        rows.append(("TiDAR", _settings(document["tidar"])))
    rows.append(("Weights", _weights(document)))
    if document["quantisation"]:
        packed = document["quantisation"]
        bits = f" in {packed['bits']} bits" if packed["bits"] else ""
        rows.append(("Quantised", f"{packed['method']}{bits}, {packed['tensors']:,} packed tensors"))
    rows += [("Index", _index(document["index"]))] if document["index"] else []
    return rows


def _parameters(counts: dict[str, int | None]) -> str:
    if counts["total"] is None:
        return "unknown, as weights are missing"
    active = "" if counts["active"] == counts["total"] else f"; active for a token {_count(counts['active'])}"
    return f"{_count(counts['total'])}{active}, {_count(counts['active_without_embeddings'])} without embeddings"


def _vocabulary(vocabulary: dict[str, int | None], tied: bool) -> str:
    rows = f"{_number(vocabulary['rows'])} embedding rows"
    if vocabulary["tokens"] is not None and vocabulary["rows"] is not None:
        rows = f"{_number(vocabulary['tokens'])} tokens in {rows} ({_number(vocabulary['spare_rows'])} spare)"
    return f"{rows}, {'tied to the head' if tied else 'head of its own'}"


def _experts(experts: dict[str, int | None] | None) -> str:
    if experts is None:
        return "none: dense"
    text = f"{experts['num']} a layer, {_or_unknown(experts['per_token'])} for a token"
    text += f", {experts['shared']} shared" if experts["shared"] else ""
    dense = experts["dense_layers"]
    return text + (f"; {dense} {'layer' if dense == 1 else 'layers'} without" if dense else "")


def _router(router: dict[str, Any]) -> str:
    parts = [_or_unknown(router["scoring"])]
    if (router["groups"] or 1) > 1:
        parts.append(f"{_or_unknown(router['groups_per_token'])} of {router['groups']} groups")
    parts += [f"aux loss {router['aux_loss']:g}"] if router["aux_loss"] else []
    parts += [f"scaling {router['scaling']:g}"] if router["scaling"] not in (None, 1) else []
    parts += ["balancing bias"] if router["balancing_bias"] else []
    return ", ".join(parts)


def _attention(attention: dict[str, Any]) -> str:
    if attention["heads"] is None:
        return "unknown"
    kind = f"{_ATTENTION.get(attention['kind'], attention['kind'])}: " if attention["kind"] else ""
    text = f"{kind}{attention['heads']} heads of {_or_unknown(attention['head_dim'])}"
    if attention["kind"] != "mla":
        text += f", {_or_unknown(attention['kv_heads'])} for keys and values"
    for name, phrase in (
        ("sliding_window", "sliding window of {:,} tokens"),
        ("chunk", "chunks of {:,} tokens"),
        ("indexer_top_k", "an indexer picks {:,} tokens"),
    ):
        text += f"; {phrase.format(attention[name])}" if attention[name] else ""
    return text + ("; sinks" if attention["sinks"] else "")


def _cache(entry: dict[str, Any]) -> str:
    window = f"{entry['window']:,}" if entry["window"] else "?"
    what = _CACHES[entry["kind"]].format(window=window) if entry["kind"] in _CACHES else entry["kind"]
    many = "layer" if entry["layers"] == 1 else "layers"
    unit = "" if entry["kind"].endswith("_state") else " a token"
    return f"{entry['layers']} {many}: {what}" + (f", {entry['width']:,} numbers{unit}" if entry["width"] else "")


def _weights(document: dict[str, Any]) -> str:
    shards = document["shards"]
    if not shards:
        return "none that can be read"
    kinds = ", ".join(f"{dtype} {size(kind['bytes'])}" for dtype, kind in document["dtypes"].items())
    total = size(sum(shard["bytes"] for shard in shards))
    lines = [f"{total} in {len(shards)} {'file' if len(shards) == 1 else 'files'}: {kinds}"]
    if len(shards) > 1:
        lines += [f"{shard['name']}  {size(shard['bytes'])}" for shard in shards[:_MOST_SHARDS]]
        more = shards[_MOST_SHARDS:]
        lines += [f"… and {len(more)} more, {size(sum(shard['bytes'] for shard in more))}"] if more else []
    if document["gated_bytes"] is not None:
        lines.append(f"{size(document['gated_bytes'])} in {GATED_FILE}")
    elif document["tidar"] and document["tidar"].get("gated") and document["tidar"]["stages"]:
        lines.append(f"{GATED_FILE} is missing")
    return "\n".join(lines)


def _index(index: dict[str, Any]) -> str:
    if not index["missing"] and not index["extra"]:
        return "agrees with the shards"
    parts = [f"{index['missing']:,} tensors missing, {index['extra']:,} extra, such as {', '.join(index['examples'])}"]
    parts += [f"missing: {', '.join(index['missing_shards'])}"] if index["missing_shards"] else []
    return "\n".join(parts)


def _settings(settings: dict[str, Any]) -> str:
    counts = ", ".join(map(str, settings["proposals"] or ())) or f"1 to {settings['block_size']}"
    text = f"blocks of {settings['block_size']}, proposals after {counts} accepted tokens"
    parts = settings.get("gated")
    if parts:
        text += f"\ngated, the source is frozen: {GatedParts(**parts).described()}"
    return text


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
    parts += [f"base {theta:,.0f}"] if isinstance(theta, int | float) and abs(theta) < 1e30 else []
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


def _number(value: int | None) -> str:
    return "unknown" if value is None else f"{value:,}"


def _or_unknown(value: object) -> str:
    return "unknown" if value is None else str(value)
