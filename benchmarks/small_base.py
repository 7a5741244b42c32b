"""A small AR base model of real text, to convert: Qwen3-MoE of 5.5 M parameters, trained in minutes on a CPU.

    python benchmarks/small_base.py --data gsm8k_train.jsonl --out out/gsm8k

The data are JSON lines with `question` and `answer`, as GSM8K has them. Writes `base/` (the checkpoint), `train.jsonl`
and `prompts.jsonl` (questions kept out of training) into the folder: what benchmarks/gated_ablation.py takes.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

PAD, EOS, BOS = 0, 1, 2
HELD_OUT = 50


def read_rows(data: Path) -> list[dict[str, str]]:
    """Questions and whole texts of the file's rows."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    prompts = [f"Question: {row['question']}\nAnswer:" for row in rows]
    return [{"prompt": p, "text": f"{p} {row['answer']}"} for p, row in zip(prompts, rows, strict=True)]


def make_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE of 2,048 entries, single digits kept apart."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        special_tokens=["<pad>", "<eos>", "<bos>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>")


def make_model() -> Qwen3MoeForCausalLM:
    """Four layers of eight experts, two of them active."""
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=2112,
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=32,
            moe_intermediate_size=256,
            num_experts=8,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            max_position_embeddings=2048,
            tie_word_embeddings=True,
            pad_token_id=PAD,
            bos_token_id=BOS,
            eos_token_id=EOS,
        )
    )


def train(model: Qwen3MoeForCausalLM, ids: torch.Tensor, steps: int, rows: int, length: int, peak: float) -> None:
    """Next-token training on pieces of one long stream, cut at random places."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.1)
    started = time.time()
    model.train()
    for step in range(steps):
        starts = torch.randint(len(ids) - length - 1, (rows,))
        batch = torch.stack([ids[start : start + length + 1] for start in starts])
        logits = model(batch[:, :-1]).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), batch[:, 1:].flatten())
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        done = step / steps
        optimizer.param_groups[0]["lr"] = peak * min(
            (step + 1) / 50, 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done))
        )
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step} loss {loss.item():.3f} {time.time() - started:.0f}s", flush=True)


def main() -> None:
    """Trains and saves."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True)
    rows = read_rows(args.data)
    for name, part in (("prompts.jsonl", rows[:HELD_OUT]), ("train.jsonl", rows[HELD_OUT:])):
        (args.out / name).write_text("".join(json.dumps(row) + "\n" for row in part))
    texts = [row["text"] for row in rows[HELD_OUT:]]
    tokenizer, model = make_tokenizer(texts), make_model()
    documents = tokenizer(texts, add_special_tokens=False)["input_ids"]
    ids = torch.tensor([token for document in documents for token in (BOS, *document, EOS)])
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {len(ids) / 1e6:.2f} M tokens",
        flush=True,
    )
    train(model, ids, args.steps, rows=8, length=256, peak=2e-3)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(args.out / "base")
    tokenizer.save_pretrained(args.out / "base")


if __name__ == "__main__":
    main()
