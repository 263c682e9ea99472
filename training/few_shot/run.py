"""One run of a bridge on sequences of images or of clips; its result is a JSON file."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from model.config import ResamplerConfig
from model.flamingo import Flamingo
from model.folder import load_folder
from model.prompt import PromptTokenizer
from model.vision import VisionEncoder
from model.zoo.default import prepare
from training.ablations.run import build_trainer, read_gates
from training.config import AblateConfig, TrainConfig, parse_config, read_mapping
from training.default.catalogue import Catalogue
from training.few_shot import clips, images
from training.few_shot.episode import answer
from training.few_shot.language import build_model
from training.few_shot.motions import FAMILIES
from training.stored_runs import config_settings, read_run, working_folder
from training.trainer import run

log = logging.getLogger(__name__)
FOLDER = Path(__file__).parent
RUNS = FOLDER / "runs"
CLIP_SHOTS = (4,)

Results = Mapping[str, Mapping[int, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """The size of all runs of a subject."""

    steps: int
    pretrain_steps: int
    queries: int = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A bridge to train, by the name of its runs; its YAML file is named after the medium (images or clips)."""

    medium: str
    ablate: AblateConfig
    scale: Scale

    def config(self) -> TrainConfig:
        return replace(parse_config(read_mapping(FOLDER / f"{self.medium}.yaml")), ablate=self.ablate)


# the decoder compares names only after thousands of steps
IMAGES = Scale(steps=1500, pretrain_steps=6000)
SUBJECTS: Mapping[str, Subject] = {
    "images": Subject(medium="images", ablate=AblateConfig(), scale=IMAGES),
    "images-all-previous": Subject(medium="images", ablate=AblateConfig(attends="all_previous"), scale=IMAGES),
    "clips": Subject(medium="clips", ablate=AblateConfig(), scale=Scale(steps=900, pretrain_steps=300, queries=150)),
}


def run_file(runs: Path, name: str, seed: int) -> Path:
    return runs / f"{name}-{seed}.json"


def run_settings(subject: Subject, scale: Scale, seed: int) -> dict[str, Any]:
    """Return everything that determines the result of a run, without the paths of this machine."""
    config = config_settings(replace(subject.config(), steps=scale.steps, seed=seed))
    return {"medium": subject.medium, **asdict(scale), "config": config}


def read_results(folder: Path, seeds: Sequence[int], scales: Mapping[str, Scale]) -> Results:
    """Return the finished runs by subject and seed."""
    results: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in scales}
    for name, scale in scales.items():
        for seed in seeds:
            result = read_run(run_file(folder, name, seed), run_settings(SUBJECTS[name], scale, seed))
            if result is not None:
                results[name][seed] = result
    return results


def run_subject(name: str, scale: Scale, seed: int, data: Path, experts: Path, out: Path) -> dict[str, Any]:
    """Train, export, load the export and evaluate it; `experts` is the folder of the models from which runs start."""
    subject = SUBJECTS[name]
    folder = working_folder(out, f"{name}-{seed}", run_settings(subject, scale, seed))
    model = build_experts(subject.medium, experts, data, scale.pretrain_steps)
    config = subject.config()
    config = replace(
        config,
        model=str(model),
        out=str(folder),
        steps=scale.steps,
        seed=seed,
        discriminants=str(data) if config.discriminants else "",
        sets=tuple(replace(data_set, shards=str(data)) for data_set in config.sets),
    )
    trainer, tokenizer = build_trainer(config)
    run(trainer, model / "tokenizer.json")
    exported = load_folder(folder / "model", "cpu", torch.float32)
    ask = ask_images if subject.medium == "images" else ask_clips
    return {
        "steps": scale.steps,
        "correct": ask(exported, tokenizer, scale.queries, seed, data),
        "gates": read_gates(folder / "log.jsonl"),
    }


def build_experts(medium: str, experts: Path, data: Path, steps: int) -> Path:
    """Return the folder of the model from which runs of a medium start, and build it first if it does not exist."""
    folder = experts / medium
    if medium == "clips":
        torch.manual_seed(0)
        encoder = VisionEncoder(clips.VISION).state_dict()
        build_model(folder, clips.VISION, _clip_resampler, encoder, steps)
    elif not (folder / "config.json").exists():
        vision = load_folder(prepare(), "cpu", torch.float32).vision
        build_model(folder, vision.config, _image_resampler, vision.state_dict(), steps)
    return folder


def _image_resampler(small: ResamplerConfig) -> ResamplerConfig:
    return replace(small, dim=128, num_heads=2, head_dim=64, ffn_dim=256, num_latents=4)


def _clip_resampler(small: ResamplerConfig) -> ResamplerConfig:
    sizes = replace(small, dim=64, num_layers=2, num_heads=4, head_dim=16, ffn_dim=256, num_latents=8)
    return replace(sizes, num_frames=clips.TRAINED_FRAMES, num_spatial=clips.VISION.num_patches)


def ask_images(model: Flamingo, tokenizer: PromptTokenizer, count: int, seed: int, data: Path) -> dict[str, str]:
    """Return the answers by number of shots, one digit per query."""
    catalogue = Catalogue(data)
    return {
        str(num_shots): answer(model, images.draw_questions(catalogue, tokenizer, count, seed, num_shots))
        for num_shots in images.SHOTS
    }


def ask_clips(
    model: Flamingo, tokenizer: PromptTokenizer, count: int, seed: int, data: Path
) -> dict[str, dict[str, str]]:
    """Return the answers by family, and by frames and shots."""
    return {
        family: {
            f"{condition}, {num_shots} shots": answer(
                model, clips.draw_questions(tokenizer, family, sampler, count, seed, num_shots)
            )
            for condition, sampler in clips.CONDITIONS.items()
            for num_shots in CLIP_SHOTS
        }
        for family in FAMILIES
    }
