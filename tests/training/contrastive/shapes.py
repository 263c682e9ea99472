"""Shards of images of coloured shapes with captions, which two towers can learn in half a minute."""

from __future__ import annotations

import io
from pathlib import Path
from random import Random

from PIL import Image, ImageDraw

from tests.tiny_models import byte_tokenizer
from training.contrastive.config import ContrastiveConfig, ContrastiveOptimConfig, ImageConfig, PairsConfig, TextConfig
from training.data.make import write_shards
from training.data.shards import RawRecord

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 70, 220),
    "yellow": (235, 215, 50),
    "purple": (150, 50, 180),
    "orange": (240, 140, 30),
}
SHAPES = ("circle", "square", "triangle", "cross", "bar", "ring")
KINDS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
SIZE = 64


def draw_shape(colour: str, shape: str, rng: Random) -> bytes:
    """Draw a shape as PNG, at a random position, in a random size and on a random pale background."""
    image = Image.new("RGB", (SIZE, SIZE), tuple(rng.randint(225, 255) for _ in range(3)))
    draw = ImageDraw.Draw(image)
    r = rng.randint(18, 24)
    x, y = rng.randint(r, SIZE - r), rng.randint(r, SIZE - r)
    box, fill = (x - r, y - r, x + r, y + r), COLOURS[colour]
    if shape == "circle":
        draw.ellipse(box, fill)
    elif shape == "square":
        draw.rectangle(box, fill)
    elif shape == "triangle":
        draw.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], fill)
    elif shape == "cross":
        draw.rectangle((x - r // 3, y - r, x + r // 3, y + r), fill)
        draw.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
    elif shape == "bar":
        draw.rectangle((x - r, y - r // 3, x + r, y + r // 3), fill)
    else:
        draw.ellipse(box, outline=fill, width=r // 3)
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def records(rounds: int, seed: str) -> list[RawRecord]:
    """Return every kind once per round, round by round, so that a window of one round contains no caption twice."""
    rng = Random(seed)
    return [
        RawRecord(
            f"{number}-{colour}-{shape}", {"png": draw_shape(colour, shape, rng), "txt": f"a {colour} {shape}".encode()}
        )
        for number in range(rounds)
        for colour, shape in KINDS
    ]


def make_run(
    folder: Path, *, steps: int, batch_size: int = len(KINDS), optimizer: str = "adam", precision: str = "float32"
) -> ContrastiveConfig:
    """Write two sets and held-out images of every kind, and return a run over them."""
    (folder / "tokenizer.json").write_text(byte_tokenizer().to_str())
    for name in ("align", "ltip"):
        write_shards(records(4, name), folder / name, len(KINDS))
    write_shards(records(1, "held out"), folder / "held", len(KINDS))
    return ContrastiveConfig(
        out=str(folder / "out"),
        steps=steps,
        image=ImageConfig(architecture="test_nfnet", image_size=SIZE, augment=False),
        text=TextConfig(
            tokenizer=str(folder / "tokenizer.json"), dim=64, num_layers=2, num_heads=4, ffn_dim=128, max_tokens=24
        ),
        sets=tuple(
            PairsConfig(name=name, shards=str(folder / name / "*.tar"), batch_size=batch_size, window=len(KINDS))
            for name in ("align", "ltip")
        ),
        optim=ContrastiveOptimConfig(optimizer=optimizer, learning_rate=2e-3, warmup_steps=5),  # type: ignore[arg-type]
        joint_dim=64,
        label_smoothing=0.1,
        held_out=str(folder / "held" / "*.tar"),
        precision=precision,  # type: ignore[arg-type]
        checkpoint_steps=2,
        log_steps=1,
    )
