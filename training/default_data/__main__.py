"""`python -m training.default_data [--folder DIR]`: make the default model's images and what its encoder makes of them."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from model.zoo.config import VISION_FILE
from model.zoo.default import find, prepare
from training.default_data.build import build
from training.default_data.classes import keep_classes
from training.default_data.features import cache_features

FOLDER = Path.home() / ".cache" / "flamboyance" / "default-data"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m training.default_data", description=__doc__)
    parser.add_argument("--folder", type=Path, default=FOLDER, help=f"where the data goes (default: {FOLDER})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--images-only", action="store_true", help="build the images, leave the features")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    records = build(options.folder)
    if not options.images_only:
        cache_features(options.folder, records, prepare(), options.threads)
        keep_classes(options.folder, find(VISION_FILE))


if __name__ == "__main__":
    main()
