"""The rows of tokens: embedding and head as they stand in the files, and the values that a new token starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zconvert.checkpoint.headers import Headers, TensorInfo
from zconvert.checkpoint.mask_token import HEAD_NAMES, MaskToken, embedding_tensor, read_vocabulary
from zconvert.checkpoint.weights import read_chunks
from zconvert.errors import UserError

MASK_INITS = ("mean", "zero", "random")
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_ROWS_AT_ONCE = 4096

Floats = NDArray[np.float32]


class TokenRows:
    """The tensors that have a row for each token, and what to write into them."""

    def __init__(self, folder: Path, headers: Headers, config: dict[str, Any], mask: MaskToken) -> None:
        self.folder = folder
        self.mask = mask
        self.vocabulary = read_vocabulary(folder)
        self.embedding = embedding_tensor(headers, config)
        self.before = self.embedding.shape[0]
        heads = [headers.tensors[name] for name in HEAD_NAMES if name in headers.tensors]
        self.head = heads[0] if heads else None
        self.bias = headers.tensors.get(self.head.name.removesuffix("weight") + "bias") if self.head else None
        self.tied = self.head is not None and self._is_tied(self.head, config.get("tie_word_embeddings"))
        for tensor in (self.embedding, self.head, self.bias):
            if tensor is not None and (tensor.dtype not in _STORED or tensor.shape[0] != self.before):
                raise UserError(
                    f"{tensor.name} cannot be edited",
                    found=f"{tensor.dtype} {list(tensor.shape)}",
                    expected=f"{self.before} rows in F32, F16 or BF16",
                    fix="convert the unquantized checkpoint",
                )

    def edits(self, mask_init: str, seed: int) -> dict[str, Floats]:
        """Tensor name -> values (float32) of the mask token's row, and where rows are added of all rows from it on."""
        mean, spread = self._statistics(self.embedding)
        row = self._start_value(mask_init, mean, spread, seed)
        if self.mask.source != "grown":
            edits = {self.embedding.name: row[None]}
            if self.head is not None and self.tied:
                edits[self.head.name] = row[None]  # else the two would differ, and loaders would untie them
            return edits
        count = self.mask.rows - self.before
        # Rows without a token are the mean: its logit never exceeds the largest, while a zero row's can.
        rows = np.repeat(mean[None], count, axis=0)
        rows[self.mask.id - self.before] = row
        edits = {self.embedding.name: rows}
        for tensor in (self.head, self.bias):
            if tensor is not None:
                edits[tensor.name] = np.repeat(self._statistics(tensor)[0][None], count, axis=0)
        if self.head is not None and self.tied:
            edits[self.head.name] = rows
        return edits

    def _start_value(self, mask_init: str, mean: Floats, spread: float, seed: int) -> Floats:
        if mask_init == "mean":
            return mean
        if mask_init == "zero":
            return np.zeros_like(mean)
        if mask_init == "random":
            return (np.random.default_rng(seed).standard_normal(mean.shape) * spread).astype(np.float32)
        kind, _, token = mask_init.partition(":")
        if kind == "copy" and token:
            return as_floats(self._table(self.embedding)[self._id_of(token)], self.embedding.dtype)
        raise UserError(
            "the mask token's start value is not known",
            found=repr(mask_init),
            expected=f"{', '.join(MASK_INITS)} or copy:<token>",
            fix="for example --mask-init mean",
        )

    def _id_of(self, token: str) -> int:
        if token in self.vocabulary.ids:
            return self.vocabulary.ids[token]
        if token.isdecimal() and int(token) < self.before:
            return int(token)
        raise UserError(
            "there is no such token to copy the mask token's row from",
            found=repr(token),
            expected=f"an entry of the tokenizer, or an id from 0 to {self.before - 1}",
            fix="check the spelling; entries that begin a word often have a mark, as in 'Ġthe' or '▁the'",
        )

    def _table(self, tensor: TensorInfo) -> NDArray[Any]:
        shape = (tensor.shape[0], tensor.items // max(1, tensor.shape[0]))
        return np.memmap(self.folder / tensor.shard, _STORED[tensor.dtype], "r", tensor.start, shape)

    def _statistics(self, tensor: TensorInfo) -> tuple[Floats, float]:
        """Mean row over the tokenizer's entries (without the mask token), and the standard deviation around it."""
        table = self._table(tensor)
        ids = np.array(sorted(set(self.vocabulary.texts) - {self.mask.id}), dtype=np.int64)
        total, squares = np.zeros(table.shape[1]), np.zeros(table.shape[1])
        for start in range(0, len(ids), _ROWS_AT_ONCE):
            values = as_floats(table[ids[start : start + _ROWS_AT_ONCE]], tensor.dtype).astype(np.float64)
            total += values.sum(0)
            squares += (values**2).sum(0)
        mean = total / max(1, len(ids))
        if not np.isfinite(mean).all():
            raise UserError(
                f"{tensor.name} is damaged",
                found="NaN or infinity among its values",
                expected="finite numbers",
                fix="download or copy the checkpoint again",
            )
        spread = float(np.sqrt(np.maximum(squares / max(1, len(ids)) - mean**2, 0).mean()))
        return mean.astype(np.float32), spread

    def _is_tied(self, head: TensorInfo, declared: Any) -> bool:
        """Whether the head on disk is a copy of the embedding; the values tell where the configuration does not."""
        if isinstance(declared, bool):
            return declared
        if (head.shape, head.dtype) != (self.embedding.shape, self.embedding.dtype):
            return False
        both = [read_chunks(self.folder / t.shard, t) for t in (head, self.embedding)]
        return all(a == b for a, b in zip(*both, strict=True))


def as_floats(stored: NDArray[Any], dtype: str) -> Floats:
    """Stored values as float32; bfloat16 is the upper half of a float32."""
    if dtype == "BF16":
        return (stored.astype(np.uint32) << 16).view(np.float32)
    return stored.astype(np.float32)


def as_stored(values: Floats, dtype: str) -> bytes:
    """Float32 values as they stand in the file; to bfloat16 by rounding to the nearest, ties to even."""
    if dtype == "BF16":
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
    return values.astype(_STORED[dtype]).tobytes()
