"""Videos for tests."""

from __future__ import annotations

import io

import av
from PIL import Image


def film(colours: list[str]) -> bytes:
    """Return an MP4 file that shows each colour for a second."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width, stream.height = 32, 32
        for colour in colours:
            frame = av.VideoFrame.from_image(Image.new("RGB", (32, 32), colour))
            for _ in range(5):
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()
