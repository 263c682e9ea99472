"""Whether a video file is all there: MP4 and Matroska say how long their parts are, and a part may not end behind the file.

FFmpeg plays what it gets: of a file whose second half is missing it makes a shorter video, and says nothing.
"""

from __future__ import annotations

SEGMENT_ID = 0x18538067


def ends_early(data: bytes, form: str) -> bool:
    """`form`: mp4 or matroska. True only where bytes are known to be missing."""
    return _boxes_end(data) > len(data) if form == "mp4" else _segment_end(data) > len(data)


def _boxes_end(data: bytes) -> int:
    """Where the last of the file's boxes ends: each begins with its size, which counts itself."""
    place = 0
    while place + 8 <= len(data):
        size, head = int.from_bytes(data[place : place + 4], "big"), 8
        if size == 1:
            size, head = int.from_bytes(data[place + 8 : place + 16], "big"), 16
        if size < head:  # 0: up to the end, whatever that is; else no box
            return len(data)
        place += size
    return place


def _segment_end(data: bytes) -> int:
    """Where the segment ends, the second element of the file, which holds all the rest."""
    _, place = _number(data, 0, keeps_marker=True)
    size, place = _number(data, place)
    name, place = _number(data, place + size, keeps_marker=True)
    start = place
    size, place = _number(data, place)
    is_open = size + 1 == 1 << 7 * (place - start)  # all ones: written while its end was not known
    return place + size if name == SEGMENT_ID and not is_open else len(data)


def _number(data: bytes, place: int, *, keeps_marker: bool = False) -> tuple[int, int]:
    """EBML's number at a place and where it ends: the zeros in front of its first one tell its length in bytes."""
    first = data[place] if place < len(data) else 0
    length = 9 - first.bit_length()
    value = int.from_bytes(data[place : place + length], "big")
    return value if keeps_marker else value & ((1 << 7 * length) - 1), place + length
