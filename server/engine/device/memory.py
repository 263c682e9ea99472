"""The memory of a GPU: the caches get what remains after the weights and the largest step, both of which are measured.

A step that ran out of memory in service would fail every request in it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from server.settings import Settings, SettingsError

GIB = 2**30
MIB = 2**20
FIXED_MIB = 1024
MEDIA_SHARE = 4  # media pages get one part in this many of the memory that is left for both caches


class DeviceMemory(Protocol):
    """The memory of a device, in bytes."""

    def total(self) -> int: ...

    def used(self) -> int:
        """Return the bytes in use, by all processes."""
        ...

    def peak_of(self, work: Callable[[], object]) -> int:
        """Do some work, and return the additional bytes that it took at its peak."""
        ...


class CudaMemory:
    """The memory of a GPU, in which torch keeps what it has freed: so the peak counts what torch took from the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def total(self) -> int:
        return torch.cuda.mem_get_info(self._device)[1]

    def used(self) -> int:
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(self._device)
        return total - free

    def peak_of(self, work: Callable[[], object]) -> int:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self._device)
        before = torch.cuda.memory_reserved(self._device)
        work()
        torch.cuda.synchronize(self._device)
        peak = torch.cuda.max_memory_reserved(self._device) - before
        torch.cuda.empty_cache()
        return peak


@dataclass(frozen=True, slots=True, kw_only=True)
class Room:
    """The memory of a device, in bytes: what is taken, and what is `left` for the caches."""

    total: int
    fraction: float  # of the total that may be used
    used: int  # weights, and all that was there before
    step: int = 0  # the largest step
    graphs: int = 0  # the largest decode step, whose memory recorded steps keep

    @property
    def left(self) -> int:
        """The bytes that are left for the caches; negative if there are too few."""
        return int(self.total * self.fraction) - self.used - self.step - self.graphs

    def __str__(self) -> str:
        parts = [f"{gib(self.used)} GiB are in use"]
        parts += [f"the largest step takes {gib(self.step)} GiB"] if self.step else []
        parts += [f"recorded steps keep {gib(self.graphs)} GiB"] if self.graphs else []
        return f"of {gib(self.total * self.fraction)} GiB, {self.fraction:g} of the device's memory, {', '.join(parts)}"


def gib(num_bytes: float) -> str:
    return f"{num_bytes / GIB:.1f}"


@dataclass(frozen=True, slots=True)
class CacheBytes:
    """The sizes of the caches of text and of media."""

    text: int
    media: int


def fixed_caches(settings: Settings) -> CacheBytes:
    """Return the sizes of the caches where nothing is measured, as on a CPU."""
    sizes = (settings.kv_cache_mb, settings.media_cache_mb)
    return CacheBytes(*(MIB * (FIXED_MIB if size is None else size) for size in sizes))


def divide(room: Room, settings: Settings, longest: int, page: int) -> CacheBytes:
    """Return the sizes of the caches: those of the settings, or all that is left, a quarter of it for media.

    `longest` is what one request of max_model_len takes, `page` one media page. Raises `SettingsError` if what is needed is
    not left, with how much is missing.
    """
    media = page if settings.media_cache_mb is None else settings.media_cache_mb * MIB
    text = longest if settings.kv_cache_mb is None else settings.kv_cache_mb * MIB
    if (missing := text + media - room.left) > 0:
        raise SettingsError(
            f"memory_fraction: {room}, and the caches need {gib(text + media)} GiB for one request of max_model_len or as "
            f"set: {gib(missing)} GiB are missing; lower max_model_len, max_num_batched_tokens or a cache, or raise it"
        )
    if settings.media_cache_mb is None:
        share = room.left // MEDIA_SHARE if settings.kv_cache_mb is None else room.left
        media = min(max(page, share), room.left - text)
    if settings.kv_cache_mb is None:
        text = room.left - media
    return CacheBytes(text, media)


def check_weights(memory: DeviceMemory, fraction: float, num_bytes: int) -> None:
    """Raise `SettingsError` if weights of this size do not fit on the device, with how much is missing."""
    room = Room(total=memory.total(), fraction=fraction, used=memory.used())
    if (missing := num_bytes - room.left) > 0:
        raise SettingsError(f"model: its weights take {gib(num_bytes)} GiB; {room}: {gib(missing)} GiB are missing")
