"""Make the playground's examples from `docs/examples`: their files, a video, and `manifest.json`.

    python clients/playground/examples.py

The files are written to `public/examples` next to this script, from where the build copies them. Their sources and licences
are in `docs/examples/SOURCES.md`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import av
from PIL import Image

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "docs" / "examples"
TARGET = HERE / "public" / "examples"

WORDS = {"elephant": "dax", "bicycle": "wug", "banana": "blicket"}
TEXTURES = {"brick": "brick", "grass": "grass", "gravel": "stones"}
MOVED = "fluent-bicycle"
SIZE, FRAMES_PER_SECOND, SECONDS = 224, 8, 4

DRAWN_SHOTS = [{"file": f"noto-{thing}.png", "text": word} for thing, word in WORDS.items()]
EXAMPLES = [
    {
        "name": "drawings",
        "title": "Drawings with made-up words",
        "pattern": "This is a {answer}.",
        "shots": DRAWN_SHOTS,
        "queries": [
            {"file": f"fluent-{thing}.png", "text": WORDS[thing]} for thing in ("bicycle", "banana", "elephant")
        ],
    },
    {
        "name": "textures",
        "title": "Textures",
        "pattern": "This is {answer}.",
        "shots": [
            {"file": f"{name}-{number}.jpg", "text": word} for number in (1, 2) for name, word in TEXTURES.items()
        ],
        "queries": [{"file": f"{name}-3.jpg", "text": TEXTURES[name]} for name in ("gravel", "grass", "brick")],
    },
    {
        "name": "video",
        "title": "A video",
        "pattern": "This is a {answer}.",
        "shots": DRAWN_SHOTS,
        "queries": [{"file": f"{MOVED}.mp4", "text": WORDS["bicycle"]}],
    },
]


def main() -> None:
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    for drawing in SOURCES.glob("*.png"):
        shutil.copyfile(drawing, TARGET / drawing.name)
    for texture in SOURCES.glob("textures/*/*/*.jpg"):
        shutil.copyfile(texture, TARGET / f"{texture.parent.name}-{texture.name}")
    write_video(SOURCES / f"{MOVED}.png", TARGET / f"{MOVED}.mp4")
    (TARGET / "manifest.json").write_text(json.dumps(EXAMPLES, indent=1) + "\n")


def write_video(drawing: Path, file: Path) -> None:
    """Write the drawing's way from left to right as H.264, which browsers and the server read."""
    with av.open(file, "w") as container:
        stream = container.add_stream("libx264", rate=FRAMES_PER_SECOND, options={"crf": "30", "preset": "veryslow"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for picture in positions(Image.open(drawing).convert("RGB")):
            container.mux(stream.encode(av.VideoFrame.from_image(picture)))
        container.mux(stream.encode())


def positions(drawing: Image.Image) -> Iterator[Image.Image]:
    side = SIZE * 5 // 8
    small = drawing.resize((side, side), Image.Resampling.LANCZOS)
    last = FRAMES_PER_SECOND * SECONDS - 1
    for index in range(last + 1):
        picture = Image.new("RGB", (SIZE, SIZE), "white")
        picture.paste(small, ((SIZE - side) * index // last, (SIZE - side) // 2))
        yield picture


if __name__ == "__main__":
    main()
