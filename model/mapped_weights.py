"""Releases the files of a model's weights after most weights were replaced by copies in other formats.

A loaded tensor is a view of its file, which is mapped into memory, and one view keeps all pages of the file that were read.
So the norms of a model in four bits would keep its float32 weights resident.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from model.cpu import FastLinear
from model.flamingo import Flamingo


def addresses(model: Flamingo) -> dict[int, int]:
    """Return the address and the bytes of each tensor of a loaded model."""
    return {tensor.data_ptr(): tensor.nbytes for tensor in _tensors(model)}


@torch.no_grad()
def release(model: Flamingo, loaded: Mapping[int, int]) -> None:
    """Copy the tensors that are still views of files, if they are less than half of all, so that the files are unmapped.

    `loaded` comes from `addresses`. A model that uses most of its files keeps them mapped: the system can drop those pages
    and read them again.
    """
    left = [tensor for tensor in _tensors(model) if tensor.data_ptr() in loaded]
    if 2 * sum(tensor.nbytes for tensor in left) < sum(loaded.values()):
        for tensor in left:
            tensor.data = tensor.data.clone()


def _tensors(model: Flamingo) -> Iterator[Tensor]:
    """Yield the tensors of all modules and products, each once, except those in oneDNN's layout, which are copies."""
    tensors: dict[int, Tensor] = {}
    for module in model.modules():
        products = module.products.values() if isinstance(module, FastLinear) else ()
        held = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        held += [value for product in products for value in vars(product).values() if isinstance(value, Tensor)]
        tensors.update((id(tensor), tensor) for tensor in held if not tensor.is_mkldnn)
    yield from tensors.values()
