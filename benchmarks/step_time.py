"""Step time of the packed row of 2T tokens against plain autoregressive training on 2T tokens of the same model.

    python benchmarks/step_time.py                                    # a small ZAYA on the CPU
    python benchmarks/step_time.py --family qwen3_moe --tokens 1024 --documents 8 --rounds 9
    python benchmarks/step_time.py --device cuda --dtype bfloat16 --kinds plain,flex,sdpa,dense --peak-tflops 989 \\
        --width 2048 --layers 12 --experts 16 --expert-width 2048 --vocabulary 262272 --tokens 8192 --checkpointing

In every round each kind runs one step, in turn; the ratios are of the medians. `plain` attends causally over one
text, in the implementation that transformers takes by itself: SDPA, or eager attention where there are sinks. The
others run the packed row: `dense` through the whole row's mask, `sdpa` by segments, `flex` in FlexAttention. All make
their loss in chunks, by the same function, so that what differs is the layout. Needs torch and transformers alone.
What it does on a GPU was never run on one: no figure of it is known.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import time
from types import SimpleNamespace
from typing import Any

import torch
import transformers

from zconvert.tidar.model import LayoutModel
from zconvert.training.implementations import checkpoint_activations, choose_attention, choose_experts
from zconvert.training.loss import cross_entropy_sum
from zconvert.training.objective import packed_losses

MASK = 1
FAMILIES = ("zaya", "qwen3_moe", "mixtral", "llama", "gpt_oss", "deepseek_v3", "deepseek_v32", "inkling_text")


def make_model(args: argparse.Namespace) -> Any:
    """A float32 model with random weights."""
    heads = max(1, args.width // args.head_dim)
    common = {
        "vocab_size": args.vocabulary,
        "hidden_size": args.width,
        "num_hidden_layers": args.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "head_dim": args.head_dim,
        "max_position_embeddings": 2 * args.tokens,
        **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id")),
    }
    experts = {
        "num_experts": args.experts,
        "num_local_experts": args.experts,
        "moe_intermediate_size": args.expert_width,
        "intermediate_size": args.expert_width,
    }
    if args.family == "zaya":
        experts["router_hidden_size"] = max(16, args.width // 8)
        kinds = ("hybrid", "hybrid_sliding")
        rope = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
        experts["rope_parameters"] = {kind: dict(rope) for kind in kinds}
    elif args.family != "llama":
        experts["num_experts_per_tok"] = args.top_k
    if args.family.startswith("deepseek"):
        common |= {
            "num_key_value_heads": heads,
            "head_dim": 32,
            "qk_nope_head_dim": args.head_dim,
            "v_head_dim": args.head_dim,
        }
        common |= {"qk_rope_head_dim": 32, "kv_lora_rank": args.width // 4, "q_lora_rank": args.width // 2}
        experts |= {"n_group": 1, "topk_group": 1, "mlp_layer_types": ["sparse"] * args.layers}
        experts |= {"first_k_dense_replace": 0, "index_topk": args.tokens // 4, "index_n_heads": heads}
    if args.family == "inkling_text":
        common |= {"swa_num_attention_heads": heads, "swa_num_key_value_heads": max(1, heads // 4)}
        common |= {"swa_head_dim": args.head_dim, "layer_types": ["hybrid"] * args.layers}
    config = transformers.AutoConfig.for_model(args.family, **common, **experts)
    with torch.device(args.device):
        return transformers.AutoModelForCausalLM.from_config(config)


def make_batch(args: argparse.Namespace) -> Any:
    """Rows of T tokens in documents of equal length, all of them scored."""
    shape = (args.rows, args.tokens)
    ids = torch.randint(2, args.vocabulary, shape, device=args.device)
    documents = torch.arange(args.tokens, device=args.device) * args.documents // args.tokens
    return SimpleNamespace(
        input_ids=ids,
        document_ids=documents.expand(shape).contiguous(),
        loss_mask=torch.ones_like(ids, dtype=torch.bool),
    )


def loss_of(kind: str, model: LayoutModel, batch: Any, args: argparse.Namespace) -> torch.Tensor:
    """The mean loss of a step."""
    if kind == "plain":
        ids = torch.cat([batch.input_ids, batch.input_ids.flip(1)], dim=1)  # (R, 2T)
        hidden = model.model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
        total, _ = cross_entropy_sum(model, hidden[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), args.chunk)
        return total / ids[:, 1:].numel()
    sums = packed_losses(model, batch, mask_token_id=MASK, block_size=args.block_size, loss_chunk_size=args.chunk)
    return (sums.ar + sums.diffusion) / (2 * batch.input_ids.numel())


class Bench:
    """One model, and one step of a kind at a time."""

    def __init__(self, args: argparse.Namespace) -> None:
        """Makes model, data and optimizer."""
        torch.manual_seed(0)
        self.args = args
        self.model = make_model(args).train()
        self.stock = self.model.config._attn_implementation
        self.layout_model = LayoutModel(self.model)
        self.dense = self.layout_model.config._attn_implementation
        print(choose_experts(self.layout_model, args.experts_implementation, autocast=args.dtype == "bfloat16"))
        if args.checkpointing:
            checkpoint_activations(self.layout_model)
        self.batch = make_batch(args)
        fused = args.optimizer == "fused"
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-5, fused=fused)

    def step(self, kind: str) -> tuple[float, float, float]:
        """Seconds of forward and backward pass, seconds of the whole step, and peak memory on the GPU in bytes."""
        args = self.args
        self.layout_model.config._attn_implementation = self.stock if kind == "plain" else self.dense
        if kind not in ("plain", "dense"):
            choose_attention(self.layout_model, "flex" if kind == "flex" else "sdpa", torch.device(args.device))
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = self.now()
        with torch.autocast(args.device, torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = loss_of(kind, self.layout_model, self.batch, args)
        loss.backward()
        middle = self.now()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        end = self.now()
        peak = torch.cuda.max_memory_allocated() if args.device == "cuda" else 0
        return middle - start, end - start, float(peak)

    def now(self) -> float:
        """The time, all work done; on one CPU thread the time it had the processor, which other work disturbs less."""
        if self.args.device == "cuda":
            torch.cuda.synchronize()
        return time.process_time() if self.args.device == "cpu" and self.args.threads == 1 else time.perf_counter()

    def flops(self, kind: str) -> float:
        """Of the products of a step's forward and backward pass, without what checkpointing repeats."""
        args, config = self.args, self.model.config
        embedding = self.model.get_input_embeddings().weight
        active = 0.0
        for name, parameter in self.model.named_parameters():
            if parameter.ndim < 2 or parameter is embedding:
                continue
            share = (1 if args.family == "zaya" else args.top_k) / args.experts if ".experts." in name else 1.0
            active += share * parameter.numel()
        if self.model.lm_head.weight is embedding:
            active += embedding.numel()
        tokens, length = 2 * args.tokens * args.rows, args.tokens
        document = length / args.documents
        # pairs of query and key: a causal triangle over 2T; or one over T and one below the mask slots, by document
        pairs = (2 * length) ** 2 / 2 if kind == "plain" else length * (document + args.block_size)
        width = config.num_attention_heads * args.head_dim
        return 6 * active * tokens + 3 * 4 * width * pairs * args.rows * args.layers


