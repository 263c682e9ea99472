"""Contexts of several spans: the paths of a CPU against the reference, and the reference against its definition."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kernels import paged_attention_cpu
from kernels.backend import select
from kernels.decode_attention import decode_attention, decode_attention_reference
from kernels.paged_attention import paged_attention, paged_attention_reference
from kernels.paged_attention_cpu import DecodePlan, gather_plan
from kernels.paged_attention_loop import DecodeRows
from kernels.self_attention import rotary_angles
from kernels.spans import Spans
from tests.span_steps import Row, Span, Step, span_rows, step_of

PREFIX, A, B, C = Span(0, 5, "prefix"), Span(5, 7, "a"), Span(5, 4, "b"), Span(5, 8, "c")
OWN = Span(13, 3)


@pytest.fixture(params=["loop", "gathered", "torch"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    torch.manual_seed(8)
    if request.param == "gathered":
        monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_SCORES", 0)
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


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(span_rows(), st.booleans(), st.integers(1, 3), st.booleans())
def test_any_spans(path: str, rows: list[Row], alibi: bool, group: int, decodes: bool) -> None:
    rows = [replace(row, num_queries=min(row.num_queries, 1)) if decodes else row for row in rows]
    step, slopes = step_of(rows, heads=2 * group), torch.rand(2 * group) if alibi else None
    got = paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    expected = paged_attention_reference(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans)
    torch.testing.assert_close(got, expected)


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


@pytest.mark.parametrize("path", ["gathered"], indirect=True)
def test_blocks_in_the_same_place_are_read_once(path: str) -> None:
    step = step_of([Row((PREFIX, A, C, OWN), 1), Row((PREFIX, B, C, OWN), 1), Row((PREFIX, A, C, OWN), 1)])
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans)
    assert isinstance(plan.decode, DecodePlan)
    # the prefix's two blocks; a has two blocks and b one, so that only the last two rows of c are in one place
    assert len(plan.decode.shared) == 2
    step = step_of([Row((PREFIX, A, C, OWN), 1), Row((PREFIX, Span(5, 8, "d"), C, OWN), 1)])
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans)
    assert isinstance(plan.decode, DecodePlan)
    assert len(plan.decode.shared) == 4
    got = paged_attention(*step.inputs, scale=0.3, spans=step.spans, plan=plan)
    torch.testing.assert_close(got, paged_attention_reference(*step.inputs, scale=0.3, spans=step.spans))


@pytest.mark.parametrize("table", ["block_positions", "block_lengths"])
def test_blocks_of_other_positions_or_lengths_are_not_shared(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paged_attention_cpu, "MAX_LOOP_SCORES", 0)
    step = step_of([Row((PREFIX, A, OWN), 1), Row((PREFIX, A, OWN), 1)])
    getattr(step.spans, table)[1, 0] -= 1
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans)
    assert isinstance(plan.decode, DecodePlan)
    assert plan.decode.shared.tolist() == step.block_table[0, 1:4].tolist()


NEIGHBOURS = {
    "all": Row((PREFIX, A, C, OWN), 1),
    "some": Row((PREFIX, A, B, OWN), 1),
    "none": Row((Span(0, 31),), 1),
    "other": Row((Span(0, 3, "other"), Span(3, 9, "far"), Span(12, 2)), 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alibi", [False, True], ids=["rotary", "alibi"])
def test_a_decoding_row_is_the_same_next_to_any_neighbours(alibi: bool, dtype: torch.dtype) -> None:
    """In the compiled loop, bit for bit."""
    torch.manual_seed(3)
    slopes = torch.rand(4) if alibi else None
    together = step_of([Row((PREFIX, A, C, OWN), 1), *NEIGHBOURS.values()], dtype=dtype)

    def run(step: Step) -> torch.Tensor:
        plan = gather_plan(*step.inputs[1:], num_heads=4, alibi_slopes=slopes, spans=step.spans)
        assert isinstance(plan.decode, DecodeRows)
        return paged_attention(*step.inputs, scale=0.3, alibi_slopes=slopes, spans=step.spans, plan=plan)

    out = run(together)
    for row in range(len(together.query)):
        assert torch.equal(run(together.row(row))[0], out[row])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_call_rotates_stores_and_attends(dtype: torch.dtype) -> None:
    torch.manual_seed(2)
    step = step_of(
        [Row((PREFIX, A, B, OWN), 1), Row((Span(0, 9),), 1), Row((Span(0, 2, "p"), Span(2, 1)), 1)], dtype=dtype
    )
    plan = gather_plan(*step.inputs[1:], num_heads=4, spans=step.spans).decode
    assert isinstance(plan, DecodeRows)
    qkv = torch.randn(3, 8 * 16).to(dtype)
    cos, sin = (a.to(dtype) for a in rotary_angles(step.spans.positions, 16, 1e4))
    expected_cache, got_cache = step.kv_cache.clone(), step.kv_cache.clone()
    expected = decode_attention_reference(qkv.clone(), cos, sin, expected_cache, plan, 0.3)
    got = decode_attention(qkv.clone(), cos, sin, got_cache, plan, 0.3)
    torch.testing.assert_close(got, expected, atol=2e-2 if dtype == torch.bfloat16 else 1e-5, rtol=0)
    torch.testing.assert_close(got_cache, expected_cache, equal_nan=True, atol=0, rtol=0)
    assert not torch.equal(got_cache.nan_to_num(), step.kv_cache.nan_to_num())
