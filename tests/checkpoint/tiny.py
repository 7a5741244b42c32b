"""Tiny checkpoints on disk: random weights of Hugging Face's own models, and a real BPE tokenizer beside them."""

from __future__ import annotations

import string
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerFast

ROWS = 64
"""embedding rows of every tiny checkpoint"""
SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
MODEL_TYPES = ("zaya", "qwen3_moe", "mixtral")
_TEXT = "ten tall trees stand there and then they rest; seven more men enter the tent and sing to the old stone"


def make_tokenizer(size: int, *, mask_token: bool = False) -> PreTrainedTokenizerFast:
    """A BPE tokenizer of exactly `size` entries: 4 special tokens (and `<mask>` at id 4 if wanted), letters, merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    names = {"mask_token": "<mask>"} if mask_token else {}
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=SPECIAL_TOKENS + list(names.values()),
        initial_alphabet=list(string.ascii_lowercase + string.digits),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    if tokenizer.get_vocab_size() != size:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, {size} were asked for")
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>", **names
    )


def make_config(model_type: str, *, tied: bool | None = None) -> PretrainedConfig:
    """Two layers of width 32 with 4 experts; `tied` None leaves the family's own default."""
    from transformers import AutoConfig

    common = {
        "vocab_size": ROWS,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    }
    if tied is not None:
        common["tie_word_embeddings"] = tied
    if model_type == "zaya":
        rope = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
        own = {
            "moe_intermediate_size": 32,
            "num_experts": 4,
            "router_hidden_size": 16,
            "layer_types": ["hybrid", "hybrid_sliding"],
            "sliding_window": 16,
            "rope_parameters": {"hybrid": rope, "hybrid_sliding": rope},
        }
    elif model_type == "qwen3_moe":
        own = {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}
    elif model_type == "mixtral":
        own = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2}
    elif model_type == "gpt_oss":
        own = {"intermediate_size": 32, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}
        own |= {"layer_types": ["sliding_attention", "full_attention"], "rope_parameters": {"rope_theta": 10_000.0}}
    else:
        raise ValueError(f"no tiny {model_type}")
    return AutoConfig.for_model(model_type, **common, **own)


def make_checkpoint(
    folder: Path,
    model_type: str,
    *,
    tied: bool | None = None,
    spare_rows: int = 4,
    mask_token: bool = False,
    shards: int = 1,
    dtype: str = "bfloat16",
) -> Path:
    """Writes a checkpoint as Hugging Face users do: `save_pretrained` of a model and its tokenizer.

    Args:
        folder: where to write; must not exist.
        model_type: zaya, qwen3_moe, mixtral or gpt_oss.
        tied: whether input and output embeddings are one; None for the family's default.
        spare_rows: embedding rows beyond the tokenizer's entries.
        mask_token: whether the tokenizer has a `<mask>` already (id 4).
        shards: 1 for `model.safetensors`; more for an index and at least that many shards.
        dtype: bfloat16 or float32 on disk.
    """
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(model_type, tied=tied))
    for name, parameter in model.named_parameters():
        if name.endswith("qk_norm.temp"):  # zero at the start, which makes ZAYA's attention uniform
            torch.nn.init.ones_(parameter)
    model.generation_config.update(pad_token_id=0, eos_token_id=1, bos_token_id=2)
    model.to(getattr(torch, dtype))
    for name, buffer in model.named_buffers():
        if name.endswith("balancing_biases"):  # released ZAYAs keep them in float32, and so does from_pretrained
            buffer.data = buffer.data.float()
    size = sum(t.numel() * t.element_size() for t in model.state_dict().values())
    model.save_pretrained(folder, max_shard_size=2 * size if shards == 1 else size // shards)
    make_tokenizer(ROWS - spare_rows, mask_token=mask_token).save_pretrained(folder)
    return folder
