"""Weight files: written tensor by tensor under the names, shards and types of the checkpoint that they come from."""

from __future__ import annotations

import contextlib
import json
import math
import re
import shutil
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from zconvert.checkpoint.folder import copy, copy_companions, new_folder, place
from zconvert.checkpoint.headers import DTYPE_BITS, INDEX_FILE, Headers, TensorInfo, read_headers
from zconvert.checkpoint.json_patch import parse_json_object, patch_json, read_json_text
from zconvert.checkpoint.mask_token import EMBEDDING_NAMES, HEAD_NAMES
from zconvert.checkpoint.provenance import PROVENANCE_FILE, carried_on
from zconvert.errors import UserError
from zconvert.tidar.families import language_config
from zconvert.tidar.settings import BIGRAM_FILE, GATED_FILE, TidarSettings

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from zconvert.tidar.bigram import Bigrams

_FLOATS = ("F64", "F32", "F16", "BF16")
_TORCH_NAMES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BY_OPTION = {"float32": "F32", "bfloat16": "BF16"}
_LISTED = 5
_LAYER = re.compile(r".*?(?:layers|blocks)\.\d+\.")
_CHUNK = 4 * 1024 * 1024


def write_shard(
    path: Path, tensors: Iterable[TensorInfo], metadata: Mapping[str, str], chunks: Callable[[str], Iterable[bytes]]
) -> None:
    """Writes one safetensors file, holding no more than one chunk of one tensor at a time.

    Args:
        path: the file to make; must not exist.
        tensors: name, type and shape of each (their offsets are not read).
        metadata: the file's `__metadata__`.
        chunks: tensor name -> its bytes, in pieces.

    Raises:
        ValueError: a tensor has not the bytes that its type and shape ask for.
    """
    start, ordered = _start_of_file(tensors, metadata)
    with path.open("xb") as file:
        file.write(start)
        for t in ordered:
            written = sum(file.write(chunk) for chunk in chunks(t.name))
            if written != stored_bytes(t):
                raise ValueError(f"{t.name}: {written} bytes written, {stored_bytes(t)} expected")


