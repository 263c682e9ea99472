"""The two frozen experts of a model, read from folders of any supported form. A bridge joins them.

A language model comes with its tokenizer, to which the bridge's tokens are appended. The rows of these tokens in the token
tables belong to the bridge; an expert has only the rows that were trained with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer
from torch import Tensor, nn

from model.checkpoint.files import FolderTokenizer, open_folder, read_tokenizer
from model.checkpoint.gguf import GGUFFile
from model.checkpoint.language_models import Family, convert_language_model, family_of, language_model_config
from model.checkpoint.layout import OPEN_CLIP_CONFIG
from model.checkpoint.timm_models import load_timm_folder
from model.checkpoint.vision_models import load_clip_folder
from model.config import LanguageModelConfig, PromptConfig, VisionConfig, load_config
from model.folder import (
    CheckpointError,
    SafetensorsFiles,
    check_shapes,
    load_vision_folder,
    model_files,
    read_json,
    shapes_of,
)
from model.language_model import LanguageModel
from model.prompt import open_tokenizer
from model.vision import VisionEncoder

MEDIA, END_OF_CHUNK = "<image>", "<|endofchunk|>"
LANGUAGE_MODEL, VISION, NEW_ROWS = "language_model.", "vision.", ".new_rows"


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageExpert:
    """A decoder's tensors under our full names, without rows of new tokens; its tokenizer has the new tokens."""

    config: LanguageModelConfig
    tensors: dict[str, Tensor]
    tokenizer: Tokenizer
    prompt: PromptConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class VisionExpert:
    """A vision encoder's tensors under our full names."""

    config: VisionConfig
    tensors: dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class HuggingFaceDecoder:
    """A published language model, with its tensors under the names of its library, and its tokenizer."""

    path: Path
    settings: dict[str, Any]
    family: Family
    tokenizer: FolderTokenizer
    tensors: dict[str, Tensor]

    @classmethod
    def open(cls, path: Path) -> HuggingFaceDecoder:
        settings = read_json(path / "config.json")
        tokenizer, family = read_tokenizer(path, settings), family_of(settings)
        return cls(path, settings, family, tokenizer, family.full_names(open_folder(path)))

    @property
    def tables(self) -> tuple[str, ...]:
        """The token tables: embeddings, and the head unless it is tied to them."""
        return ("embed",) if language_model_config(self.settings).tied_head else ("embed", "head")

    def table(self, name: str) -> Tensor:
        if (full := self.family.table(name)) not in self.tensors:
            raise CheckpointError(f"{self.path} has no tensor {full}")
        return self.tensors[full]

    def convert(self, tables: Mapping[str, Tensor], prompt: PromptConfig) -> LanguageExpert:
        """Convert the decoder with these token tables; tokens of the tokenizer that have no row in them are new."""
        num_rows = len(tables["embed"])
        settings = {**self.settings, "vocab_size": num_rows, **_expansion(self.tensors)}
        tensors = self.tensors | {self.family.table(name): rows for name, rows in tables.items()}
        config = language_model_config(settings)
        return LanguageExpert(
            config=replace(config, num_new_tokens=len(self.tokenizer) - num_rows),
            tensors={f"{LANGUAGE_MODEL}{n}": tensor for n, tensor in convert_language_model(settings, tensors).items()},
            tokenizer=self.tokenizer.tokenizer,
            prompt=prompt,
        )


