"""Finds the weight files in a folder of transformers, open_clip or this server by their names, without torch."""

from __future__ import annotations

from collections.abc import Collection

STEMS = ("model", "pytorch_model")
OPEN_CLIP_STEMS = ("open_clip_model", "open_clip_pytorch_model", "model")
OPEN_CLIP_CONFIG = "open_clip_config.json"
KINDS = ("safetensors", "bin")


def weights_name(names: Collection[str], stems: tuple[str, ...]) -> str | None:
    """Return the preferred name of the weights among a folder's files: safetensors before PyTorch files, or None.

    The file of that name may be absent: `NAME.index.json` then lists its shards.
    """
    candidates = (f"{stem}.{kind}" for kind in KINDS for stem in stems)
    return next((name for name in candidates if name in names or f"{name}.index.json" in names), None)
