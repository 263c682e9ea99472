"""The names of efficientnet-lite-pytorch's tensors -> those of timm's `tf_efficientnet_lite0`; no number changes.

The classifier goes: the features are all that the bridge reads.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

BLOCKS_OF_STAGE = (1, 2, 2, 3, 3, 4, 1)
AROUND = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2"}
FIRST_BLOCK = {"_depthwise_conv": "conv_dw", "_bn1": "bn1", "_project_conv": "conv_pw", "_bn2": "bn2"}
BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def to_timm(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_rename(name): tensor for name, tensor in tensors.items() if not name.startswith("_fc.")}


def _rename(name: str) -> str:
    part, rest = name.split(".", 1)
    if part != "_blocks":
        return f"{AROUND[part]}.{rest}"
    number, part, rest = rest.split(".", 2)
    places = [(stage, block) for stage, count in enumerate(BLOCKS_OF_STAGE) for block in range(count)]
    stage, block = places[int(number)]
    return f"blocks.{stage}.{block}.{(BLOCK if stage else FIRST_BLOCK)[part]}.{rest}"
