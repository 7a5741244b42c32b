"""Which checkpoints can be converted, and what each needs: one table, read from `config.json` alone. No torch here.

Adding a family is a row in `FAMILIES` and a parameter in `tests/contracts/families.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

ATTENTION_LAYERS = (
    "full_attention",
    "attention",
    "sliding_attention",
    "chunked_attention",
    "indexed_attention",
    "deepseek_sparse_attention",
    "hybrid",
    "hybrid_sliding",
)
"""kinds of layers in which the attention mask decides what a token reads (ZAYA and Inkling call theirs hybrid; sparse
indexed attention has the longer name in configurations up to transformers 5.17)"""


@dataclass(frozen=True)
class Family:
    """One row: how a family mixes its sequence, how the attention mask reaches its layers, and what else it needs."""

    model_type: str
    masks: Literal["single", "window", "layer_type"] = "single"
    """single: one mask for all layers. window: the same, with the config's sliding window where it has one.
    layer_type: a dict with a mask for each type of layer"""
    mask_keys: tuple[str, ...] = ()
    """keys of that dict where they are not the config's layer types"""
    mixing: Literal["attention", "cca", "lfm2", "inkling"] = "attention"
    """attention: masks say it all. The others have convolutions, which need predecessors: ZAYA's compressed attention
    (method.md, section 6), and the short convolutions of LFM2 and Inkling"""
    indexed: bool = False
    """a sparse indexer reads the mask too, which it wants even where nothing is hidden"""
    sinks: bool = False
    """attention has a learnt sink, in eager attention only as it comes: run in SDPA with one more key"""
    positions: bool = False
    """attention reads positions otherwise than by rotary embeddings, from the cache's length: it must be told them"""
    head: Literal["plain", "logits_scaling", "logit_scale", "softcap", "inkling"] = "plain"
    """what follows the output head: division by config.logits_scaling, multiplication by config.logit_scale,
    config.final_logit_softcapping, or Inkling's scaling and cut"""
    dense: bool = False
    """no experts"""
    explicit_layers: bool = False
    """a config that leaves the layer types out means recurrent layers"""


def _rows(*model_types: str, **properties: Any) -> dict[str, Family]:
    return {model_type: Family(model_type, **properties) for model_type in model_types}


_INDEXED = ("indexed_attention", "deepseek_sparse_attention")
FAMILIES = {
    # Mixture-of-experts models.
    **_rows("aria_text", "dbrx", "ernie4_5_moe", "flex_olmo", "glm4_moe", "hunyuan_v1_moe", "hy_v3", "jetmoe", "olmoe"),
    **_rows("minimax_m2", "solar_open"),
    **_rows("axk1", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "longcat_flash", "mistral4"),  # MLA
    **_rows("granitemoe", "granitemoeshared", head="logits_scaling"),
    **_rows("mixtral", "phimoe", "qwen3_moe", masks="window"),
    **_rows("afmoe", "dots1", "exaone_moe", "kolibri1", "laguna", "mellum", "qwen2_moe", masks="layer_type"),
    **_rows("beam", "gemma4_text", masks="layer_type", head="softcap"),
    **_rows("cohere2_moe", masks="layer_type", head="logit_scale"),
    **_rows("flint", "gpt_oss", "mimo_v2_flash", masks="layer_type", sinks=True),
    **_rows("granitemoe_swa", masks="layer_type", sinks=True, head="logits_scaling"),
    **_rows(
        "granitemoehybrid",
        masks="layer_type",
        mask_keys=("full_attention", "attention"),
        head="logits_scaling",
        explicit_layers=True,
    ),
    # Sparse indexers. Hy-V4 has sinks too, and runs in eager attention: its indexer is dropped under any other name.
    **_rows("axk2", "deepseek_v32", "glm_moe_dsa", "hy_v4", masks="layer_type", mask_keys=_INDEXED, indexed=True),
    **_rows("dots3_note_text", masks="layer_type", indexed=True),
    **_rows("llama4_text", masks="layer_type", positions=True),
    # Convolutions.
    **_rows("zaya", masks="layer_type", mixing="cca"),
    **_rows("lfm2_moe", masks="layer_type", mixing="lfm2"),
    **_rows(
        "inkling_text",
        masks="layer_type",
        mask_keys=("full_attention", "sliding_attention"),
        mixing="inkling",
        positions=True,
        head="inkling",
    ),
    # Dense models.
    **_rows("arcee", "ernie4_5", "gemma", "glm", "glm4", "hunyuan_v1_dense", "llama", "nemotron", "olmo2", dense=True),
    **_rows("seed_oss", "stablelm", dense=True),
    **_rows("granite", head="logits_scaling", dense=True),
    **_rows("cohere", head="logit_scale", dense=True),
    **_rows("mistral", "phi3", "starcoder2", masks="window", dense=True),
    **_rows("exaone4", "ministral", "olmo3", "qwen2", "qwen3", "smollm3", masks="layer_type", dense=True),
    **_rows("gemma2", "gemma3_text", masks="layer_type", head="softcap", dense=True),
    **_rows("cohere2", masks="layer_type", head="logit_scale", dense=True),
    **_rows("lfm2", masks="layer_type", mixing="lfm2", dense=True),
}

