"""Attacks with images and videos: declared sizes, work that outlives its client, and decoders that are kept busy."""

from __future__ import annotations

import base64
import io
import random
from fractions import Fraction
from functools import cache

import av
import numpy as np
from PIL import Image

from bench.attacks.attack import Attack, Session, repeated
from bench.target import Request, encoded, image_part, jpeg, post, text_request

START_OF_FRAME = b"\xff\xc0"
START_OF_IMAGE, END_OF_IMAGE = b"\xff\xd8", b"\xff\xd9"
START_OF_SCAN = b"\xff\xda"
COMMENT = b"\xff\xfe\x00\x0a"
BOMBS_PER_REQUEST = 64
ABANDONED_AFTER = 0.3


def bomb(side: int = 8000) -> bytes:
    """Return a new JPEG of a few hundred bytes that declares a large size, and ends after the first blocks of pixels."""
    file = io.BytesIO()
    Image.new("RGB", (16, 16)).save(file, "JPEG")
    data = bytearray(file.getvalue())
    frame = data.index(START_OF_FRAME)
    data[frame + 5 : frame + 9] = side.to_bytes(2, "big") * 2
    return START_OF_IMAGE + COMMENT + random.randbytes(8) + bytes(data[2:])


def _bombs() -> Request:
    return text_request(1, prompt=[image_part(bomb()) for _ in range(BOMBS_PER_REQUEST)])


def _send_bombs(session: Session) -> None:
    session.send(_bombs())


def _abandon(session: Session) -> None:
    """Ask for much to be decoded, and leave before the answer."""
    connections = [session.connect(encoded(_bombs())) for _ in range(6)]
    session.sleep(ABANDONED_AFTER)
    for connection in connections:
        session.close(connection)


def _new_pictures(session: Session) -> None:
    """Send several clients' worth of pictures that the server has not seen."""
    requests = [
        text_request(1, prompt=[image_part(jpeg(random.randrange(10**9), 1024)) for _ in range(64)]) for _ in range(4)
    ]
    session.send_all(requests, 4)


def _pictures_in_requests_of_their_own(session: Session) -> None:
    """Send large pictures, each in a request of its own, on many connections."""
    # bytes after its end make each a new media item
    pictures = [_large_jpeg() + random.randbytes(8) for _ in range(40)]
    session.send_all([text_request(1, prompt=[image_part(picture)]) for picture in pictures], 40)


@cache
def _large_jpeg() -> bytes:
    return jpeg(0, 2400)


def _many_scans(session: Session) -> None:
    """Send small pictures that take many seconds to decode."""
    pictures = [_jpeg_of_scans(400) + random.randbytes(8) for _ in range(8)]
    session.send_all([text_request(1, prompt=[image_part(picture)]) for picture in pictures], 8)


@cache
def _jpeg_of_scans(num_scans: int, side: int = 8000) -> bytes:
    """Return a progressive JPEG of one colour that repeats its last scan, each time for all pixels."""
    file = io.BytesIO()
    Image.new("L", (side, side), 128).save(file, "JPEG", progressive=True)
    data = file.getvalue().removesuffix(END_OF_IMAGE)
    last = data[data.rindex(START_OF_SCAN) :]
    return data + last * num_scans + END_OF_IMAGE


@cache
def video(seconds: int, frames_per_second: int, side: int) -> bytes:
    """Return an MP4 of random frames, of which few are sampled but all are decoded."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=frames_per_second)
        stream.width = stream.height = side
        stream.codec_context.time_base = Fraction(1, frames_per_second)
        picture = np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)
        for number in range(seconds * frames_per_second):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, number, axis=1), format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return file.getvalue()


def _videos(session: Session) -> None:
    data = video(60, 60, 128)
    # a box of its own makes each a new media item
    parts = []
    for _ in range(16):
        box = (16).to_bytes(4, "big") + b"free" + random.randbytes(8)
        url = "data:video/mp4;base64," + base64.b64encode(data + box).decode()
        parts.append({"type": "video_url", "video_url": {"url": url}})
    session.send(text_request(1, prompt=parts))


def _broken() -> Request:
    data = b"\x89PNG\r\n\x1a\n" + b"broken" * 10
    return text_request(1, prompt=[image_part(data)])


def _broken_jpeg() -> Request:
    return text_request(1, prompt=[image_part(b"\xff\xd8\xff\xe0" + b"broken" * 10)])


def _many_embeddings(session: Session) -> None:
    session.send(post("/v1/embeddings", input=[image_part(jpeg(random.randrange(10**9))) for _ in range(2048)]))


ATTACKS = (
    Attack(name="64 images of 8,000 x 8,000", severity="high", run=_send_bombs),
    Attack(name="384 abandoned images", severity="high", run=_abandon),
    Attack(name="256 new images", severity="medium", run=_new_pictures),
    Attack(name="40 requests with a large picture", severity="high", run=_pictures_in_requests_of_their_own),
    Attack(name="8 images of 400 scans", severity="high", run=_many_scans),
    Attack(name="16 videos of 3,600 frames", severity="medium", run=_videos),
    Attack(name="broken images", severity="high", run=repeated(_broken, _broken_jpeg), is_refused=True),
    Attack(
        name="image of 40 MB in base64",
        severity="medium",
        run=repeated(lambda: text_request(1, prompt=[image_part(jpeg(0) + bytes(30 * 2**20))])),
    ),
    Attack(name="embeddings of 2,048 images", severity="high", run=_many_embeddings),
)
