"""Build a folder of images, their records and a data card from all sources; sources already built are not rebuilt.

Images are padded to squares with white, as the default model's `resize` does, and stored as WebP.
"""

from __future__ import annotations

import logging
from pathlib import Path

from PIL import Image

from training.default_data.card import write_card
from training.default_data.concepts import Concepts
from training.default_data.packages import fetch
from training.default_data.readers import SIZE, read
from training.default_data.records import DATA, Record, read_records, with_digests, write_records
from training.default_data.sources import EMOJIBASE, SOURCES, Source

log = logging.getLogger(__name__)


def build(folder: Path) -> list[Record]:
    packages = folder / "packages"
    concepts = Concepts(fetch(EMOJIBASE, packages))
    records = [record for source in SOURCES for record in _build_source(source, folder, concepts)]
    records = with_digests(records, folder)
    write_records(folder, records)
    write_card(folder, records)
    return records


def _build_source(source: Source, folder: Path, concepts: Concepts) -> list[Record]:
    done = folder / "sources" / f"{source.name}-{source.version.replace(':', '_')}"
    if (done / DATA).exists():
        return read_records(done)
    package, unpacked = fetch(source, folder / "packages"), folder / "unpacked" / source.name
    records = []
    for image, record in read(source, package, unpacked, concepts):
        _save(image, folder / record.image)
        records.append(record)
    done.mkdir(parents=True, exist_ok=True)
    write_records(done, records)
    log.info("%s: %d images", source.name, len(records))
    return records


def _save(image: Image.Image, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    content = image.convert("RGBA")
    content.thumbnail((SIZE, SIZE), Image.Resampling.BICUBIC)
    square = Image.new("RGB", (SIZE, SIZE), "white")
    square.paste(content, ((SIZE - content.width) // 2, (SIZE - content.height) // 2), content)
    square.save(file, "WEBP", quality=92, method=2)
