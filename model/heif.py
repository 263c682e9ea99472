"""HEIC and other HEIF stills, which phones take: Pillow reads them with pillow-heif, the extra `heif`.

The library is loaded when the first such image is opened, in the process that decodes it.
"""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version

DISTRIBUTION, PACKAGE = "pillow-heif", "pillow_heif"
# the libheif in the wheels of older releases has known faults that a file could use
MIN_VERSION = (1, 8)
# PIL's name of the format
FORMAT = "HEIF"
NOT_INSTALLED = (
    "HEIC images are read by servers that have the package pillow-heif (the extra heif), which this one lacks: "
    "send JPEG or PNG"
)
# brands of stills whose codec is HEVC, and of those with any codec
HEVC_BRANDS = frozenset({b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"})
ANY_CODEC_BRANDS = frozenset({b"mif1", b"msf1"})
AVIF_BRANDS = frozenset({b"avif", b"avis"})
# bytes of a file within which the brands end
MAX_BRANDS_BYTES = 128


@cache
def is_installed() -> bool:
    """Return whether a recent enough version is installed, without importing it."""
    try:
        parts = version(DISTRIBUTION).split(".")
    except PackageNotFoundError:
        return False
    return tuple(int(part) for part in parts[:2] if part.isdecimal()) >= MIN_VERSION


def still_format(data: bytes) -> str | None:
    """Return PIL's name for the format of a still in an MP4 container, from its brands; None for anything else."""
    if data[4:8] != b"ftyp":
        return None
    major, compatible = data[8:12], _compatible_brands(data)
    if major in AVIF_BRANDS or (
        major in ANY_CODEC_BRANDS and AVIF_BRANDS & compatible and not HEVC_BRANDS & compatible
    ):
        return "AVIF"
    return FORMAT if major in HEVC_BRANDS | ANY_CODEC_BRANDS else None


def _compatible_brands(data: bytes) -> set[bytes]:
    """Return the brands after the major one and its version."""
    end = min(int.from_bytes(data[:4], "big"), MAX_BRANDS_BYTES)
    return {data[start : start + 4] for start in range(16, end - 3, 4)}


@cache
def register() -> None:
    """Let PIL open HEIF in this process, with one thread and without thumbnails, depth images or other extras."""
    options = {"thumbnails": False, "depth_images": False, "aux_images": False}
    import_module(PACKAGE).register_heif_opener(decode_threads=1, **options)
