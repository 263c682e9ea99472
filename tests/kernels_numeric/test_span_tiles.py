"""Tiles over parts of block tables: any spans against the reference, and rows that do not depend on their neighbours."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kernels import paged_plan as module
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.paged_plan import TilePlan, TileShape, fill_plan, first_rows_of, plan_tiles, static_plan
from kernels.spans import Spans
from tests.span_steps import Row, Span, Step, span_rows, step_of

Check = Callable[..., None]
SHAPE = TileShape(4, 2, 16, torch.float32)
PREFIX, A, B, C = Span(0, 21, "prefix"), Span(21, 7, "a"), Span(21, 6, "b"), Span(21, 9, "c")
LAST = Span(30, 3)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "SPLIT", 16)


def planned(step: Step) -> TilePlan:
    _, _, *tables = step.inputs
    return plan_tiles(*tables, num_tokens=len(step.query), shape=SHAPE, spans=step.spans)


def attend(step: Step, slopes: Tensor | None = None, plan: TilePlan | None = None) -> Tensor:
    return paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans, plan=plan)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(span_rows(max_rows=4), st.sampled_from(["alibi", "rotary", "offsets"]), st.integers(1, 3))
def test_any_spans(close: Check, rows: list[Row], position: str, group: int) -> None:
    step = step_of(rows, heads=2 * group, rotary_dim=12 if position == "offsets" else 0)
    slopes = torch.rand(2 * group) if position == "alibi" else None
    expected = paged_attention_reference(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    close("out", attend(step, slopes), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("rotary_dim", [0, 24, 40])
def test_half_precision(rotary_dim: int, dtype: torch.dtype, close: Check) -> None:
    rows = [Row((PREFIX, A, C, B, LAST), 1), Row((PREFIX, B, A, C, Span(28, 30)), 19), Row((Span(0, 50),), 1)]
    rows = [row.in_a_row() if rotary_dim else row for row in rows]
    step = step_of(rows, dtype=dtype, head_dim=40, rotary_dim=rotary_dim)
    exact = replace(step, query=step.query.float(), kv_cache=step.kv_cache.float())
    expected = paged_attention_reference(*exact.inputs, scale=0.3, spans=step.spans)
    close("out", attend(step), expected)


@pytest.mark.parametrize("block_size", [1, 16, 32])
def test_blocks_shorter_than_a_part_as_long_and_longer(block_size: int, close: Check) -> None:
    rows = [Row((PREFIX, A, C, LAST), 1), Row((PREFIX, B, A, Span(28, 30)), 19), Row((PREFIX, A, B, LAST), 2)]
    step = step_of([*rows, rows[0].in_a_row(), rows[1].in_a_row()], block_size=block_size, rotary_dim=16)
    expected = paged_attention_reference(*step.inputs, scale=0.3, spans=step.spans)
    close("out", attend(step), expected)


NEIGHBOURS = [
    Row((PREFIX, A, C, LAST), 1),
    Row((PREFIX, A, B, Span(28, 5)), 1),
    Row((PREFIX, C, A, LAST), 2),
    Row((Span(0, 43),), 1),
    Row((Span(0, 3, "other"), Span(3, 9, "far"), Span(12, 2)), 1),
    Row((PREFIX, B, Span(27, 40)), 30),
    Row((Span(0, 21, "prefix"), Span(21, 25)), 12),
    Row((PREFIX, C, A, LAST), 1).in_a_row(),
    Row((PREFIX, A, C, B, Span(28, 20)), 20).in_a_row(),
]


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.parametrize("position", ["rotary", "alibi", "offsets"])
def test_a_row_is_the_same_next_to_any_neighbours(position: str) -> None:
    """Neighbours have all of its spans, some, or none, decode or prefill, and come in any order."""
    slopes = torch.rand(4) if position == "alibi" else None
    rotary_dim = 16 if position == "offsets" else 0
    step = step_of([Row((PREFIX, A, C, LAST), 1), *NEIGHBOURS], rotary_dim=rotary_dim)
    plan = planned(step)
    assert plan.few is not None
    assert plan.many is not None
    assert int(plan.few.records[:, 1].max()) == 6  # the prefix's first part, for all rows of few tokens that have it
    together = attend(step, slopes)
    assert together.isfinite().all()
    for index in range(len(step.context_lengths)):
        first, end = step.query_starts[index : index + 2].tolist()
        assert torch.equal(attend(step.row(index), slopes), together[first:end])


@pytest.mark.usefixtures("ordered_products")
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy, for the other row
def test_a_neighbour_of_nan_in_the_same_tile_changes_nothing() -> None:
    step = step_of([Row((PREFIX, A, LAST), 1), Row((PREFIX, A, LAST), 1)])
    alone = attend(step.row(0))
    step.query[1] = float("nan")
    together = attend(step)
    assert torch.equal(together[0], alone[0])
    assert together[1].isnan().all()


def test_rows_with_equal_parts_are_one_tile() -> None:
    rows = [Row((PREFIX, A, C, LAST), 1), Row((PREFIX, A, B, LAST), 1), Row((PREFIX, B, C, LAST), 1)]
    step = step_of([*rows, Row((Span(0, 40),), 20)])
    plan = planned(step)
    assert plan.few is not None
    assert plan.many is not None
    assert len(plan.many.records) == 3  # 8 rows each, with two heads
    tiles = [
        (part, plan.few.members[first : first + count, 0].tolist(), end)
        for first, count, _, part, end in plan.few.records.tolist()
    ]
    # part 0: 16 of the prefix; part 1: the rest of it and the shot after it, which two rows share; part 2: the last
    assert sorted(tiles) == [
        (0, [0, 1, 2], 16),
        (1, [0, 1], 32),
        (1, [2], 32),
        (2, [0], 47),
        (2, [1], 43),
        (2, [2], 47),
    ]
    assert plan.few.rows.tolist() == [[0, 3], [1, 3], [2, 3]]


def test_blocks_that_are_equal_at_other_positions_are_not_one_tile() -> None:
    step = step_of([Row((PREFIX, LAST), 1), Row((PREFIX, LAST), 1)], rotary_dim=16)
    plan = planned(step)
    assert plan.few is not None
    shared = len(plan.few.records)
    step.spans.block_positions[1] += 1
    plan = planned(step)
    assert plan.few is not None
    assert len(plan.few.records) > shared
    step.spans.block_positions[1] -= 1
    step.spans.block_lengths[1, 0] -= 1
    plan = planned(step)
    assert plan.few is not None
    assert len(plan.few.records) == shared + 1
    step.spans.block_lengths[1, 0] += 1
    assert step.spans.offsets is not None
    step.spans.offsets.blocks[1, 0] += 1
    plan = planned(step)
    assert plan.few is not None
    assert len(plan.few.records) == shared + 1


def test_a_shot_that_is_read_twice_is_in_two_parts(close: Check) -> None:
    shot = Span(0, 16, "shot")
    step = step_of([Row((shot, shot, Span(16, 3)), 1)])
    plan = planned(step)
    assert plan.few is not None
    assert sorted(plan.few.records[:, 3].tolist()) == [0, 1, 2]
    close("out", attend(step), paged_attention_reference(*step.inputs, scale=0.3, spans=step.spans))


def test_parts_of_equal_hash_that_differ_are_not_one_tile(monkeypatch: pytest.MonkeyPatch, close: Check) -> None:
    monkeypatch.setattr(module, "FACTORS", np.zeros(64, np.uint64))
    step = step_of([Row((PREFIX, A, LAST), 1), Row((PREFIX, B, LAST), 1)])
    plan = planned(step)
    assert plan.few is not None
    assert plan.few.records[:, 1].tolist() == [1] * 6
    close("out", attend(step), paged_attention_reference(*step.inputs, scale=0.3, spans=step.spans))


def test_a_recorded_step_reads_the_plan_of_each_step(close: Check) -> None:
    """One set of buffers serves steps of other sizes, one after the other; their padding gives zeros."""
    largest = static_plan(8, 16, SHAPE)
    static = first_rows_of(largest, 4)
    for rows in (
        [Row((PREFIX, A, C, LAST), 1), Row((PREFIX, A, B, LAST), 1), Row((Span(0, 60),), 1), Row((Span(0, 4),), 1)],
        [Row((PREFIX, A, C, LAST), 1), Row((PREFIX, A, B, LAST), 1).in_a_row()],
        [Row((Span(0, 33),), 1), Row((Span(0, 2),), 1), Row((PREFIX, LAST), 1)],
    ):
        step, count = step_of(rows, rotary_dim=16), len(rows)
        plan = planned(step)
        fill_plan(static, plan)
        assert static.few is not None
        assert plan.few is not None
        assert static.few.records[:, 1].sum() == plan.few.records[:, 1].sum()  # no tile of an earlier step is left
        width = 16 - step.block_table.shape[1]
        pad = torch.nn.functional.pad
        positions, lengths, offsets = (pad(table, (0, width, 0, 4 - count)) for table in step.spans.block_tables)
        assert step.spans.offsets is not None
        spans = Spans(step.spans.positions, positions, lengths, replace(step.spans.offsets, blocks=offsets))
        query = torch.cat([step.query, torch.randn(4 - count, 4, 16)])
        padded = replace(step, query=query, block_table=pad(step.block_table, (0, width, 0, 4 - count)), spans=spans)
        out = attend(padded, plan=static.over(padded.block_table, 4, spans))
        expected = paged_attention_reference(*step.inputs, scale=0.3, spans=step.spans)
        close("out", out[:count], expected)
        assert not out[count:].any()


def test_the_plan_has_each_row_s_position_and_its_padding() -> None:
    table = torch.zeros(2, 3, dtype=torch.int32)
    plan = plan_tiles(table, torch.tensor([0, 2, 3]), torch.tensor([5, 9]), num_tokens=5, shape=SHAPE)
    assert plan.few is not None
    assert plan.many is None
    assert plan.few.members.tolist() == [[0, 0, 3], [1, 1, 4], [2, 2, 8]]
    assert plan.few.records.tolist() == [[0, 2, 0, 0, 5], [2, 1, 1, 0, 9]]
    assert plan.few.rows.tolist() == [[0, 1], [1, 1], [2, 1], [3, 0], [4, 0]]


def test_a_row_is_in_no_tile_of_a_part_that_begins_after_it() -> None:
    table = torch.zeros(1, 5, dtype=torch.int32)
    plan = plan_tiles(table, torch.tensor([0, 2]), torch.tensor([17]), num_tokens=2, shape=SHAPE)
    assert plan.few is not None
    assert plan.few.members.tolist() == [[0, 0, 15], [1, 1, 16], [1, 1, 16]]
    assert plan.few.rows.tolist() == [[0, 1], [1, 2]]
