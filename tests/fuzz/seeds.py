"""Good inputs of each target, from which fuzzing begins, and the inputs that were found to break one."""

from __future__ import annotations

import json
from pathlib import Path

CORPUS = Path(__file__).with_name("corpus")
RECIPES = Path(__file__).parents[2] / "recipes"

_HEADER = {
    "__metadata__": {"format": "pt"},
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [], "data_offsets": [24, 26]},
    "c": {"dtype": "I64", "shape": [0, 7], "data_offsets": [26, 26]},
}
_INDEX = {"metadata": {"total_size": 16}, "weight_map": {"model.embed_tokens.weight": "a.safetensors"}}
_ASKED = {"model": "m", "stream": True, "n": 2, "max_tokens": 9, "temperature": 0.5, "seed": 1, "stop": ["."]}
_CONFIG = {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "vocab_size": 2,
    "hidden_size": 2,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "moe_intermediate_size": 32,
    "intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 16,
    "layer_types": ["sliding_attention", "full_attention"],
    "mlp_only_layers": [0],
    "decoder_sparse_step": 1,
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0},
    "routed_scaling_factor": 1.5,
    "router_aux_loss_coef": 0.001,
    "max_position_embeddings": 256,
    "quantization_config": {"quant_method": "mxfp4", "bits": 4},
    "tidar": {"block_size": 4, "mask_token_id": 1, "stages": ["midtrain"], "proposals": [1, 2]},
}


def seeds(target: str) -> list[bytes]:
    """Inputs that should pass."""
    if target == "header":
        return [b"\x01" + json.dumps(_HEADER).encode() + bytes(27), b"\x01{}\0"]
    if target == "index":
        return [json.dumps(_INDEX).encode()]
    if target == "recipe":
        stages = ("convert-init", "midtrain", "extend-context", "sft")
        files = [
            (bytes([stages.index(path.stem)]), path) for path in sorted(RECIPES.glob("*/*.yaml")) if path.stem in stages
        ]
        return [stage + path.read_bytes() for stage, path in files]
    if target == "json_patch":
        document = {
            "a": 1,
            "old": [1, {"b": None}],
            "inner": {"deeper": {"gone": 1.5e3}},
            "ids": [1],
            "gone": "\\u00e9",
        }
        texts = [json.dumps(document), json.dumps(document, indent=2), json.dumps(document, separators=(",", ":"))]
        return [bytes([how]) + text.encode() for how in range(12) for text in [*texts, "{}"]]
    if target == "request":
        chat = {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]}
        prompts = [
            {"prompt": "Once"},
            {"prompt": [[1, 2], "x"]},
            chat,
            {**chat, "stream_options": {"include_usage": True}},
        ]
        return [json.dumps({**_ASKED, **prompt}).encode() for prompt in prompts]
    if target == "config":
        composite = {"model_type": "llama4", "text_config": {**_CONFIG, "model_type": "llama4_text"}}
        others = ("zaya", "deepseek_v3", "mixtral", "llama", "glm4_moe", "gpt_oss")
        return [
            json.dumps(each).encode()
            for each in (_CONFIG, composite, *({**_CONFIG, "model_type": name} for name in others))
        ]
    raise ValueError(f"no target {target}")
