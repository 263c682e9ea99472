"""Reads packages as pairs of image and record: icon sets rendered from SVG, WebP files named by code, folders of PNG.

Images that cannot be rendered or decoded are logged and skipped.
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
from training.default_data.concepts import Concept, Concepts, normalise_name
from training.default_data.packages import read_json, unpack_debian
from training.default_data.records import Record
from training.default_data.sources import ReaderName, Source

log = logging.getLogger(__name__)
SIZE = 224
LIMITS = MediaLimits(max_pixels=16_000_000)
# a photograph has tens of thousands of colours, a drawing stored as PNG a few hundred
PHOTOGRAPH_COLOURS = 3000
OPENCLIPART_FOLDERS = (
    "animals", "food", "plants", "transportation/vehicles", "transportation/boating", "tools", "recreation/toys",
    "recreation/music", "recreation/sports", "people/clothing", "buildings", "electronics", "computer/hardware",
    "education/books", "household", "geography/astronomy", "recreation/holiday", "recreation/party",
)  # fmt: skip
TUXPAINT_EXCLUDED = ("symbols", "people", "town/flags", "town/roadsigns", "seasonal", "military")

ImageRecords = Iterator[tuple[Image.Image, Record]]


def read(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> ImageRecords:
    return READERS[source.reader](source, package, unpacked, concepts)


def _iconify(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> ImageRecords:
    with tarfile.open(package) as archive:
        icons = read_json(archive, "icons.json")
    default = icons.get("width", 16), icons.get("height", 16)
    rendered_labels: set[str] = set()
    for name, icon in icons["icons"].items():
        concept = concepts.find_by_name(name)
        if concept is None or concept.label in rendered_labels:
            continue
        width, height = icon.get("width", default[0]), icon.get("height", default[1])
        box = f"{icon.get('left', 0)} {icon.get('top', 0)} {width} {height}"
        svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{icon["body"]}</svg>'
        try:
            png = resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, skip_system_fonts=True)
        except ValueError as error:
            log.warning("%s: icon %s cannot be rendered: %s", source.name, name, error)
            continue
        rendered_labels.add(concept.label)
        yield Image.open(io.BytesIO(bytes(png))), _concept_record(source, concept)


def _webp_by_code(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> ImageRecords:
    with tarfile.open(package) as archive:
        for member in archive:
            concept = concepts.find_by_code(Path(member.name).stem) if member.name.endswith(".webp") else None
            stream = archive.extractfile(member)
            if concept is not None and stream is not None:
                yield Image.open(io.BytesIO(stream.read())), _concept_record(source, concept)


def _concept_record(source: Source, concept: Concept) -> Record:
    return _record(source, normalise_name(concept.label), concept.label, concept.kind, concept.tags)


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


def _openclipart(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> ImageRecords:
    root = unpack_debian(package, unpacked) / "usr" / "share" / "openclipart" / "png"
    for folder in OPENCLIPART_FOLDERS:
        for file in sorted((root / folder).rglob("*.png")):
            kind = file.relative_to(root).parts[:-1]
            label = _find_label(file.stem, concepts)
            stem = normalise_name("-".join((*kind, file.stem)))
            yield from _open_image(file, _record(source, stem, label, " ".join(kind[-2:]).replace("_", " ")))


def _find_label(stem: str, concepts: Concepts) -> str:
    """Return the label of the longest prefix of a file name that is a concept; the name ends with the author.

    Returns "" if no prefix is a concept.
    """
    words = re.sub(r"[_\d]+", " ", stem).split()
    for count in range(min(3, len(words)), 0, -1):
        if concept := concepts.by_name.get(normalise_name("".join(words[:count]))):
            return concept.label
    return ""


def _tuxpaint(source: Source, package: Path, unpacked: Path, concepts: Concepts) -> ImageRecords:
    root = unpack_debian(package, unpacked) / "usr" / "share" / "tuxpaint" / "stamps"
    for file in sorted(root.rglob("*.png")):
        kind = file.relative_to(root).parts[:-1]
        folder = "/".join(kind)
        is_drawing = "cartoon" in kind or file.with_suffix(".svg").exists()
        if is_drawing or folder.startswith(TUXPAINT_EXCLUDED) or not kind:
            continue
        record = _record(
            source, normalise_name("-".join((*kind, file.stem))), _description(file), kind[-1].replace("_", " ")
        )
        for image, _ in _open_image(file, record):
            if num_colours(image) >= PHOTOGRAPH_COLOURS:
                yield image, record


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


def _open_image(file: Path, record: Record) -> ImageRecords:
    try:
        image = load_image(file.read_bytes(), LIMITS)
    except MediaError as error:
        log.warning("%s cannot be decoded: %s", file, error)
        return
    yield image, record


READERS: dict[ReaderName, Callable[[Source, Path, Path, Concepts], ImageRecords]] = {
    "iconify": _iconify,
    "webp_by_code": _webp_by_code,
    "openclipart": _openclipart,
    "tuxpaint": _tuxpaint,
}
