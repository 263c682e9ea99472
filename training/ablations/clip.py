"""The vision encoder of the ablation `clip`: a small CLIP Vision Transformer that is trained here on the kinds' images.

It is trained contrastively on images and their captions, as CLIP; the image tower then becomes the model's frozen encoder.
The folder gets the model, and a data folder with this encoder's features of the images in the runs. Both are built once.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from random import Random

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from model.config import VisionConfig
from model.folder import load_folder, save_folder
from model.media import resize
from model.prompt import PromptTokenizer
from model.vision import VisionEncoder, normalise
from training.ablations.data import TEMPLATE, Kinds
from training.contrastive.config import TextConfig
from training.contrastive.towers import MAX_SCALE, ImageTower, TextTower, contrastive_loss
from training.default_data.features import feature_file
from training.default_data.records import write_records
from training.start import with_vision

log = logging.getLogger(__name__)
VISION = VisionConfig(
    architecture="clip_vit",
    image_size=64,
    patch_size=16,
    feature_dim=128,
    num_patches=16,
    num_layers=4,
    num_heads=4,
    ffn_dim=512,
    activation="quick_gelu",
    mean=(0.48145466, 0.4578275, 0.40821073),
    std=(0.26862954, 0.26130258, 0.27577711),
    resize="crop",
)
TEXT = TextConfig(tokenizer="", dim=64, num_layers=2, num_heads=2, ffn_dim=256, max_tokens=32)
JOINT_DIM, TEMPERATURE = 64, 0.07
BATCH, LEARNING_RATE = 64, 1e-3

Squares = Mapping[int, NDArray[np.uint8]]


def build_clip_model(folder: Path, experts: Path, data: Path, kinds: Kinds, steps: int) -> tuple[Path, Path]:
    """Return two folders: a model with the language model of `experts` and a CLIP encoder, and its data."""
    model_folder, data_folder = folder / "model", folder / "data"
    if not (model_folder / "config.json").exists():
        model = load_folder(experts, "cpu", torch.float32)
        squares = read_squares(data, kinds)
        encoder = train_encoder(squares, kinds, PromptTokenizer.load(experts, model.config.prompt), steps)
        save_features(data_folder, kinds, encoder, squares)
        model = with_vision(model, encoder)
        tokenizer = (experts / "tokenizer.json").read_text(encoding="utf-8")
        save_folder(model_folder, model.config, model.state_dict().items(), tokenizer)
    return model_folder, data_folder


def read_squares(data: Path, kinds: Kinds) -> Squares:
    """Return the images of the kinds by row, both those for training and those for queries."""
    rows = {row for groups in (kinds.training_rows, kinds.query_rows) for members in groups.values() for row in members}
    return {row: _square(data / kinds.catalogue.records[row].image) for row in sorted(rows)}


def _square(file: Path) -> NDArray[np.uint8]:
    with Image.open(file) as image:
        return resize(image, VISION)


def train_encoder(squares: Squares, kinds: Kinds, tokenizer: PromptTokenizer, steps: int) -> VisionEncoder:
    """Train both towers on the kinds' training images and captions, and return the frozen image encoder."""
    torch.manual_seed(0)
    image, text = ImageTower(VISION, JOINT_DIM).train(), TextTower(TEXT, len(tokenizer), JOINT_DIM).train()
    log_scale = nn.Parameter(torch.tensor(-math.log(TEMPERATURE)))
    parameters = [*image.parameters(), *text.parameters(), log_scale]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.1)
    rng, loss = Random("0/pairs"), torch.zeros(())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, (step + 1) / 20) * (1.0 - step / steps)
        rows = [rng.choice(kinds.training_rows[rng.choice(kinds.names)]) for _ in range(BATCH)]
        images = image(_pixels(squares, rows))
        texts = text(*_captions(kinds, rows, tokenizer))
        loss = contrastive_loss(images, texts, log_scale.exp().clamp(max=MAX_SCALE), label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    log.info("the CLIP encoder's contrastive loss is %.3f after %d steps", float(loss.detach()), steps)
    return image.vision.requires_grad_(False).eval()


def _pixels(squares: Squares, rows: list[int]) -> Tensor:
    return normalise(torch.from_numpy(np.stack([squares[row] for row in rows])), VISION)


def _captions(kinds: Kinds, rows: list[int], tokenizer: PromptTokenizer) -> tuple[Tensor, Tensor]:
    """Return the captions' token ids [B, T], padded with zeros, and their lengths [B]."""
    records = [kinds.catalogue.records[row] for row in rows]
    texts = [f"{TEMPLATE.prompt} {record.category}, {record.label}" for record in records]
    ids = [torch.tensor(tokenizer.encode_plain(text)[: TEXT.max_tokens]) for text in texts]
    return nn.utils.rnn.pad_sequence(ids, batch_first=True), torch.tensor([len(sequence) for sequence in ids])


@torch.inference_mode()
def save_features(folder: Path, kinds: Kinds, encoder: VisionEncoder, squares: Squares) -> None:
    """Write a data folder with the same records and this encoder's features; rows of other images are zero."""
    folder.mkdir(parents=True, exist_ok=True)
    records = kinds.catalogue.records
    write_records(folder, records)
    shape = (len(records), VISION.num_patches, VISION.feature_dim)
    features = np.lib.format.open_memmap(feature_file(folder, records), "w+", np.float16, shape)
    rows = list(squares)
    for first in range(0, len(rows), BATCH):
        batch = rows[first : first + BATCH]
        features[batch] = encoder(_pixels(squares, batch)).half().numpy()
    features.flush()
