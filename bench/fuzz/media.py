"""Sends mutated images and videos to real decode processes, which must decode or refuse each one and stay alive."""

from __future__ import annotations

import dataclasses
import io
import subprocess
import sys
import threading
from collections.abc import Sequence
from fractions import Fraction
from typing import BinaryIO

import av
import numpy as np
import psutil
from PIL import ExifTags, Image

from bench.fuzz.isolated import HANG_SECONDS, Tally, rng_of
from bench.fuzz.mutation import mutate
from bench.random_models import SIZES, config
from bench.table import ROOT
from bench.target import LEAK
from model import heif
from model.media import MediaLimits
from server.media.decoder import LENGTH_BYTES, READY, Decode, Frames, Refused, Setup, decode_reply, with_length
from server.media.source import Kind
from server.settings import child_environment

MEMORY_BYTES = 2 * 2**30
LIMITS = MediaLimits(max_bytes=2**22, max_pixels=4_000_000, max_frames=8, max_seconds=10.0)
BATCH = 100
SIDE = 24
TIFF_COMPRESSIONS = ("raw", "tiff_lzw", "tiff_deflate", "packbits", "lzma", "jpeg")


def images() -> list[bytes]:
    """Return small pictures in every format and in the modes that differ."""
    noise = np.random.default_rng(0).integers(0, 256, (SIDE, SIDE, 4), dtype=np.uint8)
    picture = Image.fromarray(noise, "RGBA")
    rgb, frames = picture.convert("RGB"), [picture.rotate(90 * i) for i in range(3)]
    deep, turned = Image.fromarray(noise[..., 0].astype(np.uint16) * 257), Image.Exif()
    turned[ExifTags.Base.Orientation] = 6
    samples = [
        _saved(rgb, "JPEG"),
        _saved(rgb, "JPEG", progressive=True, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0"),
        _saved(picture.convert("L"), "JPEG"),
        _saved(rgb.convert("CMYK"), "JPEG"),
        _saved(picture, "PNG"),
        _saved(picture.convert("P"), "PNG", transparency=0),
        _saved(picture.convert("LA"), "PNG"),
        _saved(deep, "PNG", exif=turned),
        _saved(picture.convert("1"), "PNG", icc_profile=b"profile" * 20),
        _saved(picture.convert("P"), "GIF"),
        _saved(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        _saved(rgb, "WEBP"),
        _saved(picture, "WEBP", lossless=True),
        _saved(frames[0], "WEBP", save_all=True, append_images=frames[1:]),
        *(_saved(rgb, kind, exif=turned) for kind in ("JPEG", "PNG", "WEBP")),
        *(_saved(picture.convert(mode), "BMP") for mode in ("RGB", "RGBA", "P", "1")),
        _saved(rgb, "AVIF"),
        _saved(picture, "AVIF", exif=turned),
        _saved(frames[0], "AVIF", save_all=True, append_images=frames[1:]),
        *(_stills(rgb) if heif.is_installed() else ()),
        *(_saved(rgb, "TIFF", compression=name, exif=turned) for name in TIFF_COMPRESSIONS),
        *(_saved(picture.convert("1"), "TIFF", compression=name) for name in ("group3", "group4")),
        *(_saved(picture.convert(mode), "TIFF") for mode in ("RGBA", "P", "CMYK", "YCbCr", "LA")),
        _saved(deep, "TIFF", compression="tiff_lzw"),
        _saved(frames[0], "TIFF", save_all=True, append_images=frames[1:]),
    ]
    return samples


def _stills(picture: Image.Image) -> list[bytes]:
    """Return HEIC files, of one part and of several tiles."""
    heif.register()
    return [_saved(picture, heif.FORMAT), _saved(picture.resize((96, 96)), heif.FORMAT, tile_size=64)]


def videos() -> list[bytes]:
    """Return short videos in every container, one with a title that is no UTF-8."""
    mp4 = _video("mp4", "mpeg4")
    title = _video("mp4", "mpeg4", title="Cafe")
    return [mp4, title.replace(b"Cafe", b"Caf\xe9"), _video("matroska", "mpeg4"), _video("matroska", "mjpeg")]


def run(num_inputs: int, seed: int, kinds: Sequence[Kind] = ("image", "video")) -> Tally:
    """Send mutated media to decode processes, and first each sample as it is."""
    made: dict[Kind, list[bytes]] = {"image": images(), "video": videos()}
    samples = [(kind, data) for kind in kinds for data in made[kind]]
    by_kind = {kind: [data for other, data in samples if other == kind] for kind, _ in samples}
    tally, decoder = Tally(), DecodeProcess()
    for number in range(num_inputs):
        if number < len(samples):
            kind, data = samples[number]
        else:
            rng = rng_of(seed, number)
            # decoding a video takes longer, and fewer bytes of it matter
            kind = kinds[0] if rng.random() < 0.8 else kinds[-1]
            data = mutate(rng.choice(by_kind[kind]), rng, by_kind[kind])
        failure = decoder.attempt(kind, data, is_valid=number < len(samples))
        tally.num_inputs += 1
        if failure is not None:
            tally.add(failure, number)
        if not decoder.is_alive():
            tally.num_ends += 1
            decoder = DecodeProcess()
        if number == num_inputs // 10:
            tally.early_mb = decoder.memory_mb()
    tally.late_mb = decoder.memory_mb()
    decoder.end()
    return tally


class DecodeProcess:
    """A decode process as the pool starts it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "server.media.decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env=child_environment(OPENBLAS_NUM_THREADS="1", OMP_NUM_THREADS="1"),
        )
        vision = dataclasses.asdict(config("tiny", SIZES["tiny"]).vision)
        limits = dataclasses.asdict(LIMITS)
        setup = Setup(vision=vision, limits=limits, max_memory_bytes=MEMORY_BYTES, max_seconds=HANG_SECONDS)
        self._send(with_length(setup))
        _read(self._process.stdout, len(READY))

    def attempt(self, kind: Kind, data: bytes, *, is_valid: bool) -> str | None:
        """Decode media and return the name of what is wrong with the reply."""
        timer = threading.Timer(HANG_SECONDS, self._process.kill)
        timer.start()
        try:
            self._send(with_length(Decode(kind=kind, data=data)))
            length = int.from_bytes(_read(self._process.stdout, LENGTH_BYTES), "little")
            reply = decode_reply.decode(_read(self._process.stdout, length))
        except (OSError, EOFError):
            return self._reason(kind)
        finally:
            timer.cancel()
        return _fault(kind, reply, is_valid)

    def _reason(self, kind: str) -> str:
        """Return the exception that ended the process, or its exit status."""
        self._process.wait()
        lines = self._process.stderr.read().decode().strip().splitlines() if self._process.stderr else []
        last = next((line for line in reversed(lines) if line and not line.startswith(" ")), "")
        return f"{kind}: the process ended with {self._process.returncode}: {last[:100]}"

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def memory_mb(self) -> float:
        return psutil.Process(self._process.pid).memory_info().rss / 2**20

    def end(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _send(self, data: bytes) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(data)
        self._process.stdin.flush()


def _fault(kind: str, reply: Frames | Refused, is_valid: bool) -> str | None:
    if isinstance(reply, Frames):
        num_frames, height, width, channels = reply.shape
        has_fit = num_frames * height * width * channels == len(reply.data) > 0
        return None if has_fit else f"{kind}: {len(reply.data)} bytes for the shape {reply.shape}"
    if is_valid:
        return f"{kind}: a valid sample is refused: {reply.message[:80]}"
    if LEAK.search(reply.message.encode()):
        return f"{kind}: a message shows an address"
    return None if reply.message else f"{kind}: a refusal without a message"


def _read(source: object, length: int) -> bytes:
    assert isinstance(source, io.BufferedReader | BinaryIO)
    data = source.read(length)
    if len(data) < length:
        raise EOFError
    return data


def _saved(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def _video(container: str, codec: str, title: str = "") -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format=container) as output:
        if title:
            output.metadata["title"] = title
        stream = output.add_stream(codec, rate=2)
        assert isinstance(stream, av.VideoStream)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 2)
        for number in range(4):
            picture = np.full((32, 32, 3), 60 * number, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts = number
            output.mux(stream.encode(frame))
        output.mux(stream.encode())
    return file.getvalue()
