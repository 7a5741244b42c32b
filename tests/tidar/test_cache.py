"""The cache: committed slots stay, scratch slots are written over."""

from __future__ import annotations

import torch
from torch import Tensor

from zconvert.tidar.cache import GROWTH, TidarCache


def states(*numbers: float) -> Tensor:
    """(1, 2, N, 3) states, one number a token."""
    return torch.tensor(numbers).view(1, 1, -1, 1).expand(1, 2, -1, 3).clone()


def numbers(held: Tensor) -> list[float]:
    return held[0, 1, :, 2].tolist()


def test_a_forward_sees_what_is_committed_and_its_own_tokens() -> None:
    cache = TidarCache()
    keys, values = cache.update(states(1, 2, 3), -states(1, 2, 3), 0)
    assert (numbers(keys), numbers(values)) == ([1, 2, 3], [-1, -2, -3])
    cache.commit(2)
    keys, values = cache.update(states(7), -states(7), 0)
    assert (numbers(keys), numbers(values)) == ([1, 2, 7], [-1, -2, -7])


def test_what_was_not_committed_is_written_over() -> None:
    cache = TidarCache()
    cache.update(states(1, 2, 3, 4, 5), states(1, 2, 3, 4, 5), 0)
    cache.commit(1)
    keys, _ = cache.update(states(8, 9), states(8, 9), 0)
    assert numbers(keys) == [1, 8, 9]
    cache.commit(2)
    assert cache.get_seq_length() == 3
    keys, _ = cache.update(states(6), states(6), 0)
    assert numbers(keys) == [1, 8, 9, 6]


def test_layers_are_apart_and_share_the_border() -> None:
    cache = TidarCache()
    cache.update(states(1, 2), states(1, 2), 0)
    cache.update(states(3, 4), states(3, 4), 5)
    cache.commit(1)
    assert numbers(cache.update(states(9), states(9), 0)[0]) == [1, 9]
    assert numbers(cache.update(states(9), states(9), 5)[0]) == [3, 9]


def test_growing_keeps_what_is_committed_and_is_rare() -> None:
    cache, written, places = TidarCache(), [], set()
    for number in range(3 * GROWTH):
        keys, values = cache.update(states(number), -states(number), 0)
        cache.commit(1)
        written.append(float(number))
        places.add(keys.data_ptr())
        if number % 97 == 0 or number in (GROWTH - 1, GROWTH, 2 * GROWTH):
            assert numbers(keys) == written
            assert numbers(values) == [-n for n in written]
    assert len(places) <= 4


def test_states_keep_their_dtype() -> None:
    cache = TidarCache()
    keys, _ = cache.update(states(1).bfloat16(), states(1).bfloat16(), 0)
    assert keys.dtype == torch.bfloat16


def test_token_states_are_those_that_end_with_the_last_token_committed() -> None:
    cache = TidarCache()
    assert cache.token_states(0, "conv") is None
    past, new = torch.tensor([[[-2.0], [-1.0]]]), torch.tensor([[[10.0], [11.0], [12.0]]])
    for count, expected in ((1, [-1.0, 10.0]), (2, [10.0, 11.0]), (3, [11.0, 12.0])):
        cache.stash_token_states(0, "conv", torch.cat([past, new], dim=1), past=2)
        cache.commit(count)
        held = cache.token_states(0, "conv")
        assert held is not None
        assert held.flatten().tolist() == expected


def test_a_new_cache_is_empty() -> None:
    assert TidarCache().get_seq_length() == 0
    assert TidarCache().lengths == [0]
