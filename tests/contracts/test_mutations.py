"""A wrong mask, predecessor, position or cache breaks a contract: each is put in on purpose and must be caught."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from tests.contracts import checks
from tests.contracts.checks import BLOCK, ROWS, TOLERANCE
from tests.contracts.models import CONTRACT_MODELS, Pair, shared_random_pair
from zconvert.tidar import layout as layouts
from zconvert.tidar import masks
from zconvert.tidar.cache import TidarCache
from zconvert.tidar.layout import CLEAN, Layout
from zconvert.tidar.masks import EVERYTHING, Reach

CAUGHT = 50 * TOLERANCE
ALL = tuple(CONTRACT_MODELS)
ZAYA = ("zaya", "zaya_sliding")
SLIDING = ("zaya_sliding", "mixtral_sliding")

Patch = pytest.MonkeyPatch
Check = Callable[[Pair], float]


@dataclass(frozen=True)
class Mutation:
    """Something wrong, the models it matters to, and the checks of which every one must catch it."""

    apply: Callable[[Patch], None]
    models: tuple[str, ...]
    caught_by: tuple[Check, ...]


def clean(row: str = "one document") -> Check:
    return lambda pair: checks.clean_logits_differ(pair, ROWS[row])


def content(row: str = "one document") -> Check:
    return lambda pair: checks.clean_logits_see_mask_slots(pair, ROWS[row])


def slots(row: str = "one document") -> Check:
    return lambda pair: checks.mask_logits_differ(pair, ROWS[row])


def leak(row: str = "one document") -> Check:
    return lambda pair: checks.labels_leak(pair, ROWS[row])


def steps(pair: Pair) -> float:
    return checks.cached_steps_differ(pair)


# What goes wrong: each takes the right thing and spoils it.


def packed(spoil: Callable[[Layout], Layout]) -> Callable[[Patch], None]:
    right = layouts.packed_layout
    return lambda patch: patch.setattr(layouts, "packed_layout", lambda *a, **k: spoil(right(*a, **k)))


def decoding(spoil: Callable[[Layout], Layout]) -> Callable[[Patch], None]:
    right = layouts.decode_layout
    return lambda patch: patch.setattr(layouts, "decode_layout", lambda *a, **k: spoil(right(*a, **k)))


def seeing(spoil: Callable[[Tensor, Layout, Layout, Reach], Tensor]) -> Callable[[Patch], None]:
    right = masks.visible

    def wrong(query: Layout, key: Layout, reach: Reach = EVERYTHING) -> Tensor:
        return spoil(right(query, key, reach), query, key, reach)

    return lambda patch: patch.setattr(masks, "visible", wrong)


def limit_of_slots(change: Callable[[Layout], Tensor]) -> Callable[[Layout], Layout]:
    def spoil(layout: Layout) -> Layout:
        return replace(layout, clean_limit=torch.where(layout.is_masked, change(layout), layout.clean_limit))

    return spoil


def positions_of_slots(shift: int) -> Callable[[Layout], Layout]:
    return lambda layout: replace(layout, position_ids=layout.position_ids + shift * layout.is_masked)


def previous_column(layout: Layout) -> Layout:
    before = torch.arange(-1, layout.num_tokens - 1).expand_as(layout.predecessors)
    return replace(layout, predecessors=before)


def previous_clean_token(layout: Layout) -> Layout:
    """Mask slot i follows clean token i - 1: right at a block's start, a leak of the labels after it."""
    before = layout.predecessors.clone()
    half = layout.num_tokens // 2
    before[:, half:] = before[:, :half]
    return replace(layout, predecessors=before)


def previous_slot(layout: Layout) -> Layout:
    """A block's first slot follows the slot before it, instead of the clean token before its block."""
    columns = torch.arange(-1, layout.num_tokens - 1).expand_as(layout.predecessors)
    return replace(layout, predecessors=torch.where(layout.is_masked, columns, layout.predecessors))


