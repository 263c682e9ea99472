"""The paths of requests: one that ends with a slash is the same as without, and logs have them in one line."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

# the folders of pages, whose relative links would be others without the slash
PAGE_FOLDERS = ("/docs/", "/playground/")


def quoted_path(scope: Mapping[str, Any]) -> str:
    """Return the path of a request for logs and messages, with its line breaks: `Request.url` drops them."""
    return quote(scope["path"], safe="/:@!$&'()*+,;=")


def without_slash(path: str) -> str:
    """Return the path as routes have it."""
    return path if path in PAGE_FOLDERS else path.rstrip("/") or "/"
