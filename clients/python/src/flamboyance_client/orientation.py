"""The orientation of PIL images, without an import of Pillow."""

from __future__ import annotations

from typing import Any

ORIENTATION = 0x0112
# EXIF's orientation -> the value of `PIL.Image.Transpose` that turns the stored pixels upright
UPRIGHT = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}


def upright(image: Any) -> Any:
    """Return a PIL image turned upright by its EXIF orientation; an orientation that cannot be read is ignored."""
    image.load()  # Pillow turns a TIFF by itself, and then removes the tag
    try:
        method = UPRIGHT.get(image.getexif().get(ORIENTATION))
    except Exception:  # Pillow's errors for a broken table have no common class
        return image
    return image if method is None else image.transpose(method)