def also_mask_slots(seen: Tensor, query: Layout, key: Layout, _: Reach) -> Tensor:
    earlier = key.position_ids[:, None, :] <= query.position_ids[:, :, None]
    same_document = query.document_ids[:, :, None] == key.document_ids[:, None, :]
    return seen | (~query.is_masked[:, :, None] & key.is_masked[:, None, :] & earlier & same_document)


def causal_slots(seen: Tensor, query: Layout, key: Layout, _: Reach) -> Tensor:
    later = key.position_ids[:, None, :] > query.position_ids[:, :, None]
    return seen & ~(query.is_masked[:, :, None] & later)


def no_window(seen: Tensor, query: Layout, key: Layout, _: Reach) -> Tensor:
    return RIGHT_VISIBLE(query, key, EVERYTHING)


def no_window_for_slots(seen: Tensor, query: Layout, key: Layout, _: Reach) -> Tensor:
    return torch.where(query.is_masked[:, :, None], RIGHT_VISIBLE(query, key, EVERYTHING), seen)


def window_one_short(seen: Tensor, query: Layout, key: Layout, reach: Reach) -> Tensor:
    return RIGHT_VISIBLE(query, key, EVERYTHING if reach.window is None else Reach(window=reach.window - 1))


def across_documents(_: Tensor, query: Layout, key: Layout, reach: Reach) -> Tensor:
    def one_document(layout: Layout) -> Layout:
        return replace(layout, document_ids=torch.zeros_like(layout.document_ids))

    return RIGHT_VISIBLE(one_document(query), one_document(key), reach)


def other_blocks(seen: Tensor, query: Layout, key: Layout, _: Reach) -> Tensor:
    return seen | (query.is_masked[:, :, None] & (key.block_ids != CLEAN)[:, None, :])


RIGHT_VISIBLE = masks.visible
RIGHT_COMMIT = TidarCache.commit
RIGHT_UPDATE = TidarCache.update


def commit_shifted(shift: int) -> Callable[[Patch], None]:
    def wrong(cache: TidarCache, count: int) -> None:
        RIGHT_COMMIT(cache, count)
        cache._lengths = [length + shift for length in cache._lengths]

    return lambda patch: patch.setattr(TidarCache, "commit", wrong)


