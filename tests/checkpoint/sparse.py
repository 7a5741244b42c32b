"""Checkpoints of real size that take no room: true headers over files with holes, for what reads headers alone."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from zconvert.checkpoint.headers import DTYPE_BITS

Shapes = Mapping[str, tuple[int, ...]]


def meta_shapes(model_type: str, **options: Any) -> tuple[dict[str, tuple[int, ...]], dict[str, Any]]:
    """Names and shapes as transformers' model has them in memory, and its `config.json`; no memory is taken."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model_type, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    config.architectures = [type(model).__name__]
    return shapes, json.loads(config.to_json_string(use_diff=False))


def one_by_one(shapes: Shapes) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Experts as most families store them: one tensor each, the gate apart from what it gates."""
    for name, shape in shapes.items():
        stem, _, last = name.partition(".experts.")
        for expert in range(shape[0] if last else 0):
            if last == "gate_up_proj":
                half = (shape[1] // 2, shape[2])
                yield f"{stem}.experts.{expert}.gate_proj.weight", half
                yield f"{stem}.experts.{expert}.up_proj.weight", half
            else:
                yield f"{stem}.experts.{expert}.{last}.weight", shape[1:]
        if not last:
            yield name, shape


def write_sparse(folder: Path, shapes: Shapes, config: dict[str, Any], *, shards: int, dtype: str = "BF16") -> Path:
    """Writes a checkpoint without a tokenizer.

    Args:
        folder: where to write; must not exist.
        shapes: of the tensors, by name.
        config: `config.json`.
        shards: how many files; 1 for a single one without index.
        dtype: of all tensors, by safetensors' name.
    """
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    sizes = {name: math.prod(shape) * DTYPE_BITS[dtype] // 8 for name, shape in shapes.items()}
    total = max(1, sum(sizes.values()))
    parts: list[list[str]] = [[] for _ in range(shards)]
    place = 0
    for name, size in sizes.items():
        parts[min(place * shards // total, shards - 1)].append(name)
        place += size
    weight_map = {}
    for number, names in enumerate(parts, 1):
        file = "model.safetensors" if shards == 1 else f"model-{number:05d}-of-{shards:05d}.safetensors"
        write_sparse_file(folder / file, {name: (dtype, shapes[name]) for name in names})
        weight_map |= dict.fromkeys(names, file)
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_sparse_file(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    """Writes one safetensors file of tensors, each a type and a shape, with a hole in place of their bytes."""
    header, end = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)


def write_large_tokenizer(folder: Path, entries: int, merges: int) -> None:
    """A `tokenizer.json` of as many entries and merges as published ones have; they mean nothing."""
    vocabulary = {"<pad>": 0, "<eos>": 1, "<bos>": 2, "<unk>": 3, "<mask>": 4}
    vocabulary |= {f"\N{LOWER ONE EIGHTH BLOCK}w{number}": number for number in range(5, entries - 1)} | {
        "\N{ROCKET}": entries - 1
    }
    special = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    added = [{"id": place, "content": text, **special} for text, place in list(vocabulary.items())[:5]]
    pairs = [[f"w{number}", f"x{number % 977}"] for number in range(merges)]
    document = {"added_tokens": added, "model": {"type": "BPE", "vocab": vocabulary, "merges": pairs}}
    (folder / "tokenizer.json").write_text(json.dumps(document, indent=2, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps({"mask_token": "<mask>"}))
