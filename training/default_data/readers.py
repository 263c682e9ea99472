"""Each kind of package as pairs of picture and record: icon sets drawn from SVG, WebP by code, folders of PNG.

A picture is the square that the encoder reads, on white; one that cannot be drawn is named and left out.
"""

from __future__ import annotations

import io
import logging
import re
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path

import resvg_py
from PIL import Image

from model.media import MediaError, MediaLimits, load_image
from training.default_data.concepts import Concept, Concepts, squeeze
from training.default_data.packages import read_json, unpack_debian
from training.default_data.records import Record
from training.default_data.sources import Reader, Source

log = logging.getLogger(__name__)
SIZE = 224
LIMITS = MediaLimits(max_pixels=16_000_000)
# a photograph's cut-out has tens of thousands of colours, a drawing saved as PNG a few hundred
PHOTOGRAPH_COLOURS = 3000
OPENCLIPART_FOLDERS = (
    "animals", "food", "plants", "transportation/vehicles", "transportation/boating", "tools", "recreation/toys",
    "recreation/music", "recreation/sports", "people/clothing", "buildings", "electronics", "computer/hardware",
    "education/books", "household", "geography/astronomy", "recreation/holiday", "recreation/party",
)  # fmt: skip
TUXPAINT_LEFT_OUT = ("symbols", "people", "town/flags", "town/roadsigns", "seasonal", "military")

Drawn = Iterator[tuple[Image.Image, Record]]


def read(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> Drawn:
    return READERS[source.reader](source, package, unpacked, concepts)


def _iconify(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> Drawn:
    with tarfile.open(package) as archive:
        icons = read_json(archive, "icons.json")
    default = icons.get("width", 16), icons.get("height", 16)
    seen: set[str] = set()
    for name, icon in icons["icons"].items():
        concept = concepts.named(name)
        if concept is None or concept.label in seen:
            continue
        width, height = icon.get("width", default[0]), icon.get("height", default[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        try:
            png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
        except ValueError as error:
            log.warning("%s: %s cannot be drawn: %s", source.name, name, error)
            continue
        seen.add(concept.label)
        yield Image.open(io.BytesIO(bytes(png))), _of_concept(source, concept)


def _webp_by_code(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> Drawn:
    with tarfile.open(package) as archive:
        for member in archive:
            concept = concepts.coded(Path(member.name).stem) if member.name.endswith(".webp") else None
            stream = archive.extractfile(member)
            if concept is not None and stream is not None:
                yield Image.open(io.BytesIO(stream.read())), _of_concept(source, concept)


def _of_concept(source: Source, concept: Concept) -> Record:
    return _record(source, squeeze(concept.label), concept.label, concept.kind, concept.tags)


def _record(source: Source, stem: str, label: str, category: str, tags: tuple[str, ...] = ()) -> Record:
    return Record(
        image=f"images/{source.name}/{stem}.webp",
        label=label,
        category=category,
        tags=tags,
        source=source.name,
        licence=source.licence,
        style=source.style,
        domain="drawing" if source.trains else "photograph",
        trains=source.trains,
    )


def _openclipart(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> Drawn:
    root = unpack_debian(package, unpacked) / "usr" / "share" / "openclipart" / "png"
    for folder in OPENCLIPART_FOLDERS:
        for file in sorted((root / folder).rglob("*.png")):
            kind = file.relative_to(root).parts[:-1]
            label = _label_in(file.stem, concepts)
            stem = squeeze("-".join((*kind, file.stem)))
            yield from _opened(file, _record(source, stem, label, " ".join(kind[-2:]).replace("_", " ")))


def _label_in(stem: str, concepts: Concepts) -> str:
    """A file's name begins with what it shows and ends with who drew it: the longest beginning that is a concept."""
    words = re.sub(r"[_\d]+", " ", stem).split()
    for count in range(min(3, len(words)), 0, -1):
        if concept := concepts.by_name.get(squeeze("".join(words[:count]))):
            return concept.label
    return ""


def _tuxpaint(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> Drawn:
    root = unpack_debian(package, unpacked) / "usr" / "share" / "tuxpaint" / "stamps"
    for file in sorted(root.rglob("*.png")):
        kind = file.relative_to(root).parts[:-1]
        place = "/".join(kind)
        drawn = "cartoon" in kind or file.with_suffix(".svg").exists() or place.startswith(TUXPAINT_LEFT_OUT)
        if drawn or not kind:
            continue
        record = _record(source, squeeze("-".join((*kind, file.stem))), _description(file), kind[-1].replace("_", " "))
        for image, opened in _opened(file, record):
            if num_colours(image) >= PHOTOGRAPH_COLOURS:
                yield image, opened


def _description(file: Path) -> str:
    text = file.with_suffix(".txt")
    if not text.exists():
        return ""
    lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
    first = lines[0].strip().rstrip(".!") if lines else ""
    return re.sub(r"^(An?|The|Some)\s+", "", first)


def num_colours(image: Image.Image) -> int:
    small = image.convert("RGBA").resize((SIZE, SIZE), Image.Resampling.NEAREST)
    return len(small.getcolors(SIZE * SIZE) or ())


def _opened(file: Path, record: Record) -> Drawn:
    try:
        image = load_image(file.read_bytes(), LIMITS)
    except MediaError as error:
        log.warning("%s cannot be read: %s", file, error)
        return
    yield image, record


READERS: dict[Reader, Callable[[Source, Path, Path, Concepts], Drawn]] = {
    "iconify": _iconify,
    "webp_by_code": _webp_by_code,
    "openclipart": _openclipart,
    "tuxpaint": _tuxpaint,
}
