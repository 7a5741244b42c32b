"""Context parallelism: neighbouring processes share the tokens of a row.

The row's T clean tokens are cut into 2P chunks; process r of P has chunks r and 2P-1-r, so that all have as much to
attend to. A block's mask slots are where its first slot's position is, whole blocks always. For P = 2:

    clean    | 0 | 1 | 2 | 3 |        process 0: chunks 0 and 3, and the blocks that start there
                                      process 1: chunks 1 and 2, and the blocks that start there

Mask slots see clean tokens and their own block, so that only clean keys and values are gathered. A convolution reads
the tokens before a chunk, which are at the end of the chunk to its left: those few states are gathered too.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from zconvert.errors import UserError
from zconvert.tidar.families import Family
from zconvert.tidar.layout import NO_PREDECESSOR, PADDING, Layout, PackedLayout
from zconvert.tidar.masks import Reach, attention_masks, route
from zconvert.tidar.model import LayoutModel
from zconvert.tidar.packed_attention import FLEX, SEGMENTS, TILE, Runs, mask_of, runs_of
from zconvert.tidar.predecessors import Predecessors
from zconvert.tidar.sinks import stock_attention

ATTENTION = "context_parallel"
_FILLER = PADDING - 1
"""document id of the columns that make the rows of a process equally long"""


class ContextParallel:
    """A group of processes that share rows, seen by one of them."""

    def __init__(self, group: Any, rank: int, size: int) -> None:
        """Takes part in a group.

        Args:
            group: of torch.distributed.
            rank: this process's number in it.
            size: P, at least 2.
        """
        self.group, self.rank, self.size = group, rank, size

    def attach(self, model: LayoutModel) -> None:
        """Has the model's attention gather keys and values, in place; it then takes shards of rows only.

        Raises:
            UserError: the family cannot be trained so.
        """
        if model.family.indexed:
            raise UserError(
                f"{model.family.model_type} cannot be trained with context_parallel",
                found="a sparse indexer, which ranks the keys of the whole row",
                fix="set parallel.context_parallel to 1",
            )
        config = model.config
        self.implementation: str = config._attn_implementation
        """what attends, once keys and values are gathered"""
        AttentionInterface.register(ATTENTION, _attention)
        AttentionMaskInterface.register(ATTENTION, eager_mask)
        for module in model.model.modules():
            module.__dict__["context_parallel"] = self
        config._attn_implementation = ATTENTION

    def shard(self, layout: PackedLayout) -> Shard:
        """This process's part of packed rows.

        Args:
            layout: of whole rows, (R, T + M), T a multiple of 2P.
        """
        rows, length = layout.position_ids.shape[0], layout.first_slot or 0
        device = layout.position_ids.device
        assert length % (2 * self.size) == 0, (length, self.size)
        chunk = length // (2 * self.size)
        order = torch.arange(length, device=device).view(2 * self.size, chunk)
        # Chunks in the order in which gathering puts them: those of process 0, of process 1, …
        places = [place for r in range(self.size) for place in (r, 2 * self.size - 1 - r)]
        gathered = order[places].flatten()  # (T,)
        clean = gathered.view(self.size, -1)[self.rank]  # (2 chunks,)

        # A block is named by the place of its first slot.
        mine = (layout.block_ids[:, length:, None] // chunk == clean[::chunk] // chunk).any(-1)  # (R, M)
        slots = int(mine.sum(1).max())
        first = mine.int().argsort(dim=1, descending=True, stable=True)[:, :slots]
        real = mine.gather(1, first)
        columns = torch.cat([clean.expand(rows, -1), length + first], dim=1)
        is_real = torch.cat([torch.ones_like(clean, dtype=torch.bool).expand(rows, -1), real], dim=1)

        def local(values: Tensor, filler: int) -> Tensor:
            return values.gather(1, columns).masked_fill(~is_real, filler)

        query = Layout(
            position_ids=local(layout.position_ids, 0),
            clean_limit=local(layout.clean_limit, 0),
            block_ids=local(layout.block_ids, 2 * length),
            document_ids=local(layout.document_ids, _FILLER),
            predecessors=local(layout.predecessors, NO_PREDECESSOR),
        )

        key = Layout(
            *(
                torch.cat([getattr(layout, f.name)[:, :length], getattr(query, f.name)[:, 2 * chunk :]], dim=1)
                for f in fields(Layout)
            )
        )
        return Shard(self, layout, query, key, columns, is_real, gathered, chunk, length)

    def gather(self, states: Tensor) -> Tensor:
        """(…) -> (P, …): the states of all processes; gradients go back to where they came from."""
        return _Gather.apply(states.contiguous(), self.group, self.size)


@dataclass(frozen=True)
class Shard:
    """The part of packed rows that one process has: N columns, two chunks of clean tokens and some mask slots."""

    context: ContextParallel
    whole: PackedLayout
    """(R, T + M), the rows"""
    layout: Layout
    """(R, N); predecessors count in the whole rows"""
    key: Layout
    """(R, T + mask slots): all clean tokens of the rows, and this process's mask slots"""
    columns: Tensor
    """(R, N) place in the whole rows"""
    is_real: Tensor
    """(R, N) bool; the rest fills up rows that have fewer mask slots"""
    gathered: Tensor
    """(T,) place in the row of each gathered clean token"""
    chunk: int
    """clean tokens in a chunk"""
    length: int
    """T"""

    def masks(self, family: Family, config: Any, dtype: torch.dtype) -> Any:
        """The `attention_mask` argument of a forward: packed where the implementation takes that, else dense."""
        implementation = self.context.implementation
        if implementation not in (FLEX, SEGMENTS):
            return attention_masks(family, config, self.layout, self.key, dtype)
        keys = self.key.num_tokens
        tile = TILE if implementation == FLEX else keys
        return route(family, config, keys, lambda reach: mask_of(self.runs(reach), keys, self.num_clean, tile))

    def runs(self, reach: Reach) -> Runs:
        """Which columns of `key` each query sees: blocks stay whole and in order, so that they only move."""
        whole = runs_of(self.whole, reach)
        of_query = Runs(*(getattr(whole, field.name).gather(1, self.columns) for field in fields(Runs)))
        index = torch.arange(self.columns.shape[1], device=self.columns.device)
        place = self.length - self.num_clean + index  # of a slot among the keys
        is_slot = (index >= self.num_clean).expand_as(self.is_real)
        moved = (place - self.columns).masked_fill(~is_slot, 0)
        # What fills rows up sees itself.
        return Runs(
            first=of_query.first.masked_fill(~self.is_real, 0),
            end=of_query.end.masked_fill(~self.is_real, 0),
            own_first=torch.where(self.is_real, of_query.own_first + moved, place).int(),
            own_end=torch.where(self.is_real, of_query.own_end + moved, place + 1).int(),
        )

    @property
    def num_clean(self) -> int:
        """Clean tokens of this process."""
        return 2 * self.chunk

    def of_clean(self, values: Tensor) -> Tensor:
        """(R, T) -> (R, clean): the values of this process's clean tokens."""
        return values.gather(1, self.columns[:, : self.num_clean])

    def of_slots(self, values: Tensor) -> Tensor:
        """(R, M) -> (R, slots): the values of this process's mask slots."""
        columns = self.columns[:, self.num_clean :] - self.length
        return values.gather(1, columns).masked_fill(~self.is_real[:, self.num_clean :], 0)

    def before_slots(self, states: Tensor) -> Tensor:
        """What the clean tokens before each mask slot's position have, whichever process has them; no gradient.

        Args:
            states: (R, clean, C), of this process.

        Returns:
            (R, slots, C); zeros before the first.
        """
        everyone = self.context.gather(states.detach())  # (P, R, clean, C)
        whole = torch.zeros_like(states[:, :1]).repeat(1, self.length + 1, 1)
        whole[:, self.gathered + 1] = everyone.transpose(0, 1).flatten(1, 2)
        # A block is named after its first token's column, and stands for those from there on.
        slots = self.layout.block_ids - self.layout.clean_limit + self.layout.position_ids
        place = slots[:, self.num_clean :].clamp_max(self.length)
        return whole.gather(1, place[..., None].expand(-1, -1, states.shape[-1]))

    def predecessors(self, past: int) -> Predecessors:
        """For convolutions that read `past` tokens of the past: over `[start | before each chunk | N]`."""
        assert self.chunk >= past, (self.chunk, past)
        rows, total = self.columns.shape[0], self.columns.shape[1]
        device = self.columns.device
        starts = self.columns[:, : self.num_clean : self.chunk]  # (R, 2)
        halo = (starts[:, :, None] + torch.arange(-past, 0, device=device)).flatten(1)  # (R, 2 past)
        # Where each column of the whole rows is here; one more takes those that are nowhere.
        nowhere = 2 * self.length
        place = torch.zeros(rows, nowhere + 1, dtype=torch.int64, device=device)
        here = torch.arange(past, 3 * past + total, device=device).expand(rows, -1)
        place.scatter_(1, torch.where(halo < 0, nowhere, halo), here[:, : 2 * past])
        place.scatter_(1, torch.where(self.is_real, self.columns, nowhere), here[:, 2 * past :])

        latest = past - 1
        older = torch.arange(-1, past - 1, device=device).clamp_min_(0).expand(rows, past)
        # The first token before a chunk is the last that is read: its own predecessor is not.
        whole = self.whole_predecessors
        halo_before = whole.gather(1, halo.clamp_min(0))
        unread = (torch.arange(2 * past, device=device) % past == 0) | (halo < 0) | (halo_before == NO_PREDECESSOR)
        halo_index = torch.where(unread, latest, place.gather(1, halo_before.clamp_min(0)))
        mine = self.layout.predecessors
        index = torch.where(mine == NO_PREDECESSOR, latest, place.gather(1, mine.clamp_min(0)))
        return _ShardPredecessors(torch.cat([older, halo_index, index], dim=1), past, None, self)

    @property
    def whole_predecessors(self) -> Tensor:
        """(R, T) predecessors of all clean tokens, by place in the row."""
        return self.whole.predecessors[:, : self.length]


