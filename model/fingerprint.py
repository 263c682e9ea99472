"""Which weights a model folder holds, told without reading all of them. No torch here.

`config.json` and `tokenizer.json` count whole; of every tensor its name, type, shape and a piece from its middle.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

PIECE_BYTES = 256
# a safetensors file begins with the length of its table of tensors
LENGTH_BYTES = 8


def fingerprint(folder: Path) -> str:
    """32 hexadecimal digits: the same for copies of a folder, another where any tensor was trained on."""
    digest = hashlib.blake2b(digest_size=16, person=b"flmbynce-weights")
    for name in ("config.json", "tokenizer.json"):
        digest.update(hashlib.blake2b((folder / name).read_bytes()).digest())
    for file in sorted(folder.glob("*.safetensors")):
        digest.update(_pieces(file))
    return digest.hexdigest()


def _pieces(file: Path) -> bytes:
    digest = hashlib.blake2b()
    with file.open("rb") as weights:
        num_bytes = int.from_bytes(weights.read(LENGTH_BYTES), "little")
        table = weights.read(num_bytes)
        digest.update(table)
        for name, tensor in sorted(json.loads(table).items()):
            if name == "__metadata__":
                continue
            start, end = tensor["data_offsets"]
            length = min(end - start, PIECE_BYTES)
            weights.seek(LENGTH_BYTES + num_bytes + start + (end - start - length) // 2)
            digest.update(weights.read(length))
    return digest.digest()