def _expansion(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Return the width of MPT's feed-forward from its tensors.

    In transformers it is 4 times the model's width, whatever `expansion_ratio` is; MosaicML's code follows that field.
    """
    up = tensors.get("transformer.blocks.0.ffn.up_proj.weight")
    return {} if up is None else {"expansion_ratio": up.shape[0] // up.shape[1]}


def prompt_config(tokenizer: FolderTokenizer, never: Iterable[str] = ()) -> PromptConfig:
    """Return a prompt configuration with OpenFlamingo's markers; tokens of `never` that exist are not sampled."""
    suppressed = dict.fromkeys((MEDIA, *never, tokenizer.pad_alone))
    return PromptConfig(
        media_token=MEDIA,
        begin=tokenizer.begin,
        end_of_chunk=END_OF_CHUNK,
        eos=tuple(token for token in (END_OF_CHUNK, tokenizer.eos) if token),
        suppressed=tuple(token for token in suppressed if tokenizer.knows(token)),
    )


def open_language_expert(path: Path) -> LanguageExpert:
    """Read a decoder of transformers, of a model folder, or of a GGUF file. Raises `CheckpointError` and `ConfigError`."""
    if path.is_file():
        expert = _gguf_decoder(GGUFFile(path))
    elif "format_version" in read_json(path / "config.json"):
        expert = _decoder_of_model_folder(path)
    else:
        expert = _hugging_face_decoder(path)
    ids = expert.tokenizer.get_vocab(with_added_tokens=True).values()
    if max(ids) >= expert.config.num_token_ids or len(set(ids)) < len(ids):
        raise CheckpointError(
            f"{path}: the tokenizer's {len(ids)} tokens must have different ids below the model's "
            f"{expert.config.num_token_ids} rows, but they have {len(set(ids))} ids up to {max(ids)}"
        )
    return expert


def _hugging_face_decoder(folder: Path) -> LanguageExpert:
    decoder = HuggingFaceDecoder.open(folder)
    # tables may be padded, or may lack rows of tokens that were added only to the tokenizer
    num_rows = min(len(decoder.tokenizer), *(len(decoder.table(name)) for name in decoder.tables))
    decoder.tokenizer.add([END_OF_CHUNK, MEDIA])
    tables = {name: decoder.table(name)[:num_rows] for name in decoder.tables}
    return decoder.convert(tables, prompt_config(decoder.tokenizer))


def _gguf_decoder(file: GGUFFile) -> LanguageExpert:
    config, tokenizer = file.config(), file.folder_tokenizer()
    tokenizer.add([END_OF_CHUNK, MEDIA])
    return LanguageExpert(
        config=replace(config, num_new_tokens=len(tokenizer) - config.vocab_size),
        tensors={f"{LANGUAGE_MODEL}{name}": tensor for name, tensor in file.tensors().items()},
        tokenizer=tokenizer.tokenizer,
        prompt=prompt_config(tokenizer),
    )


def _decoder_of_model_folder(folder: Path) -> LanguageExpert:
    """Read the decoder of a model folder with its prompt's markers; a prompt without an end of chunk gets one."""
    model = load_config(folder)
    config, prompt, tokenizer = model.language_model, model.prompt, open_tokenizer(folder / "tokenizer.json")
    tensors = _read_part(folder, LANGUAGE_MODEL, LanguageModel, config)
    if not prompt.end_of_chunk:
        num_added = tokenizer.add_special_tokens([AddedToken(END_OF_CHUNK, special=True, normalized=False)])
        config = replace(config, num_new_tokens=config.num_new_tokens + num_added)
        prompt = replace(prompt, end_of_chunk=END_OF_CHUNK, eos=(END_OF_CHUNK, *prompt.eos))
    return LanguageExpert(config=config, tensors=tensors, tokenizer=tokenizer, prompt=prompt)


def open_vision_expert(folder: Path) -> VisionExpert:
    """Read an encoder of any supported form. Raises `CheckpointError` and `ConfigError`.

    It is CLIP from transformers or open_clip, a convolutional network of timm, an encoder that `training.contrastive`
    wrote, or that of a model folder.
    """
    settings = {} if (folder / OPEN_CLIP_CONFIG).is_file() else read_json(folder / "config.json")
    if "format_version" in settings:
        config = load_config(folder).vision
        return VisionExpert(config=config, tensors=_read_part(folder, VISION, VisionEncoder, config))
    if "num_patches" in settings:
        encoder = load_vision_folder(folder)
        config, tensors = encoder.config, encoder.state_dict()
    elif "architecture" in settings:
        config, tensors = load_timm_folder(folder)
    else:
        config, tensors = load_clip_folder(folder)
    return VisionExpert(config=config, tensors={f"{VISION}{name}": tensor for name, tensor in tensors.items()})


def _read_part(folder: Path, prefix: str, part: type[nn.Module], config: Any) -> dict[str, Tensor]:
    """Read the tensors of one part of a model folder, without rows of new tokens, under their full names."""
    stored = SafetensorsFiles(model_files(folder))
    names = [name for name in stored if name.startswith(prefix) and not name.endswith(NEW_ROWS)]
    with torch.device("meta"):
        shapes = shapes_of(part(config).state_dict())
    expected = {f"{prefix}{name}": shape for name, shape in shapes.items() if not name.endswith(NEW_ROWS)}
    check_shapes(str(folder), expected, {name: stored.shape(name) for name in names})
    return {name: stored[name] for name in names}
