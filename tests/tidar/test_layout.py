"""The layouts, stated as the tables that their docstrings draw."""

from __future__ import annotations

import torch
from torch import Tensor

from zconvert.tidar.layout import NO_PREDECESSOR, PADDING, Layout, decode_layout, packed_layout, with_committed
from zconvert.tidar.masks import Reach, visible


def documents(*lengths: int, padding: int = 0) -> Tensor:
    runs = [torch.full((length,), i) for i, length in enumerate(lengths)]
    return torch.cat([*runs, torch.full((padding,), PADDING)])[None]


def drawn(query: Layout, key: Layout | None = None, window: int | None = None) -> str:
    """The mask as the docstrings draw it."""
    seen = visible(query, query if key is None else key, Reach(window=window))[0]
    return "\n".join("".join("1" if hit else "." for hit in row) for row in seen.tolist())


def picture(text: str) -> str:
    return "\n".join(line.replace(" ", "").replace("|", "") for line in text.strip().splitlines())


def test_a_packed_row_is_the_table_of_its_docstring() -> None:
    assert drawn(packed_layout(documents(4), 2)) == picture("""
        1 . . . | . . . .
        1 1 . . | . . . .
        1 1 1 . | . . . .
        1 1 1 1 | . . . .
        . . . . | 1 1 . .
        . . . . | 1 1 . .
        1 1 . . | . . 1 1
        1 1 . . | . . 1 1
    """)


def test_a_packed_row_restarts_positions_and_names_predecessors() -> None:
    row = packed_layout(documents(4), 2)
    assert row.num_tokens == 8
    assert row.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 3]]
    assert row.is_masked.tolist() == [[False] * 4 + [True] * 4]
    #                                     x0  x1 x2 x3  m0  m1 m2 m3
    assert row.predecessors.tolist() == [[-1, 0, 1, 2, -1, 4, 1, 6]]


def test_documents_are_apart_and_start_their_own_blocks() -> None:
    row = packed_layout(documents(3, 2), 2)
    assert drawn(row) == picture("""
        1 . . . . | . . . . .
        1 1 . . . | . . . . .
        1 1 1 . . | . . . . .
        . . . 1 . | . . . . .
        . . . 1 1 | . . . . .
        . . . . . | 1 1 . . .
        . . . . . | 1 1 . . .
        1 1 . . . | . . 1 . .
        . . . . . | . . . 1 1
        . . . . . | . . . 1 1
    """)
    assert row.position_ids.tolist() == [[0, 1, 2, 0, 1] * 2]
    assert row.predecessors.tolist() == [[-1, 0, 1, -1, 3, -1, 5, 1, -1, 8]]


def test_an_offset_shortens_the_first_block() -> None:
    row = packed_layout(documents(5), 3, offset=1)
    assert drawn(row)[-54:] == picture("""
        . . . . . | 1 1 . . .
        . . . . . | 1 1 . . .
        1 1 . . . | . . 1 1 1
        1 1 . . . | . . 1 1 1
        1 1 . . . | . . 1 1 1
    """)
    assert row.predecessors[0, 5:].tolist() == [NO_PREDECESSOR, 5, 1, 7, 8]


def test_every_document_may_have_its_own_offset() -> None:
    one = packed_layout(documents(4, 4), 2, torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1]]))
    limits = one.clean_limit[0, 8:].tolist()
    assert limits == [0, 0, 2, 2, 0, 1, 1, 3]


def test_rows_do_not_mix() -> None:
    ids = torch.cat([documents(4), documents(1, 3)])
    both = packed_layout(ids, 2)
    for i in range(2):
        alone = packed_layout(ids[i : i + 1], 2)
        for field in ("position_ids", "clean_limit", "block_ids", "document_ids", "predecessors"):
            assert torch.equal(getattr(both, field)[i : i + 1], getattr(alone, field))


def test_padding_is_a_document_of_its_own() -> None:
    padded = packed_layout(documents(3, padding=2), 2)
    seen = visible(padded, padded)[0]
    text, padding = [0, 1, 2, 5, 6, 7], [3, 4, 8, 9]
    assert not seen[text][:, padding].any()
    assert not seen[padding][:, text].any()
    assert seen.any(dim=1).all(), "a row of the mask that hides everything would give numbers that are none"


def test_a_block_size_of_one_makes_every_slot_follow_its_clean_predecessor() -> None:
    row = packed_layout(documents(3), 1)
    assert row.predecessors[0, 3:].tolist() == [-1, 0, 1]
    assert row.clean_limit[0, 3:].tolist() == [0, 1, 2]
    assert row.block_ids[0, 3:].tolist() == [0, 1, 2]


def test_a_decoding_step_is_the_table_of_its_docstring() -> None:
    step = decode_layout(10, 3, (1, 3), 2)
    assert drawn(step) == picture(
        """
        1 . . | . . | . .
        1 1 . | . . | . .
        1 1 1 | . . | . .
        1 . . | 1 1 | . .
        1 . . | 1 1 | . .
        1 1 1 | . . | 1 1
        1 1 1 | . . | 1 1
        """
    )
    assert step.position_ids.tolist() == [[10, 11, 12, 11, 12, 13, 14]]
    #                                      c0 c1 c2 a0 a1 b0 b1
    assert step.predecessors.tolist() == [[-1, 0, 1, 0, 3, 2, 5]]


def test_a_decoding_step_sees_all_that_is_committed() -> None:
    step = decode_layout(2, 2, (1,), 2)
    keys = with_committed(step, 2)
    assert keys.position_ids.tolist() == [[0, 1, 2, 3, 3, 4]]
    assert drawn(step, keys) == picture("""
        1 1 | 1 . . .
        1 1 | 1 1 . .
        1 1 | 1 . 1 1
        1 1 | 1 . 1 1
    """)


def test_a_decoding_step_without_proposals_is_plain_causal() -> None:
    step = decode_layout(5, 3, (), 4)
    assert step.num_tokens == 3
    assert not step.is_masked.any()
    assert drawn(step) == picture("1..\n11.\n111")


def test_layouts_are_int64_on_the_device_asked_for() -> None:
    for layout in (packed_layout(documents(4), 2), decode_layout(1, 1, (1,), 2, torch.device("cpu"))):
        for field in (layout.position_ids, layout.clean_limit, layout.block_ids, layout.predecessors):
            assert (field.dtype, field.device.type, field.dim()) == (torch.int64, "cpu", 2)
