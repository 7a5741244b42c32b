"""What a checkpoint is, and what zconvert would do with it, from `config.json` and headers alone: no torch, no weights.

`describe` returns what `zconvert inspect --json` prints. Its keys are stable; later versions may add some.
"""

from __future__ import annotations

import re
import shlex
from collections import Counter
from dataclasses import asdict
from typing import Any

from zconvert.checkpoint.anatomy import (
    attention_of,
    cache_of,
    context_of,
    experts_of,
    layer_types_of,
    layers_of,
    rope_of,
    router_of,
)
from zconvert.checkpoint.headers import FolderFiles, Headers
from zconvert.checkpoint.listing import list_tensors
from zconvert.checkpoint.mask_token import choose_mask_token, read_vocabulary
from zconvert.checkpoint.parameters import INPUT_EMBEDDINGS, count_parameters, find_tensor, is_tied, moe_layers
from zconvert.checkpoint.quantisation import quantisation
from zconvert.checkpoint.source import Source, read_config, tidar_settings
from zconvert.checkpoint.verdict import refusal, sentence
from zconvert.errors import UserError
from zconvert.tidar.families import judge, language_config
from zconvert.tidar.settings import GATED_FILE, TidarSettings

_BALANCING_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")
_SINK = re.compile(r"(^|\.)(self_)?attn\..*(sink|softmax_offset)")


def describe(source: Source) -> dict[str, Any]:
    """Describes a checkpoint; a checkpoint that cannot be converted is described too, with the reason.

    Args:
        source: the checkpoint, with its weights or the place to read their headers from.

    Returns:
        A dict that JSON can hold, null where the checkpoint does not say (docs/inspect-json.md has an example):

        - `name`, `revision`: Hub id or folder name; commit, for checkpoints of the Hub
        - `model_type`, `architectures`: as in config.json
        - `family`: its row in the family table, null where it has none; `kind`: `mixture_of_experts` or `dense`
        - `verdict`: `supported` or `refused`; `reason`: why it is refused, in one sentence, else null
        - `layers`: how many; `layer_types`: how many of each type
        - `experts`: `num` a layer and `per_token`, `shared` ones that every token passes through, `moe_layers` and
          `dense_layers` (layers with and without experts); null for a dense model
        - `router`: `scoring` (`softmax`, `sigmoid`, …), `groups` of experts and `groups_per_token`, `aux_loss`
          (coefficient of the balancing loss), `scaling` of the experts' sum, `balancing_bias` (whether a bias that is
          no part of the weights evens out the choice); null for a dense model
        - `attention`: `kind` (`mha`, `gqa`, `mqa`, `mla`, `cca`), `heads`, `kv_heads`, `head_dim`, `sliding_window`
          and `chunk` (tokens, null where all is seen), `indexer_top_k` (tokens a sparse indexer picks), `sinks`
        - `cache`: for each kind (`full_kv`, `sliding_kv`, `chunked_kv`, `mla_latent`, `cca_state`, `conv_state`, …)
          its `layers`, `window` (tokens kept, null where all are) and `width` (values a token and layer; of a state,
          which does not grow, values a layer)
        - `context_length`: positions the model was made for, tokens
        - `rope`: the rotary embedding's parameters, by layer type where config.json nests them so
        - `dtypes`: by type of the weights, `tensors` and `bytes`
        - `quantisation`: `method`, `bits` and how many `tensors` are packed; null where none are
        - `parameters`: `total`, `active` for one token, `active_without_embeddings`; null where tensors are missing
        - `vocabulary`: embedding `rows`, tokenizer `tokens`, and `spare_rows` between them
        - `tied_embeddings`: whether the head is the input embedding
        - `mask_token`: `id`, `text` and `source` (`existing`, `spare_row`, `grown`, `virtual`), as convert-init would
          choose it for full training or has chosen it; null where refused
        - `shards`: `name` and `bytes` of each weight file
        - `index`: against the index of shards, how many tensors are `missing` and `extra`, some `examples` of them, and
          the `missing_shards`; null for a checkpoint without index
        - `tidar`: the settings of a converted checkpoint, else null
        - `gated_bytes`: size of the file of gated weights; null where there is none
        - `next`: the command to run next, null where refused

    Raises:
        UserError: config.json or a weight file is damaged, or there are no weights.
    """
    config = read_config(source.folder)
    settings = tidar_settings(config)
    listing = list_tensors(source)
    headers, model = listing.headers, language_config(config)
    reason = refusal(config, headers) or listing.problem
    mask, tokens, tokenizer_problem = _tokens(source, headers, config, settings, wanted=reason is None)
    reason = reason or tokenizer_problem
    embedding = find_tensor(headers, INPUT_EMBEDDINGS)
    rows = embedding.shape[0] if embedding and embedding.shape else None
    family, packed = judge(config).family, quantisation(config, headers)
    has_experts = bool(moe_layers(headers, config)) if headers.tensors else experts_of(model) is not None
    experts, incomplete = _experts(headers, config), listing.index is not None and listing.index.missing > 0
    return {
        "name": source.name,
        "revision": source.revision,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "family": family.model_type if family else None,
        "kind": "mixture_of_experts" if has_experts else "dense",
        "verdict": "refused" if reason else "supported",
        "reason": reason,
        "layers": layers_of(model),
        "layer_types": layer_types_of(model),
        "experts": experts,
        "router": _router(headers, model) if experts else None,
        "attention": {**attention_of(model), "sinks": any(_SINK.search(name) for name in headers.tensors)},
        "cache": cache_of(model),
        "context_length": context_of(model),
        "rope": rope_of(model),
        "dtypes": _dtypes(headers),
        "quantisation": asdict(packed) if packed else None,
        "parameters": count_parameters(Headers({}, ()) if incomplete else headers, config),
        "vocabulary": {
            "rows": rows,
            "tokens": tokens,
            "spare_rows": None if rows is None or tokens is None else rows - tokens,
        },
        "tied_embeddings": is_tied(headers, config),
        "mask_token": None if reason else mask,
        "shards": [{"name": shard.name, "bytes": shard.bytes} for shard in headers.shards],
        "index": asdict(listing.index) if listing.index else None,
        "tidar": settings.to_dict() if settings else None,
        "gated_bytes": None if settings is None or settings.gated is None else _gated_bytes(source),
        "next": None if reason else _next(source, settings),
    }


