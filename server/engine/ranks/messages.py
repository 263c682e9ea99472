"""Messages from rank 0 to the other ranks: its calls that change or read what every rank holds, which the others repeat.

Media are sent as visual tokens: only rank 0 encodes frames, and each rank projects the keys and values of its own heads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import TypeAlias

import msgspec
import numpy as np
import torch
from torch import Tensor

from model.batch import Batch

Send: TypeAlias = Callable[[bytes], None]


class Table(msgspec.Struct, frozen=True):
    """A tensor in host memory."""

    shape: tuple[int, ...]
    dtype: str
    data: bytes

    @classmethod
    def of(cls, tensor: Tensor) -> Table:
        array = tensor.numpy()
        return cls(array.shape, array.dtype.str, array.tobytes())

    def tensor(self) -> Tensor:
        # a copy, because the message is read-only
        return torch.from_numpy(np.frombuffer(self.data, self.dtype).reshape(self.shape).copy())


class Begin(msgspec.Struct, frozen=True, tag=True):
    """The first message to a rank: the settings, in the form of `Settings.to_worker`, and the rendezvous file."""

    settings: str
    number: int
    size: int
    store: str


class CopyBlocks(msgspec.Struct, frozen=True, tag=True):
    copies: list[tuple[int, int]]


class FillPages(msgspec.Struct, frozen=True, tag=True):
    """Visual tokens [M, R, D] in float32, and the slots of their pages."""

    slots: list[int]
    visual_tokens: Table


class Forward(msgspec.Struct, frozen=True, tag=True):
    """A batch in host memory, by the names of its tensors."""

    tables: dict[str, Table]

    def batch(self) -> Batch:
        tensors = {name: table.tensor() for name, table in self.tables.items()}
        return Batch(**{"media_slot": None, **tensors})  # type: ignore[arg-type]


class BeginTexts(msgspec.Struct, frozen=True, tag=True):
    """Texts to embed together, in pieces of up to `max_tokens` between the batches."""

    request_id: str
    token_ids: list[list[int]]
    max_tokens: int


class NextPiece(msgspec.Struct, frozen=True, tag=True):
    """Run the next piece of a request's texts through its next layer."""

    request_id: str


class EndTexts(msgspec.Struct, frozen=True, tag=True):
    request_id: str


Message: TypeAlias = Begin | CopyBlocks | FillPages | Forward | BeginTexts | NextPiece | EndTexts

encode = msgspec.msgpack.Encoder().encode
decode = msgspec.msgpack.Decoder(Message).decode


class Followers:
    """The other ranks, seen from rank 0: each call is sent to all of them, in order. Without any, calls do nothing."""

    def __init__(self, sends: Sequence[Send] = ()) -> None:
        self._sends = sends

    def __len__(self) -> int:
        return len(self._sends)

    def copy_blocks(self, copies: list[tuple[int, int]]) -> None:
        self._tell(lambda: CopyBlocks(copies))

    def fill_pages(self, slots: list[int], visual_tokens: Tensor) -> None:
        self._tell(lambda: FillPages(slots, Table.of(visual_tokens.float().cpu())))

    def forward(self, batch: Batch) -> None:
        tables = {field.name: getattr(batch, field.name) for field in fields(batch)}
        self._tell(lambda: Forward({name: Table.of(t) for name, t in tables.items() if isinstance(t, Tensor)}))

    @contextmanager
    def embedding(self, request_id: str, token_ids: list[list[int]], max_tokens: int) -> Iterator[Callable[[], None]]:
        """Embed texts in all ranks, even if the request ends early; yields functions to call before each piece."""
        self._tell(lambda: BeginTexts(request_id, token_ids, max_tokens))
        try:
            yield lambda: self._tell(lambda: NextPiece(request_id))
        finally:
            self._tell(lambda: EndTexts(request_id))

    def _tell(self, message: Callable[[], Message]) -> None:
        if self._sends:
            data = encode(message())
            for send in self._sends:
                send(data)


NO_FOLLOWERS = Followers()
