"""Trains the checkpoint in `checkpoint/`: a 2.7 M parameter `ZayaForCausalLM` that adds two numbers in words.

Nothing of zconvert is used: what it writes is what any Hugging Face user could have written. From the project's root
(about half an hour on one CPU core; the same seed gives the same model on the same machine):

    OMP_NUM_THREADS=1 .venv/bin/python examples/tiny-zaya/make_checkpoint.py --out examples/tiny-zaya/checkpoint

What trained and what did not: `ZayaQKNorm.temp` starts at 0 in transformers, which makes attention uniform, and then
nothing is learnt; it starts at 1 here. Rows are whole documents, never cut. ZAYA's balancing biases are moved by the
loss-free rule (a step against the sign of each expert's excess load), since transformers leaves them alone.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from problems import answer_of, problems
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, ZayaConfig, ZayaForCausalLM

SPECIAL_TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>"]
PAD, EOS, BOS = 0, 1, 2
EMBEDDING_ROWS = 384  # a multiple of 64, as checkpoints pad them; the tokenizer has fewer entries
BALANCING_STEP = 1e-3


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the generator's own text, single digits kept apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=351,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    stream = problems("train", seed=0)
    tokenizer.train_from_iterator((next(stream).text for _ in range(5000)), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )


def make_model() -> ZayaForCausalLM:
    """A tiny ZAYA with full and sliding layers in turn."""
    config = ZayaConfig(
        vocab_size=EMBEDDING_ROWS,
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        moe_intermediate_size=192,
        num_experts=8,
        router_hidden_size=32,
        max_position_embeddings=1024,
        layer_types=["hybrid", "hybrid_sliding", "hybrid", "hybrid"],
        sliding_window=64,
        rope_parameters={
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
            for kind in ("hybrid", "hybrid_sliding")
        },
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    model = ZayaForCausalLM(config)
    for layer in model.model.layers:
        torch.nn.init.ones_(layer.self_attn.qk_norm.temp)
    return model


def balance_experts(model: ZayaForCausalLM) -> None:
    """Counts routes at each forward in training and steps the balancing biases against excess load."""

    def after_router(router: torch.nn.Module, _inputs: tuple, outputs: tuple) -> None:
        if router.training:
            biased = outputs[0].detach().softmax(-1) + router.balancing_biases
            load = torch.bincount(biased.argmax(-1), minlength=router.num_router_classes)[:-1].float()
            router.balancing_biases[:-1] -= BALANCING_STEP * torch.sign(load - load.mean())

    for layer in model.model.layers:
        layer.mlp.gate.register_forward_hook(after_router)


def learning_rate(step: int, steps: int, peak: float, warmup: int = 50) -> float:
    """Linear warm-up, then a cosine down to a hundredth of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


@torch.inference_mode()
def accuracy(model: ZayaForCausalLM, tokenizer: PreTrainedTokenizerFast, count: int, seed: int) -> float:
    """Share of held-out problems whose greedy answer is exactly right."""
    model.eval()
    stream, right = problems("held_out", seed), 0
    for _ in range(count):
        p = next(stream)
        ids = torch.tensor([[BOS, *tokenizer(p.prompt, add_special_tokens=False).input_ids]])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=96, do_sample=False)
        right += answer_of(tokenizer.decode(out[0, ids.shape[1] :])) == p.answer
    return right / count


def train(model: ZayaForCausalLM, tokenizer: PreTrainedTokenizerFast, steps: int, rows: int, peak: float) -> None:
    """Next-token training on rows that are one document each, padded on the right."""
    balance_experts(model)
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        lr=peak,
        betas=(0.9, 0.95),
    )
    stream, start, tokens = problems("train", seed=1), time.time(), 0
    model.train()
    for step in range(steps):
        docs = [[BOS, *tokenizer(next(stream).text, add_special_tokens=False).input_ids, EOS] for _ in range(rows)]
        width = max(map(len, docs))
        ids = torch.tensor([d + [PAD] * (width - len(d)) for d in docs])
        logits = model(ids).logits  # padding stands on the right: the causal mask keeps it out of every scored logit
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), ignore_index=PAD)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        optimizer.step()
        tokens += sum(map(len, docs))
        if step % 50 == 0 or step == steps - 1:
            print(
                f"step {step} loss {loss.item():.4f} tokens {tokens / 1e6:.2f}M {time.time() - start:.0f}s", flush=True
            )


def main() -> None:
    """Trains, checks the answers of the model as stored (bfloat16), and saves it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--rows", type=int, default=40, help="documents a step")
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    tokenizer, model = make_tokenizer(), make_model()
    print(f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(tokenizer)} tokens", flush=True)
    train(model, tokenizer, args.steps, args.rows, args.learning_rate)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.to(torch.bfloat16)
    for layer in model.model.layers:  # kept in float32 by from_pretrained too
        layer.mlp.gate.balancing_biases = layer.mlp.gate.balancing_biases.float()
    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    stored = ZayaForCausalLM.from_pretrained(args.out, dtype=torch.float32)
    print(f"held-out problems answered exactly: {accuracy(stored, tokenizer, 200, seed=7):.1%} of 200")


if __name__ == "__main__":
    main()