def scratch_kept(patch: Patch) -> None:
    """Slots that were written once stay: rejected drafts are taken for text."""

    def wrong(cache: TidarCache, keys: Tensor, values: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        written = cache.__dict__.setdefault("written", {})
        held = cache._slots.get((layer, "keys")), cache._slots.get((layer, "values"))
        old = None if held[0] is None else tuple(t.clone() for t in held)
        all_keys, all_values = RIGHT_UPDATE(cache, keys, values, layer)
        if old is not None:
            kept = slice(cache.get_seq_length(), min(written[layer], all_keys.shape[2]))
            all_keys[:, :, kept], all_values[:, :, kept] = old[0][:, :, kept], old[1][:, :, kept]
        written[layer] = max(written.get(layer, 0), all_keys.shape[2])
        return all_keys, all_values

    patch.setattr(TidarCache, "update", wrong)


def states_of_rejected_drafts(patch: Patch) -> None:
    """The convolution goes on from the forward's last draft, accepted or not."""

    def wrong(cache: TidarCache, count: int) -> None:
        for place, (states, past) in cache._stash.items():
            cache._stash[place] = (states[:, BLOCK : BLOCK + count + past], past)
        RIGHT_COMMIT(cache, count)

    patch.setattr(TidarCache, "commit", wrong)


def states_one_late(patch: Patch) -> None:
    """The convolution goes on from the token before the last accepted one."""

    def wrong(cache: TidarCache, count: int) -> None:
        for place, (states, past) in cache._stash.items():
            cache._stash[place] = (torch.cat([states[:, :1], states], dim=1), past)
        RIGHT_COMMIT(cache, count)

    patch.setattr(TidarCache, "commit", wrong)


MUTATIONS = {
    "mask slots see the clean tokens of their own block": Mutation(
        packed(limit_of_slots(lambda layout: layout.clean_limit + BLOCK)), ALL, (leak(), slots())
    ),
    "mask slots see the clean tokens before them in their block": Mutation(
        packed(limit_of_slots(lambda layout: layout.position_ids)), ALL, (leak(), slots())
    ),
    "clean tokens see mask slots": Mutation(seeing(also_mask_slots), ALL, (clean(), content())),
    "mask slots are causal within their block": Mutation(seeing(causal_slots), ALL, (slots(), steps)),
    "mask slots see other blocks": Mutation(seeing(other_blocks), ALL, (slots(), steps)),
    "a training block sees one token too little": Mutation(
        packed(limit_of_slots(lambda layout: layout.clean_limit - 1)), ALL, (slots(),)
    ),
    "a decoding block sees one token too little": Mutation(
        decoding(limit_of_slots(lambda layout: layout.clean_limit - 1)), ALL, (steps,)
    ),
    "a decoding block sees one draft too many": Mutation(
        decoding(limit_of_slots(lambda layout: layout.clean_limit + 1)), ALL, (steps,)
    ),
    "documents see one another": Mutation(
        seeing(across_documents), ALL, (clean("several documents"), leak("several documents"))
    ),
    "the window is missing": Mutation(seeing(no_window), SLIDING, (clean(), slots(), steps)),
    "the window is missing for mask slots": Mutation(seeing(no_window_for_slots), SLIDING, (slots(), steps)),
    "the window is one token short": Mutation(seeing(window_one_short), SLIDING, (clean(), slots(), steps)),
    "mask slots stand behind the text instead of on it": Mutation(
        packed(positions_of_slots(24)), ("zaya", "qwen3_moe", "mixtral"), (slots(),)
    ),
    "positions of proposals are one too high": Mutation(decoding(positions_of_slots(1)), ALL, (steps,)),
    "positions of proposals are one too low": Mutation(decoding(positions_of_slots(-1)), ALL, (steps,)),
    "the predecessor is the previous column, in training": Mutation(
        packed(previous_column), ZAYA, (slots(), leak(), clean("several documents"))
    ),
    "the predecessor is the previous clean token": Mutation(packed(previous_clean_token), ZAYA, (slots(), leak())),
    "a training block's first slot follows the slot before it": Mutation(packed(previous_slot), ZAYA, (slots(),)),
    "the predecessor is the previous column, in decoding": Mutation(decoding(previous_column), ZAYA, (steps,)),
    "one token too many is committed": Mutation(commit_shifted(+1), ALL, (steps,)),
    "one token too few is committed": Mutation(commit_shifted(-1), ALL, (steps,)),
    "rejected drafts are not overwritten": Mutation(scratch_kept, ALL, (steps,)),
    "the convolution goes on from a rejected draft": Mutation(states_of_rejected_drafts, ZAYA, (steps,)),
    "the convolution goes on from one token earlier": Mutation(states_one_late, ZAYA, (steps,)),
}

CASES = [(mutation, model) for mutation, wrong in MUTATIONS.items() for model in wrong.models]


@pytest.mark.parametrize(("mutation", "model"), CASES)
def test_what_is_wrong_on_purpose_is_caught(mutation: str, model: str, monkeypatch: Patch) -> None:
    pair, wrong = shared_random_pair(model), MUTATIONS[mutation]
    wrong.apply(monkeypatch)
    for check in wrong.caught_by:
        # `not <=`: a difference that is not a number is caught too.
        assert not check(pair) <= CAUGHT


@pytest.mark.parametrize("model", ALL)
def test_the_same_checks_pass_where_nothing_is_wrong(model: str) -> None:
    pair = shared_random_pair(model)
    for check in (clean(), content(), slots(), leak(), steps, clean("several documents"), leak("several documents")):
        assert check(pair) < TOLERANCE
