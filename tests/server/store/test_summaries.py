"""Records of sets without their examples: a page has what each set has alone, and small sets share its queries."""

from __future__ import annotations

from typing import Any

import pytest
from sqlalchemy.orm import Session

from server.store import summaries
from server.store.database import Database
from server.store.support_sets import SupportSets
from tests.server.store.conftest import BLUE, GREEN, RED, example

pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("first_examples", [1, 3, 16])
async def test_a_page_has_the_numbers_of_each_set(
    support_sets: SupportSets, monkeypatch: pytest.MonkeyPatch, first_examples: int
) -> None:
    monkeypatch.setattr(summaries, "FIRST_EXAMPLES", first_examples)
    await support_sets.create("empty", [])
    two = [example("a", RED, GREEN, label="warm"), example("b", RED, label="cold")]
    await support_sets.create("two", two)
    await support_sets.create("changed", [example("a", RED, label="warm"), example("b", label="cold"), example("c")])
    await support_sets.put_examples("changed", [example("a", BLUE, GREEN, label="hot")])
    await support_sets.remove_examples("changed", ["b"])
    await support_sets.create("same", two)
    page = await support_sets.page("", 10)
    assert [info.num_media for info in page] == [0, 2, 2, 2]
    assert [info.num_bytes for info in page] == [0, len(b"redgreen"), len(b"bluegreen"), len(b"redgreen")]
    assert [list(info.label_counts.items()) for info in page] == [
        [],
        [("warm", 1), ("cold", 1)],
        [("hot", 1)],
        [("warm", 1), ("cold", 1)],
    ]
    assert page == [await support_sets.get(info.id) for info in page]
    assert (await support_sets.get("changed", 1)).label_counts == {"warm": 1, "cold": 1}


async def test_small_sets_share_the_queries_of_a_page(
    support_sets: SupportSets, database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(40):
        await support_sets.create(f"s{number}", [example("a", RED, label="warm")])
    num_queries, execute = 0, Session.execute

    def count(*arguments: Any, **options: Any) -> Any:
        nonlocal num_queries
        num_queries += 1
        return execute(*arguments, **options)

    monkeypatch.setattr(Session, "execute", count)
    assert len(await support_sets.page("", 40)) == 40
    assert num_queries < 10
