"""What a checkpoint is, and what zconvert would do with it, from `config.json` and headers alone: no torch, no weights.

`describe` returns what `zconvert inspect --json` prints. Its keys are stable; later versions may add some.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from zconvert.checkpoint.headers import Headers, TensorInfo
from zconvert.checkpoint.mask_token import choose_mask_token, read_vocabulary
from zconvert.checkpoint.source import Source, headers_of, read_config, tidar_settings
from zconvert.errors import UserError
from zconvert.tidar.families import judge
from zconvert.tidar.settings import TidarSettings

INPUT_EMBEDDINGS = ("embed_tokens.weight", "wte.weight", "word_embeddings.weight", "embed_in.weight")
"""how the names of input embeddings end"""
OUTPUT_EMBEDDINGS = ("lm_head.weight", "embed_out.weight")
"""the names of output embeddings (heads)"""


def describe(source: Source) -> dict[str, Any]:
    """Describes a checkpoint; a checkpoint that cannot be converted is described too, with the reason.

    Args:
        source: the checkpoint, with its weights or their headers.

    Returns:
        A dict that JSON can hold, null where the checkpoint does not say:

        - `name`, `revision`: Hub id or folder name; commit, for checkpoints of the Hub
        - `model_type`, `architectures`: as in config.json
        - `verdict`: `supported` or `refused`; `reason`: why it is refused, else null
        - `layers`: how many; `layer_types`: how many of each type
        - `experts`: `num` a layer and `per_token`; null for a dense model
        - `attention`: `heads`, `kv_heads`, `head_dim`, `sliding_window` (tokens, null where all is seen)
        - `context_length`: positions the model was made for, tokens
        - `rope`: the rotary embedding's parameters, by layer type where config.json nests them so
        - `dtypes`: by type of the weights, `tensors` and `bytes`
        - `parameters`: `total`, `active` for one token, `active_without_embeddings`
        - `vocabulary`: embedding `rows`, tokenizer `tokens`, and `spare_rows` between them
        - `tied_embeddings`: whether the head is the input embedding
        - `mask_token`: `id`, `text` and `source` (`existing`, `spare_row`, `grown`), as convert-init would choose it or
          has chosen it; null where refused
        - `shards`: `name` and `bytes` of each weight file
        - `tidar`: the settings of a converted checkpoint, else null
        - `next`: the command to run next, null where refused

    Raises:
        UserError: a file of the checkpoint is missing or damaged.
    """
    config = read_config(source.folder)
    verdict = judge(config)
    settings = tidar_settings(config)
    headers = headers_of(source)
    model = _language_model(config)
    embedding = find_tensor(headers, INPUT_EMBEDDINGS)
    rows = embedding.shape[0] if embedding and embedding.shape else None
    tokens = _tokens(source.folder)
    return {
        "name": source.name,
        "revision": source.revision,
        "model_type": config.get("model_type"),
        "architectures": config.get("architectures"),
        "verdict": "supported" if verdict.supported else "refused",
        "reason": verdict.reason,
        "layers": _whole(model, "num_hidden_layers"),
        "layer_types": _layer_types(model),
        "experts": _experts(model),
        "attention": _attention(model),
        "context_length": _whole(model, "max_position_embeddings"),
        "rope": _rope(model),
        "dtypes": _dtypes(headers),
        "parameters": count_parameters(headers, config),
        "vocabulary": {
            "rows": rows,
            "tokens": tokens,
            "spare_rows": None if rows is None or tokens is None else rows - tokens,
        },
        "tied_embeddings": is_tied(headers, config),
        "mask_token": _mask_token(source.folder, headers, config, settings) if verdict.supported else None,
        "shards": [{"name": shard.name, "bytes": shard.bytes} for shard in headers.shards],
        "tidar": settings.to_dict() if settings else None,
        "next": _next(source, settings) if verdict.supported else None,
    }


def count_parameters(headers: Headers, config: dict[str, Any]) -> dict[str, int | None]:
    """Counts parameters by the shapes of the tensors; a tied head that is stored as well counts once.

    Returns:
        `total`; `active`, those a token passes through: total − experts + experts · k / E, null where config.json
        does not tell k and E; `active_without_embeddings`, without the input embedding and the head.
    """
    embedding, head = find_tensor(headers, INPUT_EMBEDDINGS), find_tensor(headers, OUTPUT_EMBEDDINGS)
    outer = (embedding.items if embedding else 0) + (head.items if head else 0)
    total = sum(t.items for t in headers.tensors.values())
    if embedding and head and is_tied(headers, config):
        total -= head.items
        outer -= head.items
    in_experts = sum(t.items for t in headers.tensors.values() if "experts" in t.name.split("."))
    active: int | None = total
    if in_experts:
        experts = _experts(_language_model(config)) or {}
        num, per_token = experts.get("num"), experts.get("per_token")
        active = total - in_experts + in_experts * per_token // num if num and per_token else None
    return {
        "total": total,
        "active": active,
        "active_without_embeddings": None if active is None else active - outer,
    }


def find_tensor(headers: Headers, endings: Iterable[str]) -> TensorInfo | None:
    """The first tensor whose name is one of these or ends in it after a dot."""
    for ending in endings:
        for name, tensor in headers.tensors.items():
            if name == ending or name.endswith(f".{ending}"):
                return tensor
    return None


def is_tied(headers: Headers, config: dict[str, Any]) -> bool:
    """Whether the head is the input embedding: it is not stored, or config.json says so."""
    return find_tensor(headers, OUTPUT_EMBEDDINGS) is None or config.get("tie_word_embeddings") is True


def _tokens(folder: Path) -> int | None:
    """Entries of the tokenizer; None where it cannot be read. (What is supported is judged by its mask token then.)"""
    try:
        return len(read_vocabulary(folder))
    except UserError:
        return None


def _mask_token(
    folder: Path, headers: Headers, config: dict[str, Any], settings: TidarSettings | None
) -> dict[str, Any]:
    if settings is not None:
        return {"id": settings.mask_token_id, "text": settings.mask_token, "source": settings.mask_token_source}
    chosen = choose_mask_token(folder, headers, config, wanted=None)
    return {"id": chosen.id, "text": chosen.text, "source": chosen.source}


def _next(source: Source, settings: TidarSettings | None) -> str:
    if settings is None:
        pinned = f" --revision {source.revision}" if source.revision else ""
        return f"zconvert convert-init {source.argument}{pinned} --out {source.name.split('/')[-1]}-tidar-init"
    return f"zconvert generate {source.argument}" if settings.stages else "zconvert midtrain RECIPE.yaml"


def _language_model(config: dict[str, Any]) -> dict[str, Any]:
    """Composite models (images, audio) keep the language model's settings one level down."""
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) else config