@dataclass
class _ShardPredecessors(Predecessors):
    """Predecessors over a shard and the few tokens before its chunks."""

    shard: Shard

    def with_past(self, layer_idx: int, name: str, states: Tensor, boundary: Any = None) -> Tensor:
        """Prepends what stands before a text, and the states before each chunk: (R, N, C) -> (R, 3 past + N, C)."""
        shard, context, past = self.shard, self.shard.context, self.past
        chunks = states[:, : shard.num_clean].unflatten(1, (2, shard.chunk))
        ends = context.gather(chunks[:, :, -past:])  # (P, R, 2, past, C)
        # Chunk c is the first of process c, or the second of process 2P-1-c; the one before chunk 0 is never read.
        left = []
        for own in (context.rank, 2 * context.size - 1 - context.rank):
            c = max(own - 1, 0)
            left.append(ends[c, :, 0] if c < context.size else ends[2 * context.size - 1 - c, :, 1])
        first = states.new_zeros(1, 1, states.shape[-1]) if boundary is None else boundary()
        return torch.cat([first.expand(states.shape[0], past, -1), *left, states], dim=1)


# Their names before torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _Gather(torch.autograd.Function):
    """All-gather; its gradient is a reduce-scatter. Every process of the group must run both."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: Any, size: int) -> Tensor:
        ctx.group, ctx.shape = group, states.shape
        out = states.new_empty(size, *states.shape)
        _all_gather(out.view(size * states.shape[0], *states.shape[1:]), states, group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradients[0].contiguous()
        out = gradient.new_empty(ctx.shape)
        _reduce_scatter(out, gradient.view(-1, *ctx.shape[1:]), group=ctx.group)
        return out, None, None


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: gathers clean keys and values, then attends as the model always did."""
    context: ContextParallel = module.__dict__["context_parallel"]
    slots = _slots(attention_mask, key, context)
    clean = key.shape[2] - slots

    def everyone(states: Tensor) -> Tensor:
        chunks = context.gather(states[:, :, :clean]).unflatten(3, (2, -1))  # (P, R, heads, 2, chunk, width)
        in_order = torch.cat([chunks[:, :, :, 0], chunks[:, :, :, 1].flip(0)])  # (2P, R, heads, chunk, width)
        return torch.cat([in_order.movedim(0, 2).flatten(2, 3), states[:, :, clean:]], dim=2)

    attend = ALL_ATTENTION_FUNCTIONS.get(context.implementation) or stock_attention(module)
    return attend(module, query, everyone(key), everyone(value), attention_mask, **options)


def _slots(attention_mask: Any, key: Tensor, context: ContextParallel) -> int:
    """Mask slots s among the n keys of this process, of P · (n - s) + s in the mask."""
    return (context.size * key.shape[2] - attention_mask.shape[-1]) // (context.size - 1)
