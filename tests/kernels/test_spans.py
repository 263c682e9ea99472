"""Contexts of several spans: the paths of a CPU against the reference, and the reference against its definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import paged_attention_cpu
from kernels.backend import select
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.paged_attention_cpu import GatheredRows, GatherPlan, gather_plan
from kernels.self_attention import kv_store, rotary_angles, rotate_reference
from kernels.spans import Offsets, Spans
from tests.span_steps import Row, Span, Step, candidate_rows, span_rows, step_of
from tests.stand_in_device import DeviceTensor, on_host, stand_in_device

PREFIX, A, B, C = Span(0, 5, "prefix"), Span(5, 7, "a"), Span(5, 4, "b"), Span(5, 8, "c")
OWN = Span(13, 3)


@pytest.fixture(params=["loop", "gathered", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    torch.manual_seed(8)
    if request.param == "gathered":
        monkeypatch.setattr(paged_attention_cpu, "use_compiled", lambda *_: False)
    if request.param == "torch":
        select("reference")
    yield request.param
    select("auto")


def test_a_key_is_read_if_it_is_valid_and_not_ahead() -> None:
    torch.manual_seed(1)
    kv_cache = torch.randn(9, 2, 1, 4, 16)
    kv_cache[5, :, :, 3:] = float("nan")  # after the 3 valid tokens of the span in block 5
    table = torch.tensor([[7, 5, 2, 8, 0]])
    # a prefix of 2 tokens, two shots of 3 and 5 tokens from position 2 on, two queries at positions 7 and 8
    spans = Spans(torch.tensor([7, 8]), torch.tensor([[0, 2, 2, 6, 7]]), torch.tensor([[2, 3, 4, 1, 4]]))
    read = [(7, 0), (7, 1), (5, 0), (5, 1), (5, 2), (2, 0), (2, 1), (2, 2), (2, 3), (8, 0), (0, 0), (0, 1)]
    distances = torch.tensor([-8.0, -7, -6, -5, -4, -6, -5, -4, -3, -2, -1, 0])
    query = torch.randn(2, 1, 16)
    out = paged_attention_reference(
        query, kv_cache, table, torch.tensor([0, 2]), torch.tensor([18]), scale=0.3, alibi_slopes=torch.tensor([0.5]),
        spans=spans,
    )  # fmt: skip
    keys, values = (torch.stack([kv_cache[block, kind, 0, at] for block, at in read]) for kind in (0, 1))
    for row, count in ((0, 11), (1, 12)):
        scores = (keys[:count] @ query[row, 0]) * 0.3 + 0.5 * (distances[:count] + 1 - row)
        torch.testing.assert_close(out[row, 0], scores.softmax(0) @ values[:count])


def test_a_key_with_an_offset_is_read_as_if_it_were_rotated_to_its_place_in_the_row() -> None:
    torch.manual_seed(1)
    # a prefix of 5 tokens, shots of 7 and of 8 tokens, and two queries
    step = step_of([Row((PREFIX, A, C, Span(13, 2)), 2).in_a_row()], kv_heads=1, rotary_dim=12)
    assert step.spans.positions.tolist() == [20, 21]
    raw, query, value = torch.randn(22, 1, 16), torch.randn(2, 4, 16), torch.randn(22, 1, 16)
    stored = rotate_reference(raw, *rotary_angles(torch.tensor([*range(12), *range(5, 13), 20, 21]), 12, 1e4))
    table = step.block_table[0, :7].tolist()
    slots = [block * 4 + at for block, n in zip(table, (4, 1, 4, 3, 4, 4, 2), strict=True) for at in range(n)]
    kv_store(stored, value, step.kv_cache, torch.tensor(slots))
    got = paged_attention_reference(query, *step.inputs[1:], scale=0.3, spans=step.spans)
    key = rotate_reference(raw, *rotary_angles(torch.arange(22), 12, 1e4))
    for row, count in ((0, 21), (1, 22)):
        scores = query[row] @ key[:count, 0].T * 0.3
        torch.testing.assert_close(got[row], scores.softmax(-1) @ value[:count, 0])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(span_rows(), st.sampled_from(["alibi", "rotary", "offsets"]), st.integers(1, 3), st.booleans())
def test_any_spans(path: str, rows: list[Row], position: str, group: int, decodes: bool) -> None:
    rows = [replace(row, num_queries=min(row.num_queries, 1)) if decodes else row for row in rows]
    step = step_of(rows, heads=2 * group, rotary_dim=12 if position == "offsets" else 0)
    slopes = torch.rand(2 * group) if position == "alibi" else None
    got = paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    expected = paged_attention_reference(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    torch.testing.assert_close(got, expected)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(candidate_rows(), st.sampled_from(["alibi", "rotary", "offsets"]), st.integers(1, 3))
def test_any_candidates(path: str, rows: list[Row], position: str, group: int) -> None:
    step = step_of(rows, heads=2 * group, rotary_dim=12 if position == "offsets" else 0)
    slopes = torch.rand(2 * group) if position == "alibi" else None
    got = paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    expected = paged_attention_reference(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    torch.testing.assert_close(got, expected)


CANDIDATES = [Row((PREFIX, A, B, C, Span(13, count)), count) for count in (2, 1, 3)]
ALIKE = Row((Span(0, 9, "the same"),), 1)
PLAIN = {
    "one decoding": [ALIKE],
    "decoding with shared blocks": [ALIKE, ALIKE, Row((Span(0, 12),), 1)],
    "a prompt": [Row((Span(0, 9),), 9)],
    "a piece and one decoding": [Row((Span(0, 9),), 3), ALIKE],
}
SPANS = {
    "candidates": CANDIDATES,
    "decoding after spans": [Row((PREFIX, A, C, OWN), 1), Row((PREFIX, B, C, OWN), 1)],
    "decoding after spans in a row": [Row((PREFIX, A, C, OWN), 1).in_a_row(), Row((PREFIX, A, C, OWN), 1)],
    "a query after spans in a row": [Row((PREFIX, A, C, OWN), 3).in_a_row()],
}


def on_device(spans: Spans) -> Spans:
    offsets = spans.offsets and Offsets(
        *map(DeviceTensor, (spans.offsets.blocks, spans.offsets.cos, spans.offsets.sin))
    )
    positions, *tables = map(DeviceTensor, (spans.positions, *spans.block_tables[:2]))
    return Spans(positions, tables[0], tables[1], offsets)


@pytest.mark.parametrize("path", ["torch"], indirect=True)
@pytest.mark.parametrize("position", ["alibi", "rotary", "offsets"])
@pytest.mark.parametrize("rows", [*PLAIN.values(), *SPANS.values()], ids=[*PLAIN, *SPANS])
def test_torch_computes_on_the_device_of_its_inputs(path: str, rows: list[Row], position: str) -> None:
    """Setting kernels to reference selects torch on a GPU."""
    step = step_of(rows, rotary_dim=12 if position == "offsets" else 0)
    slopes = torch.rand(4) if position == "alibi" else None
    spans = None if rows in PLAIN.values() else step.spans
    expected = paged_attention_reference(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=spans)
    with stand_in_device():
        inputs, slopes = map(DeviceTensor, step.inputs), None if slopes is None else DeviceTensor(slopes)
        spans = None if spans is None else on_device(spans)
        got = paged_attention(*inputs, scale=0.3, alibi_slopes=slopes, spans=spans)
    assert isinstance(got, DeviceTensor)
    torch.testing.assert_close(on_host(got), expected)


@pytest.mark.parametrize("path", ["loop"], indirect=True)
def test_rows_of_few_tokens_and_little_to_read_are_all_served_by_the_loop(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def served(most: int) -> tuple[int, int, int]:
        monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_PRODUCTS", most)
        plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans)
        assert_equals_reference(step, plan)
        num_gathered = 0 if plan.gathered is None else len(plan.gathered.rows)
        return 0 if plan.loop is None else len(plan.loop.rows), num_gathered, len(plan.pieces)

    step = step_of([replace(row, spans=(Span(0, 30),)) for row in CANDIDATES])
    assert served(max(4 * 16 * sum(range(31 - row.num_queries, 31)) for row in CANDIDATES)) == (6, 0, 0)
    assert served(0) == (1, 0, 2), "a decoding row"


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(1, 30), st.integers(0, 5)), min_size=1, max_size=4), st.booleans())
def test_plain_rows_give_the_same_with_tables_and_without(path: str, drawn: list[tuple[int, int]], alibi: bool) -> None:
    step = step_of([Row((Span(0, length),), min(length, count)) for length, count in drawn])
    slopes = torch.rand(4) if alibi else None
    got = paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    expected = paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes)
    if path == "loop" and all(count == 1 for _, count in drawn):
        assert torch.equal(got, expected)
    torch.testing.assert_close(got, expected)


def the_product(step: Step) -> GatheredRows:
    """Return the product that serves all rows of a step."""
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans)
    assert plan.loop is None
    assert not plan.pieces
    product = plan.gathered
    assert product is not None
    return product


def assert_equals_reference(step: Step, plan: GatherPlan) -> None:
    got = paged_attention(*step.inputs, scale=0.3, spans=step.spans, plan=plan)
    torch.testing.assert_close(got, paged_attention_reference(*step.inputs, scale=0.3, spans=step.spans))


@pytest.mark.parametrize("path", ["gathered"], indirect=True)
def test_blocks_in_the_same_place_are_read_once(path: str) -> None:
    step = step_of([Row((PREFIX, A, C, OWN), 1), Row((PREFIX, B, C, OWN), 1), Row((PREFIX, A, C, OWN), 1)])
    # the prefix's two blocks; a has two blocks and b one, so that only the last two rows of c are in one place
    assert len(the_product(step).shared) == 2
    step = step_of([Row((PREFIX, A, C, OWN), 1), Row((PREFIX, Span(5, 8, "d"), C, OWN), 1)])
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans)
    assert plan.gathered is not None
    assert len(plan.gathered.shared) == 4
    assert_equals_reference(step, plan)


@pytest.mark.parametrize("path", ["gathered"], indirect=True)
@pytest.mark.parametrize("table", ["positions", "lengths", "offsets"])
def test_blocks_of_other_positions_lengths_or_offsets_are_not_shared(table: str, path: str) -> None:
    step = step_of([Row((PREFIX, A, OWN), 1), Row((PREFIX, A, OWN), 1)], rotary_dim=16)
    spans, offsets = step.spans, step.spans.offsets
    assert offsets is not None
    tables = {"positions": spans.block_positions, "lengths": spans.block_lengths, "offsets": offsets.blocks}
    tables[table][1, 0] -= 1
    assert the_product(step).shared.tolist() == step.block_table[0, 1:4].tolist()


@pytest.mark.parametrize("path", ["gathered"], indirect=True)
def test_rows_with_common_offsets_share_rotated_blocks(path: str) -> None:
    rows = [Row((PREFIX, C, A, OWN), 1).in_a_row(), Row((PREFIX, C, A, B, OWN), 1).in_a_row()]
    step = step_of(rows, rotary_dim=16)
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans)
    product = plan.gathered
    assert product is not None
    assert product.shared_rotation is not None
    assert product.shared_rotation.blocks.tolist() == [4, 5]  # after two blocks of the prefix and two of c
    assert_equals_reference(step, plan)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(span_rows(max_queries=1))
def test_offsets_of_0_change_no_bit(path: str, rows: list[Row]) -> None:
    """They change none in a step in which another row has offsets."""
    step = step_of([*rows, Row((PREFIX, A, B, OWN), 1).in_a_row()], rotary_dim=16)
    assert step.spans.offsets is not None
    rows_without = [row for row in range(len(rows)) if not step.spans.offsets.blocks[row].any()]
    plain = [at for row in rows_without for at in range(*step.query_starts[row : row + 2].tolist())]
    with_offsets = paged_attention(*step.inputs, scale=0.3, spans=step.spans)
    without = paged_attention(*step.inputs, scale=0.3, spans=replace(step.spans, offsets=None))
    assert torch.equal(with_offsets[plain], without[plain])
    assert not torch.equal(with_offsets, without)


NEIGHBOURS = {
    "all": Row((PREFIX, A, C, OWN), 1),
    "some": Row((PREFIX, A, B, OWN), 1),
    "none": Row((Span(0, 31),), 1),
    "other": Row((Span(0, 3, "other"), Span(3, 9, "far"), Span(12, 2)), 1),
    "all in a row": Row((PREFIX, C, A, OWN), 1).in_a_row(),
    "several queries": Row((PREFIX, A, C, OWN), 3),
    "several queries in a row": Row((PREFIX, C, A, OWN), 2).in_a_row(),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("position", ["rotary", "alibi", "offsets"])
def test_a_decoding_row_is_the_same_next_to_any_neighbours(position: str, dtype: torch.dtype) -> None:
    """In the compiled loop, bit for bit."""
    torch.manual_seed(3)
    slopes = torch.rand(4) if position == "alibi" else None
    rotary_dim = 16 if position == "offsets" else 0
    together = step_of([Row((PREFIX, A, C, OWN), 1), *NEIGHBOURS.values()], dtype=dtype, rotary_dim=rotary_dim)

    def run(step: Step) -> torch.Tensor:
        plan = gather_plan(*step.inputs[1:], num_heads=4, alibi_slopes=slopes, spans=step.spans)
        assert plan.only_loop(len(step.query)) is not None
        return paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans, plan=plan)

    out, starts = run(together), together.query_starts.tolist()
    for row, (first, end) in enumerate(pairwise(starts)):
        assert torch.equal(run(together.row(row)), out[first:end])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rotary_dim", [0, 16], ids=["in place", "offsets"])
def test_one_call_rotates_stores_and_attends(rotary_dim: int, dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    rows = [Row((PREFIX, A, B, OWN), 3), Row((Span(0, 9),), 2), Row((Span(0, 2, "p"), Span(2, 1)), 1)]
    rows = [row.in_a_row() if rotary_dim else row for row in rows]
    step = step_of(rows, dtype=dtype, rotary_dim=rotary_dim)
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans).only_loop(6)
    assert plan is not None
    qkv = torch.randn(6, 8 * 16).to(dtype)
    cos, sin = (a.to(dtype) for a in rotary_angles(step.spans.positions, 16, 1e4))
    expected_cache, got_cache = step.kv_cache.clone(), step.kv_cache.clone()
    expected = decode_attention_reference(qkv.clone(), cos, sin, expected_cache, plan, 0.3)
    got = decode_attention(qkv.clone(), cos, sin, got_cache, plan, 0.3)
    torch.testing.assert_close(got, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    torch.testing.assert_close(got_cache, expected_cache, equal_nan=True, atol=0, rtol=0)
    assert not torch.equal(got_cache.nan_to_num(), step.kv_cache.nan_to_num())