def _gated_bytes(source: Source) -> int | None:
    try:
        return (source.files or FolderFiles(source.folder)).size(GATED_FILE)
    except FileNotFoundError:
        return None


def _tokens(
    source: Source, headers: Headers, config: dict[str, Any], settings: TidarSettings | None, *, wanted: bool
) -> tuple[dict[str, Any] | None, int | None, str | None]:
    """The mask token, the tokenizer's number of entries, and why there is no mask token where one is wanted."""
    mask, problem = None, None
    if settings is not None:
        mask = {"id": settings.mask_token_id, "text": settings.mask_token, "source": settings.mask_token_source}
    elif wanted:
        try:
            chosen = choose_mask_token(source.folder, headers, config, wanted=None)
        except UserError as error:
            problem = sentence(error)
        else:
            mask = {"id": chosen.id, "text": chosen.text, "source": chosen.source}
            if chosen.source != "existing":  # it follows the last entry: a large tokenizer is not read twice
                return mask, chosen.id, None
    try:
        return mask, len(read_vocabulary(source.folder)), problem
    except UserError:
        return mask, None, problem


def _next(source: Source, settings: TidarSettings | None) -> str:
    if settings is None:
        pinned = f" --revision {source.revision}" if source.revision else ""
        made = shlex.quote(f"{source.name.split('/')[-1]}-tidar-init")
        return f"zconvert convert-init {source.argument}{pinned} --out {made}"
    return f"zconvert {'generate' if settings.stages else 'plan'} {source.argument}"


def _experts(headers: Headers, config: dict[str, Any]) -> dict[str, int | None] | None:
    """What config.json says, where the tensors bear it out: some configs keep keys of experts they do not have."""
    model = language_config(config)
    said, layers, with_experts = experts_of(model), layers_of(model), moe_layers(headers, config)
    if said is None or (headers.tensors and not with_experts):
        return None
    shared = any(
        part.startswith(("shared_expert", "shared_mlp")) for name in headers.tensors for part in name.split(".")
    )
    return {
        "num": said["num"],
        "per_token": said["per_token"],
        "shared": (said["shared"] or 1) if shared else 0 if headers.tensors else said["shared"],
        "moe_layers": with_experts if headers.tensors else None,
        "dense_layers": layers - with_experts if headers.tensors and layers is not None else None,
    }


def _router(headers: Headers, model: dict[str, Any]) -> dict[str, Any] | None:
    router = router_of(model)
    return router and {**router, "balancing_bias": any(name.endswith(_BALANCING_BIASES) for name in headers.tensors)}


def _dtypes(headers: Headers) -> dict[str, dict[str, int]]:
    """Largest first."""
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for t in headers.tensors.values():
        tensors[t.dtype] += 1
        sizes[t.dtype] += t.bytes
    return {dtype: {"tensors": tensors[dtype], "bytes": size} for dtype, size in sizes.most_common()}
