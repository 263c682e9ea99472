"""Reads all pages of a list, such as those of support sets and evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from flamboyance_client.records import Page

Item = TypeVar("Item")
# entries per request; the server has at most 100 evaluations on a page
PAGE = 100


def all_items(list_page: Callable[..., Page[Item]], **query: Any) -> Iterator[Item]:
    """Yield the entries of all pages. `list_page` is a `list` method of the client, and `query` its other arguments."""
    page = list_page(limit=PAGE, **query)
    yield from page
    while page.has_more:
        page = list_page(limit=PAGE, after=page.last_id, **query)
        yield from page
