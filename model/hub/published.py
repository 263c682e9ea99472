"""The published models that are known by name.

A repository of OpenFlamingo has only the trained parts, in its `checkpoint.pt`. The frozen experts and the interval of the
gated layers are those of the project's table of released models. All of them read images with OpenAI's CLIP ViT-L/14.
`openai/clip-vit-large-patch14` has these weights as safetensors, and its configuration implies the activation that they
were trained with, QuickGELU; the name of an open_clip model alone does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

CLIP_VIT_L_14 = "openai/clip-vit-large-patch14"


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """The frozen models of an OpenFlamingo checkpoint, by their repositories, and the interval of its gated layers."""

    # "": it cannot be downloaded
    language_model: str
    every_n_layers: int
    vision_model: str = CLIP_VIT_L_14


OPENFLAMINGO: Mapping[str, Experts] = MappingProxyType(
    {
        "openflamingo/OpenFlamingo-3B-vitl-mpt1b": Experts(
            language_model="anas-awadalla/mpt-1b-redpajama-200b", every_n_layers=1
        ),
        "openflamingo/OpenFlamingo-3B-vitl-mpt1b-langinstruct": Experts(
            language_model="anas-awadalla/mpt-1b-redpajama-200b-dolly", every_n_layers=1
        ),
        "openflamingo/OpenFlamingo-4B-vitl-rpj3b": Experts(
            language_model="togethercomputer/RedPajama-INCITE-Base-3B-v1", every_n_layers=2
        ),
        "openflamingo/OpenFlamingo-4B-vitl-rpj3b-langinstruct": Experts(
            language_model="togethercomputer/RedPajama-INCITE-Instruct-3B-v1", every_n_layers=2
        ),
        "openflamingo/OpenFlamingo-9B-vitl-mpt7b": Experts(language_model="anas-awadalla/mpt-7b", every_n_layers=4),
        # the first release, with LLaMA-7B, which Meta gave only to applicants; the repository was renamed
        "openflamingo/OpenFlamingo-9B": Experts(language_model="", every_n_layers=4),
        "openflamingo/OpenFlamingo-9B-deprecated": Experts(language_model="", every_n_layers=4),
    }
)
IDEFICS = (
    "HuggingFaceM4/idefics-9b",
    "HuggingFaceM4/idefics-9b-instruct",
    "HuggingFaceM4/idefics-80b",
    "HuggingFaceM4/idefics-80b-instruct",
)


def experts_of_folder(folder: Path) -> Experts | None:
    """Return the experts of a downloaded repository by its folder's name, or by its path in huggingface_hub's cache."""
    for repository, experts in OPENFLAMINGO.items():
        if folder.name == repository.partition("/")[2] or f"models--{repository.replace('/', '--')}" in folder.parts:
            return experts
    return None


def supported() -> str:
    """Return one sentence that lists the models that can be served by name."""
    downloadable = [name for name, experts in OPENFLAMINGO.items() if experts.language_model]
    return (
        f"Supported are OpenFlamingo ({', '.join(downloadable)}), the first IDEFICS ({', '.join(IDEFICS)}), "
        "and model folders of this server"
    )
