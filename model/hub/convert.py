"""Carry out an import: `python -m model.hub.convert` reads a `Job` as JSON from standard input.

One process at a time imports into a folder; a second process waits and then uses the finished folder. An error is written
to standard output as one line.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import time
from pathlib import Path

import msgspec

from model.cache import begin_import, is_ready, only_import
from model.checkpoint.idefics import import_idefics
from model.checkpoint.openflamingo import import_openflamingo
from model.config import ConfigError
from model.folder import WEIGHTS, CheckpointError, model_files, moved_when_complete
from model.hub.job import SOURCE, Idefics, Job, ModelFolder, OpenFlamingo
from model.likeness import LIKENESS
from model.prior import PRIOR

logger = logging.getLogger("model.hub.convert")  # the module runs as __main__


def convert(job: Job) -> None:
    """Write the job's folder unless it is there. Raises `CheckpointError`, `ConfigError` and `OSError`."""
    folder = Path(job.folder)
    with only_import(folder):
        if not is_ready(folder):
            _write(job, folder)


def _write(job: Job, folder: Path) -> None:
    files = {SOURCE: job.origin.to_json()}
    match job.source:
        case OpenFlamingo() as source:
            import_openflamingo(
                checkpoint=Path(source.checkpoint),
                language_model=Path(source.language_model),
                vision_model=Path(source.vision_model),
                every_n_layers=source.every_n_layers,
                out=folder,
                name=job.name,
                files=files,
            )
        case Idefics() as source:
            import_idefics(Path(source.folder), folder, name=job.name, files=files)
        case ModelFolder() as source:
            _link(Path(source.folder), folder, files)


def _link(source: Path, folder: Path, files: dict[str, str]) -> None:
    """Create a folder with the files of another: as hard links on the same file system, else as copies."""
    weights = model_files(source)
    names = ("config.json", "tokenizer.json", f"{WEIGHTS}.index.json", LIKENESS, PRIOR)
    named = [source / name for name in names]
    with moved_when_complete(folder) as partial:
        for file in (*weights, *(file for file in named if file.is_file())):
            _link_file(file.resolve(), partial / file.name)
        for name, text in files.items():
            (partial / name).write_text(text, encoding="utf-8")


def _link_file(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)


def main() -> int:
    begin_import()
    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    logger.info("importing %s into %s, once", job.name, job.folder)
    began = time.monotonic()
    try:
        convert(job)
    except (CheckpointError, ConfigError, OSError) as error:
        print(error)
        return 1
    logger.info("imported in %.0f s", time.monotonic() - began)
    return 0


if __name__ == "__main__":
    sys.exit(main())
