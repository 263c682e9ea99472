"""Preparation of a loaded model for inference, on every device: one call between `load_folder` and the engine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from model.cpu import FLOAT32, Choices, Format, use_fast_formats
from model.flamingo import Flamingo
from model.media_projection import MediaProjection


@dataclass(frozen=True, slots=True)
class InferenceModel:
    """A model that is prepared for inference, and the projection of its media."""

    flamingo: Flamingo
    project_media: MediaProjection
    formats: Choices  # empty if weights stay as loaded


def prepare_for_inference(
    model: Flamingo,
    layer_formats: Sequence[Format] = (),
    vision_formats: Sequence[Format] = FLOAT32,
    known: Choices | None = None,
) -> InferenceModel:
    """Fold the gates, put matrices into the fastest of the formats, and stack the media projections, all in place.

    The formats, and the choices between them that are `known`, are those of `use_fast_formats`, for a CPU; without formats,
    weights stay as loaded.
    """
    model.fold_gates()
    formats = use_fast_formats(model, layer_formats, vision_formats, known) if layer_formats else {}
    return InferenceModel(model, MediaProjection(model), formats)