def _whole(config: dict[str, Any], *keys: str) -> int | None:
    """The first of these keys that holds a whole number."""
    return next((config[key] for key in keys if type(config.get(key)) is int), None)


def _experts(config: dict[str, Any]) -> dict[str, int | None] | None:
    num = _whole(config, "num_experts", "num_local_experts", "n_routed_experts")
    if not num:
        return None
    per_token = _whole(config, "num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k")
    if per_token is None and config.get("model_type") == "zaya":
        per_token = 1  # the only number it knows; its first configs leave it out
    return {"num": num, "per_token": per_token}


def _attention(config: dict[str, Any]) -> dict[str, int | None]:
    heads, width = _whole(config, "num_attention_heads"), _whole(config, "hidden_size")
    head_dim = _whole(config, "head_dim")
    if head_dim is None and heads and width:
        head_dim = width // heads
    return {
        "heads": heads,
        "kv_heads": _whole(config, "num_key_value_heads") or heads,
        "head_dim": head_dim,
        "sliding_window": _window(config),
    }


def _window(config: dict[str, Any]) -> int | None:
    # Qwen's configs carry a window and a switch that turns it off.
    return None if config.get("use_sliding_window") is False else _whole(config, "sliding_window")


def _layer_types(config: dict[str, Any]) -> dict[str, int] | None:
    types = config.get("layer_types")
    if isinstance(types, list) and types:
        return dict(Counter(map(str, types)))
    layers = _whole(config, "num_hidden_layers")
    if layers is None:
        return None
    if config.get("model_type") == "zaya":
        return {"hybrid": layers}
    return {"sliding_attention" if _window(config) else "full_attention": layers}


def _rope(config: dict[str, Any]) -> dict[str, Any] | None:
    if isinstance(config.get("rope_parameters"), dict):
        return config["rope_parameters"]
    if "rope_theta" not in config:
        return None
    scaling = config.get("rope_scaling")  # transformers 4 kept the two apart
    return {"rope_theta": config["rope_theta"], **(scaling if isinstance(scaling, dict) else {"rope_type": "default"})}


def _dtypes(headers: Headers) -> dict[str, dict[str, int]]:
    """Largest first."""
    tensors: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    for t in headers.tensors.values():
        tensors[t.dtype] += 1
        sizes[t.dtype] += t.bytes
    return {dtype: {"tensors": tensors[dtype], "bytes": size} for dtype, size in sizes.most_common()}
