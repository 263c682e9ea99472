"""The published encoders of the checkpoint families and of the default model, as their importers configure them."""

from __future__ import annotations

from dataclasses import replace

from model.checkpoint.vision_models import CLIP_MEAN, CLIP_STD
from model.config import KinConfig, VisionConfig
from model.zoo.default import DEFAULT

# OpenAI's ViT-L/14 in OpenFlamingo: patches alone
OPENAI_VIT_L_14 = VisionConfig(
    architecture="clip_vit",
    image_size=224,
    feature_dim=1024,
    num_patches=256,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    resize="crop",
    patch_size=14,
    num_layers=24,
    num_heads=16,
    ffn_dim=4096,
    activation="quick_gelu",
)

# LAION's ViT-H/14 in IDEFICS: the class token is a feature too
LAION_VIT_H_14 = VisionConfig(
    architecture="clip_vit",
    image_size=224,
    feature_dim=1280,
    num_patches=257,
    mean=CLIP_MEAN,
    std=CLIP_STD,
    resize="squash",
    patch_size=14,
    num_layers=32,
    num_heads=16,
    ffn_dim=5120,
    activation="gelu",
    keep_class_token=True,
)

# the encoder of the default model: the network alone, without kin
EFFICIENTNET_LITE0 = replace(DEFAULT.vision, kin=KinConfig())

TINY_CLIP = VisionConfig(
    architecture="clip_vit",
    image_size=28,
    feature_dim=24,
    num_patches=4,
    mean=(0.5, 0.5, 0.5),
    std=(0.5, 0.5, 0.5),
    resize="crop",
    patch_size=14,
    num_layers=2,
    num_heads=2,
    ffn_dim=50,
    activation="quick_gelu",
)
