"""The sources of the default model's images are packages of public registries, listed here with their licences.

The bridge trains on permissively licensed, CC-BY and public-domain images only. The one source under another licence is
used for evaluation only. This repository contains no training image: the drawings in docs/examples are of held-out
categories.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

ReaderName = Literal["iconify", "webp_by_code", "openclipart", "tuxpaint"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    name: str
    registry: Literal["npm", "debian"]
    package: str
    version: str
    licence: str
    attribution: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Package):
    """A package of images."""

    reader: ReaderName
    style: str
    trains: bool = True


EMOJIBASE = Source(
    name="emojibase",
    registry="npm",
    package="emojibase-data",
    version="17.0.0",
    licence="MIT",
    attribution="Miles Johnson: names, tags and groups of the concepts",
    reader="iconify",
    style="",
)

# the ancestors of the encoder's classes
WORDNET = Package(
    name="wordnet",
    registry="debian",
    package="wordnet-base",
    version="1:3.0-39",
    licence="WordNet",
    attribution="Princeton University, WordNet 3.0",
)


def _iconify(name: str, version: str, licence: str, attribution: str, style: str) -> Source:
    return Source(
        name=name,
        registry="npm",
        package=f"@iconify-json/{name}",
        version=version,
        licence=licence,
        attribution=attribution,
        reader="iconify",
        style=style,
    )


SOURCES = (
    _iconify("noto", "1.2.9", "Apache-2.0", "Google, Noto Emoji", "a cartoon"),
    _iconify("noto-v1", "1.2.5", "Apache-2.0", "Google, Noto Emoji version 1", "an old emoji"),
    _iconify("twemoji", "1.2.5", "CC-BY-4.0", "Twitter, Twemoji", "a flat drawing"),
    _iconify("emojione", "1.2.3", "CC-BY-4.0", "Emoji One, version 2", "a drawing"),
    _iconify("fluent-emoji", "1.2.7", "MIT", "Microsoft, Fluent Emoji", "a glossy drawing"),
    _iconify("fluent-emoji-flat", "1.2.6", "MIT", "Microsoft, Fluent Emoji, flat", "a flat picture"),
    _iconify("fxemoji", "1.2.2", "Apache-2.0", "Mozilla, FxEmojis", "a simple drawing"),
    _iconify("streamline-emojis", "1.2.4", "CC-BY-4.0", "Streamline, Emojis", "a line drawing"),
    Source(
        name="fluent-3d",
        registry="npm",
        package="@lobehub/fluent-emoji-3d",
        version="1.1.0",
        licence="MIT",
        attribution="Microsoft, Fluent Emoji in 3D, packed by LobeHub",
        reader="webp_by_code",
        style="a 3D render",
    ),
    Source(
        name="openclipart",
        registry="debian",
        package="openclipart-png",
        version="1:0.18+dfsg-19",
        licence="public domain",
        attribution="the authors of the Open Clip Art Library",
        reader="openclipart",
        style="clip art",
    ),
    Source(
        name="tuxpaint",
        registry="debian",
        package="tuxpaint-stamps-default",
        version="2025.03.31-1",
        licence="GPL-2",
        attribution="the contributors of Tux Paint's stamps; evaluation only, never trained on, never shipped",
        reader="tuxpaint",
        style="a photograph",
        trains=False,
    ),
)
