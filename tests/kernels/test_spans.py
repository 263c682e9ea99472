"""Contexts of several spans: the paths that serve them against the reference, and the reference against its definition."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.spans import Spans

BLOCK_SIZE, HEAD_DIM = 4, 16


def test_a_key_is_read_if_it_is_valid_and_not_ahead() -> None:
    torch.manual_seed(1)
    kv_cache = torch.randn(9, 2, 1, BLOCK_SIZE, HEAD_DIM)
    kv_cache[5, :, :, 3:] = float("nan")  # after the 3 valid tokens of the span in block 5
    table = torch.tensor([[7, 5, 2, 8, 0]])
    # a prefix of 2 tokens, two shots of 3 and 5 tokens from position 2 on, two queries at positions 7 and 8
    spans = Spans(torch.tensor([7, 8]), torch.tensor([[0, 2, 2, 6, 7]]), torch.tensor([[2, 3, 4, 1, 4]]))
    read = [(7, 0), (7, 1), (5, 0), (5, 1), (5, 2), (2, 0), (2, 1), (2, 2), (2, 3), (8, 0), (0, 0), (0, 1)]
    distances = torch.tensor([-8.0, -7, -6, -5, -4, -6, -5, -4, -3, -2, -1, 0])
    query = torch.randn(2, 1, HEAD_DIM)
    out = paged_attention_reference(
        query, kv_cache, table, torch.tensor([0, 2]), torch.tensor([18]), scale=0.3, alibi_slopes=torch.tensor([0.5]),
        spans=spans,
    )  # fmt: skip
    keys, values = (torch.stack([kv_cache[block, kind, 0, at] for block, at in read]) for kind in (0, 1))
    for row, count in ((0, 11), (1, 12)):
        scores = (keys[:count] @ query[row, 0]) * 0.3 + 0.5 * (distances[:count] + 1 - row)
        torch.testing.assert_close(out[row, 0], scores.softmax(0) @ values[:count])


@st.composite
def contexts(draw: st.DrawFn) -> tuple[list[list[tuple[int, int]]], list[int]]:
    """Draw for each row its spans (first position, tokens), the last of which is its own, and its number of queries."""
    rows, queries = [], []
    for _ in range(draw(st.integers(1, 4))):
        if draw(st.booleans()):
            row = [(0, draw(st.integers(1, 11)))]
        else:
            start = draw(st.integers(0, 6))
            row = [(0, start)] if start else []
            row += [(start, draw(st.integers(1, 9))) for _ in range(draw(st.integers(0, 3)))]
            row.append((max([first + count for first, count in row], default=0), draw(st.integers(1, 9))))
        rows.append(row)
        queries.append(draw(st.integers(0, row[-1][1])))
    return rows, queries


def step_of(
    rows: list[list[tuple[int, int]]], queries: list[int], *, num_kv_heads: int = 2
) -> tuple[Tensor, Tensor, Tensor, Tensor, Spans]:
    """Build the cache, in which all that is not a valid key is NaN, and the tables of a step."""
    width = 1 + max(sum(-(-count // BLOCK_SIZE) for _, count in row) for row in rows)
    table = torch.randperm(len(rows) * width).view(len(rows), width).int()
    block_positions, block_lengths = torch.zeros(2, len(rows), width, dtype=torch.int32)
    kv_cache = torch.full((len(rows) * width, 2, num_kv_heads, BLOCK_SIZE, HEAD_DIM), float("nan"))
    positions, slots = [], []
    for i, (row, num_queries) in enumerate(zip(rows, queries, strict=True)):
        at = 0
        for first, count in row:
            for done in range(0, count, BLOCK_SIZE):
                valid = min(count - done, BLOCK_SIZE)
                block_positions[i, at], block_lengths[i, at] = first + done, valid
                kv_cache[table[i, at], :, :, :valid] = torch.randn(2, num_kv_heads, valid, HEAD_DIM)
                at += 1
        slots.append((at - 1) * BLOCK_SIZE + valid)
        positions += range(row[-1][0] + row[-1][1] - num_queries, row[-1][0] + row[-1][1])
    spans = Spans(torch.tensor(positions, dtype=torch.int64), block_positions, block_lengths)
    starts = torch.tensor([0, *queries]).cumsum(0).int()
    return kv_cache, table, starts, torch.tensor(slots).int(), spans


@given(contexts(), st.booleans(), st.integers(1, 3))
@settings(max_examples=60, deadline=None)
def test_any_spans(drawn: tuple[list[list[tuple[int, int]]], list[int]], alibi: bool, group: int) -> None:
    kv_cache, table, starts, slots, spans = step_of(*drawn)
    query, slopes = torch.randn(int(starts[-1]), 2 * group, HEAD_DIM), torch.rand(2 * group) if alibi else None
    inputs = (query, kv_cache, table, starts, slots)
    got = paged_attention(*inputs, scale=0.3, alibi_slopes=slopes, spans=spans)
    expected = paged_attention_reference(*inputs, scale=0.3, alibi_slopes=slopes, spans=spans)
    torch.testing.assert_close(got, expected)
