"""The paths of requests: one that ends with a slash is the same as without."""

from __future__ import annotations

# the folders of pages, whose relative links would be others without the slash
PAGE_FOLDERS = ("/docs/", "/playground/")


def without_slash(path: str) -> str:
    """Return the path as routes have it."""
    return path if path in PAGE_FOLDERS else path.rstrip("/") or "/"