def shard_size(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> int:
    """Bytes of the file that `write_shard` would make."""
    start, ordered = _start_of_file(tensors, metadata)
    return len(start) + sum(stored_bytes(t) for t in ordered)


def _start_of_file(tensors: Iterable[TensorInfo], metadata: Mapping[str, str]) -> tuple[bytes, list[TensorInfo]]:
    """What stands before the tensors' bytes, and the tensors in the order of the file."""
    # Wide types first, as the safetensors library does: each tensor then begins at a multiple of its item's size.
    ordered = sorted(tensors, key=lambda t: -DTYPE_BITS[t.dtype])
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    end = 0
    for t in ordered:
        start, end = end, end + stored_bytes(t)
        header[t.name] = {"dtype": t.dtype, "shape": list(t.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text, ordered


def read_chunks(path: Path, tensor: TensorInfo) -> Iterator[bytes]:
    """A tensor's bytes, in pieces."""
    with path.open("rb") as file:
        file.seek(tensor.start)
        left = tensor.bytes
        while left > 0:
            chunk = file.read(min(left, _CHUNK))
            if not chunk:
                raise UserError(
                    f"{path} is truncated",
                    found="its end",
                    expected=f"{left} bytes more of {tensor.name}",
                    fix="download or copy the file again",
                )
            left -= len(chunk)
            yield chunk


def index_patch(folder: Path, old: Headers, new: Iterable[TensorInfo]) -> str | None:
    """The index with the totals of the new tensors; None where the checkpoint is one file."""
    if not old.indexed:
        return None
    tensors = list(new)
    text = read_json_text(folder / INDEX_FILE)
    metadata = parse_json_object(text, INDEX_FILE).get("metadata")
    totals: dict[str, Any] = {"total_size": sum(stored_bytes(t) for t in tensors)}
    # Only the difference: the library counts tied weights once, whatever is on disk.
    if isinstance(metadata, dict) and isinstance(metadata.get("total_parameters"), int):
        grown = sum(t.items for t in tensors) - sum(t.items for t in old.tensors.values())
        totals["total_parameters"] = metadata["total_parameters"] + grown
    return patch_json(text, totals, inside=["metadata"], name=INDEX_FILE)


def save_trained(
    model: PreTrainedModel,
    base: Path,
    out: Path,
    *,
    settings: TidarSettings,
    dtype: Literal["source", "float32", "bfloat16"] = "source",
    extra_texts: Mapping[str, str] | None = None,
    pieces: Iterable[dict[str, torch.Tensor]] | None = None,
    bigrams: Bigrams | None = None,
    entry: Mapping[str, Any] | None = None,
) -> None:
    """Writes a trained model as a checkpoint that looks like the one it was loaded from.

    Tensor names, shards, configuration and tokenizer are the base's; the weights are the model's. Transformers keeps
    other names in memory than on disk (experts are fused), so the model's layers are saved by those into a temporary
    folder, one after another, and the tensors are put from there into the base's layout.

    Args:
        model: the trained model, on any device.
        base: folder of the checkpoint that it was loaded from.
        out: folder to write; must not exist.
        settings: written to the `tidar` section of `config.json`.
        dtype: source keeps each tensor's type; float32 and bfloat16 change all, except that what the base keeps wider
            than most of its tensors (routers' biases) stays wide.
        extra_texts: further files to write, instead of the base's where it has them: text by file name.
        pieces: the model's tensors, from `pieces_on_disk`; for a sharded model, in the process that writes.
        bigrams: of the training text, for its drafts.
        entry: of the stage, for the history in `provenance.json`.

    Raises:
        UserError: `out` exists or cannot be written, or the model's tensors are not those of the base.
    """
    headers = read_headers(base)
    targets = with_types(headers, dtype)
    texts = {"config.json": config_patch(base, settings, dtype)}
    index = index_patch(base, headers, targets.values())
    if index is not None:
        texts[INDEX_FILE] = index
    origin = carried_on(base, settings, entry)
    if origin is not None:
        texts[PROVENANCE_FILE] = origin
    texts |= extra_texts or {}
    with new_folder(out) as folder:
        saved_folder = folder / ".saved"
        _save_pieces(pieces_on_disk(model) if pieces is None else pieces, saved_folder)
        saved = read_headers(saved_folder)
        sources = _match(headers, saved)
        for shard in headers.shards:
            tensors = [t for t in targets.values() if t.shard == shard.name]
            write_shard(folder / shard.name, tensors, shard.metadata, converted_chunks(saved_folder, sources, targets))
        shutil.rmtree(saved_folder)
        copy_companions(base, folder, without=texts)
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        _save_bigrams(bigrams, folder)
        check_written(folder, targets)


def save_gated(
    weights: Any,
    base: Path,
    out: Path,
    *,
    settings: TidarSettings,
    extra_texts: Mapping[str, str] | None = None,
    bigrams: Bigrams | None = None,
    entry: Mapping[str, Any] | None = None,
) -> None:
    """Writes a gated checkpoint: the base's files, its weights by link where the disk can, and the gated weights.

    Args:
        weights: the `GatedWeights` of the trained model.
        base: folder of the checkpoint that it was loaded from.
        out: folder to write; must not exist.
        settings: written to the `tidar` section of `config.json`.
        extra_texts: see `save_trained`.
        bigrams: likewise.
        entry: see `save_trained`.

    Raises:
        UserError: `out` exists or cannot be written.
    """
    from safetensors.torch import save_file

    headers = read_headers(base)
    texts = {"config.json": patch_config(base, {"tidar": settings.to_dict()})}
    origin = carried_on(base, settings, entry)
    if origin is not None:
        texts[PROVENANCE_FILE] = origin
    texts |= extra_texts or {}
    with new_folder(out) as folder:
        for shard in headers.shards:
            place(base / shard.name, folder / shard.name)
        copy_companions(base, folder, without=texts)
        if headers.indexed:
            copy(base / INDEX_FILE, folder / INDEX_FILE)
        path = folder / GATED_FILE
        path.parent.mkdir(exist_ok=True)
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.state_dict().items()}
        save_file(tensors, path, metadata={"format": "pt"})
        for name, text in texts.items():
            (folder / name).write_bytes(text.encode())
        _save_bigrams(bigrams, folder)
        check_written(folder, headers.tensors)


def _save_bigrams(bigrams: Bigrams | None, folder: Path) -> None:
    from safetensors.torch import save_file

    if bigrams is not None:
        path = folder / BIGRAM_FILE
        path.parent.mkdir(exist_ok=True)
        save_file({name: tensor.contiguous() for name, tensor in bigrams.tensors().items()}, path)


def check_written(folder: Path, expected: Mapping[str, TensorInfo]) -> None:
    """Reads the headers of what was written and compares.

    Raises:
        ValueError: a tensor is missing, or has another type or shape.
    """
    written = read_headers(folder).tensors
    wrong = [n for n, t in expected.items() if n not in written or _form(written[n]) != _form(t)]
    if wrong or len(written) != len(expected):
        raise ValueError(f"{folder}: tensors were not written as planned: {wrong[:_LISTED]}")


def _form(tensor: TensorInfo) -> tuple[str, tuple[int, ...], str]:
    return tensor.dtype, tensor.shape, tensor.shard


def stored_bytes(tensor: TensorInfo) -> int:
    """Bytes of a tensor in a file, by its type and shape."""
    return math.prod(tensor.shape) * DTYPE_BITS[tensor.dtype] // 8


def with_types(headers: Headers, dtype: str) -> dict[str, TensorInfo]:
    """A checkpoint's tensors with the types to write them in (source, float32 or bfloat16), without offsets."""
    floats = [t for t in headers.tensors.values() if t.dtype in _FLOATS]
    sizes = {d: sum(t.bytes for t in floats if t.dtype == d) for d in _FLOATS}
    main = max(sizes, key=lambda d: sizes[d])
    target = _BY_OPTION.get(dtype)

    def type_of(t: TensorInfo) -> str:
        kept_wide = target == "BF16" and t.dtype == "F32" and main in ("F16", "BF16")
        return t.dtype if target is None or t.dtype not in _FLOATS or kept_wide else target

    return {name: TensorInfo(name, type_of(t), t.shape, t.shard, 0, 0) for name, t in headers.tensors.items()}


def config_patch(base: Path, settings: TidarSettings, dtype: str) -> str:
    """The text of `config.json` with these settings, and the type of the weights where that is not the source's."""
    text = patch_config(base, {"tidar": settings.to_dict()})
    if dtype == "source":
        return text
    keys = [key for key in ("dtype", "torch_dtype") if key in parse_json_object(text, "config.json")]
    return patch_json(text, dict.fromkeys(keys or ["dtype"], dtype), name="config.json")


def patch_config(folder: Path, changes: Mapping[str, Any]) -> str:
    """The text of a checkpoint's `config.json` with members of its language model's part replaced or added."""
    text = read_json_text(folder / "config.json")
    config = parse_json_object(text, "config.json")
    inside = [] if language_config(config) is config else ["text_config"]
    return patch_json(text, changes, inside=inside, name="config.json")


def pieces_on_disk(
    model: PreTrainedModel, whole: Callable[[torch.Tensor], torch.Tensor] | None = None
) -> Iterator[dict[str, torch.Tensor]]:
    """A model's tensors by their names on disk, as `save_pretrained` has them, a layer at a time, on the CPU.

    Args:
        model: the model.
        whole: makes a whole tensor of a shard, where the model is sharded; all its processes go through all pieces.
    """
    from transformers.core_model_loading import revert_weight_conversion

    tensors = model.state_dict(keep_vars=True)
    # A tied weight has one name on disk.
    tied = {a for a, b in (model.all_tied_weights_keys or {}).items() if tensors.get(a) is tensors.get(b)}
    ignored = tied | set(model._keys_to_ignore_on_save or ())
    layers: dict[str, list[str]] = {}
    for name in tensors:
        if name not in ignored:
            layer = _LAYER.match(name)
            layers.setdefault(layer.group() if layer else "", []).append(name)
    for names in layers.values():
        piece = {}
        for name in names:
            tensor = tensors[name].detach()
            piece[name] = (tensor if whole is None else whole(tensor)).cpu()
        yield revert_weight_conversion(model, piece)


def _save_pieces(pieces: Iterable[dict[str, torch.Tensor]], folder: Path) -> None:
    from safetensors.torch import save_file

    folder.mkdir()
    shards: dict[str, str] = {}
    for number, piece in enumerate(pieces):
        shard = f"piece-{number:05d}.safetensors"
        save_file({name: tensor.contiguous() for name, tensor in piece.items()}, folder / shard)
        shards |= dict.fromkeys(piece, shard)
    (folder / INDEX_FILE).write_text(json.dumps({"metadata": {}, "weight_map": shards}))


def _match(base: Headers, saved: Headers) -> dict[str, TensorInfo]:
    """Where each tensor of the base is among the saved ones.

    Raises:
        UserError: names or shapes differ, or a tensor is of a type that cannot be trained.
    """
    sources = dict(saved.tensors)
    embedding = next((saved.tensors[name] for name in EMBEDDING_NAMES if name in saved.tensors), None)
    for name in HEAD_NAMES:
        if embedding is not None and name in base.tensors and name not in sources:
            sources[name] = embedding  # a tied head, which the base keeps on disk and transformers does not
    problems = [f"{name} is not in the model" for name in base.tensors if name not in sources]
    problems += [f"{name} is not in the base" for name in sources if name not in base.tensors]
    for name, t in base.tensors.items():
        if name in sources and sources[name].shape != t.shape:
            problems.append(f"{name} has shape {list(sources[name].shape)}, {list(t.shape)} in the base")
        elif name in sources and t.dtype != sources[name].dtype and not {t.dtype, sources[name].dtype} <= {*_FLOATS}:
            problems.append(f"{name} is {sources[name].dtype}, {t.dtype} in the base")
    if problems:
        more = [f"… and {len(problems) - _LISTED} more"] if len(problems) > _LISTED else []
        raise UserError(
            "the trained model does not have the tensors of its base",
            found="; ".join(problems[:_LISTED] + more),
            expected="the same names and shapes",
            fix="train from a checkpoint that this version of transformers saves under the names it was loaded from",
        )
    return sources


def converted_chunks(
    folder: Path, sources: Mapping[str, TensorInfo], targets: Mapping[str, TensorInfo]
) -> Callable[[str], Iterator[bytes]]:
    """Tensor name -> its bytes in the type to write.

    Args:
        folder: where the tensors are.
        sources: them, by the name that they are asked for.
        targets: the types to write.
    """
    import torch
    from safetensors import safe_open

    def chunks(name: str) -> Iterator[bytes]:
        source = sources[name]
        if source.dtype == targets[name].dtype and source.dtype not in _FLOATS:
            yield from read_chunks(folder / source.shard, source)
            return
        with contextlib.ExitStack() as stack:
            file = stack.enter_context(safe_open(str(folder / source.shard), framework="pt"))
            tensor: torch.Tensor = file.get_tensor(source.name)
            tensor = tensor.to(getattr(torch, _TORCH_NAMES[targets[name].dtype])).contiguous()
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(
                    f"the trained weights cannot be saved: {name} is not finite",
                    found="NaN or infinity",
                    expected="numbers that fit into " + targets[name].dtype,
                    fix="train with a lower learning rate, or save in float32",
                )
            flat = tensor.reshape(-1).view(torch.uint8)
            for start in range(0, flat.numel(), _CHUNK):
                yield flat[start : start + _CHUNK].numpy().tobytes()

    return chunks
