"""Archives of support sets, written by hand with the standard library: whole ones, and ones that are wrong in one place."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Sequence
from typing import Any

MANIFEST = {"format": "flamboyance.support_set", "format_version": 1, "name": "s"}


def reference(data: bytes, file: str = "media/a.png", kind: str = "image") -> dict[str, str]:
    return {"type": kind, "file": file, "sha256": hashlib.sha256(data).hexdigest()}


def archive(
    examples: Sequence[dict[str, Any]], files: dict[str, bytes] | None = None, compression: int = 0, **manifest: Any
) -> bytes:
    """Return an archive; an entry of `files` replaces the one of the same name."""
    entries = {
        "manifest.json": json.dumps({**MANIFEST, **manifest}).encode(),
        "examples.jsonl": "".join(json.dumps(example) + "\n" for example in examples).encode(),
        **(files or {}),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as output:
        for name, data in entries.items():
            output.writestr(name, data)
    return file.getvalue()


def unpacked(data: bytes) -> dict[str, bytes]:
    with zipfile.ZipFile(io.BytesIO(data)) as file:
        assert file.testzip() is None
        return {name: file.read(name) for name in file.namelist()}
