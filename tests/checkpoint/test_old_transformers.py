"""Configs as transformers 4 wrote them say the same after the conversion, to transformers 4.57 and to the one here.

In a virtual environment of its own. Run: `pytest -m slow tests/checkpoint/test_old_transformers.py`
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.checkpoint.tiny import ROWS
from tests.environments import HERE, run_in
from zconvert.checkpoint.graft import convert_init
from zconvert.checkpoint.source import resolve

pytestmark = pytest.mark.slow

SCRIPT = """
import json, sys
import transformers
configs = [transformers.AutoConfig.from_pretrained(folder).to_dict() for folder in sys.argv[1:]]
for config in configs:
    config.pop("_name_or_path", None)
print(json.dumps({"version": transformers.__version__, "configs": configs}))
"""

# As on the Hub, with the sizes of the tiny checkpoints: for Qwen3-30B-A3B, with a scaled rotary embedding as its card
# recommends for long texts, and for Mixtral-8x7B.
_SIZES = {
    **{"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"max_position_embeddings": 256, "vocab_size": ROWS, "bos_token_id": 2, "eos_token_id": 1},
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "architectures": ["Qwen3MoeForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "decoder_sparse_step": 1,
        "head_dim": 16,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 96,
        "max_window_layers": 2,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "output_router_logits": False,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.001,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.51.0",
        "use_cache": True,
        "use_sliding_window": False,
        **_SIZES,
    },
    "mixtral": {
        "architectures": ["MixtralForCausalLM"],
        "attention_dropout": 0.0,
        "head_dim": 16,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "intermediate_size": 32,
        "model_type": "mixtral",
        "num_experts_per_tok": 2,
        "num_local_experts": 4,
        "output_router_logits": False,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "router_aux_loss_coef": 0.02,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.36.0.dev0",
        "use_cache": True,
        **_SIZES,
    },
}


@pytest.mark.parametrize("spare_rows", [4, 0], ids=["spare row", "grown"])
@pytest.mark.parametrize("model_type", CONFIGS)
def test_a_converted_config_of_transformers_4_is_read_as_the_sources_by_4_57_and_by_5(
    tiny_checkpoint: Callable[..., Path], tmp_path: Path, python_of_4_57: Path, model_type: str, spare_rows: int
) -> None:
    source = tiny_checkpoint(model_type, spare_rows=spare_rows)
    (source / "config.json").write_text(json.dumps(CONFIGS[model_type], indent=2) + "\n")
    convert_init(resolve(source), tmp_path / "converted", block_size=4)

    for python, expected in ((python_of_4_57, "4.57."), (HERE, importlib.metadata.version("transformers"))):
        answer = run_in(python, SCRIPT, source, tmp_path / "converted", home=tmp_path)
        version, (before, after) = answer["version"], answer["configs"]
        assert version.startswith(expected)
        assert after.pop("tidar")["mask_token_id"] == ROWS - spare_rows
        assert "tidar" not in before
        if not spare_rows:
            assert (before.pop("vocab_size"), after.pop("vocab_size")) == (ROWS, ROWS + 64)
        assert after == before
        # What reads a config of another version wrongly falls back to defaults: these are not.
        rope = after.get("rope_parameters") or {"rope_theta": after["rope_theta"], **(after.get("rope_scaling") or {})}
        assert rope["rope_theta"] == 1e6
        assert rope.get("factor") == (4.0 if model_type == "qwen3_moe" else None)
        assert 4 in (after.get("num_experts"), after.get("num_local_experts"))
        assert after["num_experts_per_tok"] == 2
        assert after["head_dim"] == 16