def parse() -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=FAMILIES, default="zaya")
    parser.add_argument("--width", type=int, default=512, help="hidden size")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--top-k", type=int, default=2, help="experts of a token; ZAYA has one")
    parser.add_argument("--expert-width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--tokens", type=int, default=512, help="T, clean tokens in a row")
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--documents", type=int, default=1, help="in a row")
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--chunk", type=int, help="tokens in a chunk of the loss; left out: the default")
    parser.add_argument("--kinds", default="plain,sdpa", help="of plain, dense, sdpa, flex")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the forward pass")
    parser.add_argument("--experts-implementation", help="left out: what suits the device")
    parser.add_argument("--optimizer", choices=("fused", "foreach"), default="fused", help="AdamW's implementation")
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads")
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU: 989 for an H100 or H200 in bfloat16")
    return parser.parse_args()


def main() -> None:
    """Runs the rounds and prints a line for each kind."""
    args = parse()
    torch.set_num_threads(args.threads)
    bench, kinds = Bench(args), args.kinds.split(",")
    size = sum(parameter.numel() for parameter in bench.model.parameters())
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    print(f"{vars(args)}\n{size / 1e6:.1f} M parameters, {versions}")
    for kind in kinds:  # compiles, allocates, starts the optimizer's state
        bench.step(kind)
    found = [{kind: bench.step(kind) for kind in kinds} for _ in range(args.rounds)]
    base: tuple[float, float] | None = None
    for kind in kinds:
        passes, whole = (statistics.median(row[kind][i] for row in found) for i in (0, 1))
        base = base or (passes, whole)
        line = f"{kind:6} forward and backward {passes:8.4f} s ({passes / base[0]:.3f}x), step {whole:8.4f} s "
        line += f"({whole / base[1]:.3f}x), {2 * args.tokens * args.rows / whole:10,.0f} tokens/s"
        if args.device == "cuda":
            line += f", peak {max(row[kind][2] for row in found) / 1e9:.2f} GB"
        if args.peak_tflops:
            line += f", MFU {bench.flops(kind) / passes / args.peak_tflops / 1e10:.1f} %"
        print(line)
    if args.device == "cpu":
        print(f"process peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
