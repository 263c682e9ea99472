"""Loads a model for an evaluation in process, with its tokenizer, as a server computes it: the gates are folded."""

from __future__ import annotations

from pathlib import Path

import torch

from model.flamingo import Flamingo
from model.folder import load_folder
from model.prompt import PromptTokenizer
from model.quantised import WeightFormat


def load_served(
    folder: Path, dtype: str, weight_format: WeightFormat | None = None
) -> tuple[Flamingo, PromptTokenizer]:
    """Return the model of a folder and its tokenizer; `weight_format` is the one in which a GPU would keep the weights."""
    model = load_folder(folder, "cpu", getattr(torch, dtype), weight_format=weight_format)
    model.fold_gates()
    return model, PromptTokenizer.load(folder, model.config.prompt)
