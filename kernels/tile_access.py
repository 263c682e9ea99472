"""Loads and stores of a tile of rows, for all kernels: masked over rows always, over columns only where it must be."""

from __future__ import annotations

from kernels.backend import jit, tl


@jit
def load_tile(pointers, offsets, row_mask, columns, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    """A tile of rows of WIDTH; the mask over columns exists only where WIDTH is no power of two."""
    if EVEN:
        return tl.load(pointers + offsets, mask=row_mask[:, None], other=0.0)
    return tl.load(pointers + offsets, mask=row_mask[:, None] & (columns < WIDTH)[None, :], other=0.0)


@jit
def store_tile(pointers, offsets, tile, row_mask, columns, WIDTH: tl.constexpr, EVEN: tl.constexpr):
    value = tile.to(pointers.dtype.element_ty)
    if EVEN:
        tl.store(pointers + offsets, value, mask=row_mask[:, None])
    else:
        tl.store(pointers + offsets, value, mask=row_mask[:, None] & (columns < WIDTH)[None, :])
