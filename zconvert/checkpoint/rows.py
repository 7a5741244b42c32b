"""The rows of tokens: embedding and head as they stand in the files, and the values that a new token starts from."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from zconvert.checkpoint.headers import Headers, TensorInfo
from zconvert.checkpoint.mask_token import HEAD_NAMES, MaskToken, Vocabulary, embedding_tensor
from zconvert.checkpoint.weights import read_chunks
from zconvert.errors import UserError
from zconvert.tidar.families import language_config

PER_LAYER_EMBEDDING = "embed_tokens_per_layer.weight"
MASK_INITS = ("mean", "zero", "random")
_STORED = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2"}
_BLOCK_BYTES = 256 * 1024  # so that a block in float32 stays in the processor's cache

Floats = NDArray[np.float32]


class TokenRows:
    """The tensors that have a row for each token, and what to write into them."""

    def __init__(
        self,
        folder: Path,
        headers: Headers,
        config: dict[str, Any],
        mask: MaskToken,
        vocabulary: Vocabulary,
        *,
        frozen: bool,
    ) -> None:
        """Finds the tensors.

        Args:
            folder: the checkpoint's.
            headers: its tensors.
            config: its `config.json`.
            mask: the mask token.
            vocabulary: the tokenizer's entries.
            frozen: no row is written, since mask slots have an embedding of their own.
        """
        self.folder = folder
        self.mask = mask
        self.vocabulary = vocabulary
        self.embedding = embedding_tensor(headers, config)
        self.before = self.embedding.shape[0]
        heads = [headers.tensors[name] for name in HEAD_NAMES if name in headers.tensors]
        self.head = heads[0] if heads else None
        self.bias = headers.tensors.get(self.head.name.removesuffix("weight") + "bias") if self.head else None
        tables = [t for t in headers.tensors.values() if t.name.endswith(PER_LAYER_EMBEDDING)]
        self.frozen = frozen
        self.per_layer = tables[0] if tables else None  # Gemma's, one more embedding that every layer reads
        for tensor in (self.embedding, self.head, self.bias, self.per_layer):
            if tensor is not None and (tensor.dtype not in _STORED or tensor.shape[0] != self.before):
                raise UserError(
                    f"{tensor.name} cannot be edited",
                    found=f"{tensor.dtype} {list(tensor.shape)}",
                    expected=f"{self.before} rows in F32, F16 or BF16",
                    fix="convert the unquantized checkpoint",
                )
        says_tied = language_config(config).get("tie_word_embeddings", config.get("tie_word_embeddings"))
        self.tied = self.head is not None and self._is_tied(self.head, says_tied)

    @property
    def first(self) -> int:
        """The first row that is written: the mask token's, or the first one that is added."""
        return self.before if self.mask.source == "grown" else self.mask.id

    @property
    def edited(self) -> list[TensorInfo]:
        """The tensors to write into: the embedding, a head tied to it, and where rows are added all that have them."""
        if self.frozen:
            return []
        if self.mask.source == "grown":
            return [t for t in (self.embedding, self.head, self.bias, self.per_layer) if t is not None]
        # An untied head keeps its row; a tied one must change too, else the two differ and loaders untie them.
        return [self.embedding, *([self.head] if self.head is not None and self.tied else [])]

    @property
    def count(self) -> int:
        """How many rows are written into each."""
        return self.mask.rows - self.before if self.mask.source == "grown" else 1

    def edits(self, mask_init: str, seed: int) -> dict[str, Floats]:
        """Tensor name -> values (float32) of the rows from `first` on. Reads the whole embedding, a little at a time.

        Raises:
            UserError: `mask_init` is not known, or a row that is read holds NaN or infinity.
        """
        if self.frozen:
            return {}
        mean = self._mean(self.embedding)
        row = self._start_value(mask_init, mean, seed)
        if self.mask.source != "grown":
            return {t.name: row[None] for t in self.edited}
        # Rows without a token are the mean: its logit never exceeds the largest, while a zero row's can.
        rows = np.repeat(mean[None], self.count, axis=0)
        rows[self.mask.id - self.before] = row
        edits = {self.embedding.name: rows}
        for tensor in self.edited[1:]:
            shared = self.tied and tensor is self.head
            edits[tensor.name] = rows if shared else np.repeat(self._mean(tensor)[None], self.count, axis=0)
        return edits

    def check_start(self, mask_init: str) -> None:
        """Reads no weights.

        Raises:
            UserError: there is no such start value, or no such token to copy.
        """
        kind, _, token = mask_init.partition(":")
        if kind == "copy" and token:
            self._id_of(token)
        elif mask_init not in MASK_INITS:
            raise UserError(
                "the mask token's start value is not known",
                found=repr(mask_init),
                expected=f"{', '.join(MASK_INITS)} or copy:<token>",
                fix="for example --mask-init mean",
            )

    def _start_value(self, mask_init: str, mean: Floats, seed: int) -> Floats:
        self.check_start(mask_init)
        if mask_init == "mean":
            return mean
        if mask_init == "zero":
            return np.zeros_like(mean)
        if mask_init == "random":
            spread = self._spread(self.embedding, mean)
            return (np.random.default_rng(seed).standard_normal(mean.shape) * spread).astype(np.float32)
        place = self._id_of(mask_init.partition(":")[2])
        _, row = next(self._blocks(self.embedding, place, place + 1))
        if not np.isfinite(row).all():
            raise self._not_finite(self.embedding, place)
        return row[0]

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

    def _blocks(self, tensor: TensorInfo, start: int, end: int) -> Iterator[tuple[int, Floats]]:
        """Rows `start` to `end` (exclusive) in float32, a few at a time, each block with the id of its first row.

        Read rather than mapped into memory: mapped pages would count as the process's own, all of them.
        """
        row_bytes = tensor.bytes // max(1, tensor.shape[0])
        step = max(1, _BLOCK_BYTES // max(1, row_bytes))
        with (self.folder / tensor.shard).open("rb") as file:
            file.seek(tensor.start + start * row_bytes)
            for first in range(start, end, step):
                data = file.read(min(step, end - first) * row_bytes)
                stored = np.frombuffer(data, _STORED[tensor.dtype])
                yield first, as_floats(stored, tensor.dtype).reshape(-1, tensor.items // tensor.shape[0])

    def _token_blocks(self, tensor: TensorInfo) -> Iterator[tuple[NDArray[np.int64], Floats]]:
        """The rows of the tokenizer's entries, without the mask token's, and their ids; a few at a time."""
        used = np.zeros(self.before, dtype=bool)
        used[[place for place in self.vocabulary.texts if place != self.mask.id]] = True
        for first, rows in self._blocks(tensor, 0, int(used.nonzero()[0].max(initial=-1)) + 1):
            kept = np.flatnonzero(used[first : first + len(rows)])
            yield first + kept, rows if len(kept) == len(rows) else rows[kept]

    def _mean(self, tensor: TensorInfo) -> Floats:
        """Mean row over the tokenizer's entries (without the mask token)."""
        total, count = np.zeros(tensor.items // tensor.shape[0]), 0
        for ids, rows in self._token_blocks(tensor):
            part = rows.sum(0)
            if not np.isfinite(part).all():
                bad = (~np.isfinite(rows)).any(1)
                if bad.any():
                    raise self._not_finite(tensor, int(ids[bad.argmax()]))
                part = rows.sum(0, dtype=np.float64)  # finite, but too large together
            total += part
            count += len(rows)
        return (total / max(1, count)).astype(np.float32)

    def _spread(self, tensor: TensorInfo, mean: Floats) -> float:
        """Standard deviation around the mean row, over all dimensions."""
        total, count = 0.0, 0
        for _, rows in self._token_blocks(tensor):
            total += float(np.square(rows - mean).sum(dtype=np.float64))
            count += rows.size
        return math.sqrt(total / max(1, count))

    def _not_finite(self, tensor: TensorInfo, row: int) -> UserError:
        token = self.vocabulary.texts.get(row)
        return UserError(
            f"{tensor.name} is damaged",
            found=f"NaN or infinity in row {row}" + ("" if token is None else f", that of {token!r}"),
            expected="finite numbers",
            fix="download or copy the checkpoint again",
        )

    def _is_tied(self, head: TensorInfo, declared: Any) -> bool:
        """Whether the head on disk is a copy of the embedding; the values tell where the configuration does not."""
        if isinstance(declared, bool):
            return declared
        if (head.shape, head.dtype) != (self.embedding.shape, self.embedding.dtype):
            return False
        if not all((self.folder / t.shard).exists() for t in (head, self.embedding)):
            return False  # headers alone were fetched, for a dry run
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
