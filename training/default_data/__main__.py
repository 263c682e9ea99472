"""Build the default model's images and cache its encoder's features of them.

`python -m training.default_data [--folder DIR]` continues where an earlier call stopped.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from model.zoo.default import expert_files, prepare
from training.default_data.build import build
from training.default_data.classes import extract_classes
from training.default_data.features import cache_features
from training.default_data.records import DEFAULT_FOLDER


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.default_data", description=__doc__)
    parser.add_argument(
        "--folder", type=Path, default=DEFAULT_FOLDER, help=f"the data folder (default: {DEFAULT_FOLDER})"
    )
    parser.add_argument("--threads", type=int, default=1, help="threads of the encoder (default: 1)")
    parser.add_argument("--images-only", action="store_true", help="build the images without their features")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    records = build(options.folder)
    if not options.images_only:
        cache_features(options.folder, records, prepare(), options.threads)
        extract_classes(options.folder, expert_files().vision)


if __name__ == "__main__":
    main()