COMPOSITES = ("aria", "gemma3", "gemma4", "llama4", "mistral3")
"""models of text and images of which the text model is converted and the rest left as it is"""

_RECURRENT = "a recurrent state runs over the whole row, so mask tokens would read every clean token"
_RECURRENT_LAYERS = ("mamba", "mamba2", "linear_attention", "recurrent", "kda", "gated_deltanet")
REFUSED = {
    "nemotron_h": f"Mamba layers: {_RECURRENT}",
    "jamba": f"Mamba layers: {_RECURRENT}",
    "qwen3_next": f"delta-net layers: {_RECURRENT}",
    "qwen3_5_moe_text": f"delta-net layers: {_RECURRENT}",
    "kimi_linear": f"delta-net (KDA) layers: {_RECURRENT}",
    "bailing_hybrid": f"linear-attention layers: {_RECURRENT}",
    "qwen4_exp": f"delta-net layers: {_RECURRENT}",
    "minimax": f"lightning-attention layers: {_RECURRENT}",
    "minimax_m3_vl_text": "its block-sparse indexer goes by cache slot, and would have to go by position",
    "deepseek_v4": "its compressed key-value cache mixes neighbouring tokens, whatever the mask hides",
    "doge": "its router is not causal: a token's experts depend on later tokens",
    "inkling2_text": "its dynamic convolutions read neighbours in the row, and would have to read predecessors",
}


@dataclass(frozen=True)
class Verdict:
    """Whether a checkpoint can be converted: its family's row, or the reason why not."""

    family: Family | None
    reason: str | None = None

    @property
    def supported(self) -> bool:
        """True where the conversion works."""
        return self.family is not None


def judge(config: dict[str, Any]) -> Verdict:
    """Judges a checkpoint by the contents of its `config.json`.

    >>> judge({"model_type": "mixtral"}).supported
    True
    >>> judge({"model_type": "mixtral", "layer_types": ["full_attention", "mamba"]}).reason
    'layers of type mamba: a recurrent state runs over the whole row, so mask tokens would read every clean token'
    """
    found = config.get("model_type")
    model_type = found if isinstance(found, str) else ""  # JSON may hold anything there
    if model_type in REFUSED:
        return Verdict(None, REFUSED[model_type])
    if language_config(config) is not config:
        return _judge_composite(model_type, language_config(config))
    family = FAMILIES.get(model_type)
    layer_types = config.get("layer_types") or config.get("layers_block_type") or []
    if not isinstance(layer_types, list) or not all(isinstance(kind, str) for kind in layer_types):
        return Verdict(None, f"its config.json has layer_types {layer_types!r}, expected a list of names")
    known = {*ATTENTION_LAYERS, *(["conv"] if family is not None and family.mixing == "lfm2" else [])}
    others = sorted(set(layer_types) - known)
    if others:
        recurrent = [kind for kind in others if kind in _RECURRENT_LAYERS]
        if recurrent:
            return Verdict(None, f"layers of type {', '.join(recurrent)}: {_RECURRENT}")
        return Verdict(None, f"layers of type {', '.join(others)}, of which it is not known how they mix tokens")
    if family is None:
        return Verdict(
            None,
            f"model_type {found!r} is not in the family table yet: it takes a row there and a contract test "
            "(CONTRIBUTING.md shows how)",
        )
    if family.explicit_layers and not layer_types:
        return Verdict(None, f"its config.json names no layer types, which stands for Mamba layers: {_RECURRENT}")
    return Verdict(family)


def language_config(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a `config.json` that describes the language model; our settings stand there too.

    >>> language_config({"model_type": "gemma4", "text_config": {"model_type": "gemma4_text"}})
    {'model_type': 'gemma4_text'}
    """
    inner = config.get("text_config")
    return inner if isinstance(inner, dict) and str(config.get("model_type")) not in FAMILIES else config


def _judge_composite(model_type: str, text_config: dict[str, Any]) -> Verdict:
    inner = judge(text_config)
    if inner.family is None:
        return Verdict(None, f"of its text model: {inner.reason}")
    if model_type not in COMPOSITES:
        return Verdict(
            None,
            f"model_type {model_type!r} has a supported text model ({inner.family.model_type}), but is not among the "
            f"composite models that were tested ({', '.join(COMPOSITES)})",
        )
    return inner
