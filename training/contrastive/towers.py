"""Two towers embed images and texts in one space: mean features and mean token states, projected and normalised.

As in the paper's appendix on the vision encoder and in CLIP, the temperature is learned and the losses of both directions
are added.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model.config import VisionConfig
from model.timm_encoders import feature_map
from model.vision import VisionEncoder
from training.contrastive.config import ContrastiveConfig, ImageConfig, TextConfig

# CLIP's limit: a larger scale makes the logits' range harmful
MAX_SCALE = 100.0


def vision_config(image: ImageConfig) -> VisionConfig:
    """Return the configuration of the frozen encoder that the image tower will become.

    Raises ConfigError for a network that timm does not know, or whose features are not a channels-first map.
    """
    feature_dim, num_patches = feature_map(image.architecture, image.image_size)
    return VisionConfig(
        architecture=image.architecture,
        image_size=image.image_size,
        feature_dim=feature_dim,
        num_patches=num_patches,
        mean=image.mean,
        std=image.std,
        resize=image.resize,
    )


class ImageTower(nn.Module):
    def __init__(self, config: VisionConfig, joint_dim: int) -> None:
        super().__init__()
        self.vision = VisionEncoder(config)
        self.projection = nn.Linear(config.feature_dim, joint_dim, bias=False)

    def forward(self, pixels: Tensor) -> Tensor:  # [B, 3, h, w] -> [B, E]
        return F.normalize(self.projection(self.vision(pixels).mean(1)).float(), dim=-1)

    def train(self, mode: bool = True) -> ImageTower:
        """Set the encoder's own layers to training mode too, only here: batch norms use the batch's statistics."""
        super().train(mode)
        self.vision.encoder.train(mode)
        return self


class TextTower(nn.Module):
    def __init__(self, config: TextConfig, vocab_size: int, joint_dim: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab_size, config.dim)
        self.positions = nn.Embedding(config.max_tokens, config.dim)
        self.norm = nn.LayerNorm(config.dim)
        layer = nn.TransformerEncoderLayer(
            config.dim, config.num_heads, config.ffn_dim, dropout=0.0, activation="gelu", batch_first=True
        )
        self.layers = nn.TransformerEncoder(layer, config.num_layers, enable_nested_tensor=False)
        self.projection = nn.Linear(config.dim, joint_dim, bias=False)
        for table in (self.tokens, self.positions):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, token_ids: Tensor, lengths: Tensor) -> Tensor:  # [B, T], [B] -> [B, E]
        positions = torch.arange(token_ids.shape[1], device=token_ids.device)
        is_text = positions < lengths[:, None]  # [B, T]
        x = self.norm(self.tokens(token_ids) + self.positions(positions))
        x = self.layers(x, src_key_padding_mask=~is_text)
        mean = (x * is_text[..., None]).sum(1) / lengths[:, None]
        return F.normalize(self.projection(mean).float(), dim=-1)


class Towers(nn.Module):
    def __init__(self, config: ContrastiveConfig, vocab_size: int) -> None:
        super().__init__()
        self.image = ImageTower(vision_config(config.image), config.joint_dim)
        self.text = TextTower(config.text, vocab_size, config.joint_dim)
        self.log_scale = nn.Parameter(torch.tensor(-math.log(config.temperature)))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp().clamp(max=MAX_SCALE)


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, label_smoothing: float) -> Tensor:
    """Return the sum of the image-to-text and text-to-image losses of a batch, both embeddings [B, E]."""
    logits = scale * images @ texts.T
    labels = torch.arange(len(images), device=images.device)
    to_text = F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    return to_text + F.cross_entropy(logits.T, labels, label_smoothing=label_smoothing)


def recall(images: Tensor, texts: Tensor) -> tuple[float, float]:
    """Return recall at 1: the shares of images whose nearest text is theirs, and of texts whose nearest image is theirs."""
    scores = images @ texts.T
    labels = torch.arange(len(images), device=images.device)
    to_text, to_image = (float((s.argmax(1) == labels).float().mean()) for s in (scores, scores.T))
    return to_text, to_image
