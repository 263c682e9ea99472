"""Builds an engine from settings: the model folder's weights on the device, and caches as large as the settings allow.

The only file of the server that both reads settings and imports torch; the worker calls it by name. The engine is warmed up
before the worker reports that it is ready, so that clients do not wait for compilation.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch

from kernels import backend
from model.config import ConfigError, FlamingoConfig
from model.cpu import FLOAT32, ROUNDED, Format
from model.flamingo import Flamingo
from model.folder import CheckpointError, load_folder
from model.format_memory import FormatMemory, ProcessorTime
from model.inference import prepare_for_inference
from model.prompt import EncodedPrompt
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.engine.graphs import can_be_recorded, record_cuda
from server.served_model import ServedModel
from server.settings import Settings, SettingsError
from server.wire import Generate, Grammar, MediaPixels, MediaWanted, Sampling

MIB = 2**20
WARM_UP_DIGEST = b"warm-up" + bytes(25)
NUM_PROMPT_TOKENS = 48
NUM_NEW_TOKENS = 4
MAX_STEPS = 200

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class Phases:
    """The seconds that each phase of building an engine took."""

    seconds: dict[str, float] = field(default_factory=dict)
    _began: float = field(default_factory=time.monotonic)

    def end(self, name: str) -> None:
        """End a phase and begin the next one."""
        now = time.monotonic()
        self.seconds[name], self._began = round(now - self._began, 3), now


def build(settings: Settings) -> tuple[Engine, dict[str, Any]]:
    """Build the engine. Raises `SettingsError` or `ConfigError` for settings or a model that cannot work."""
    phases = Phases()
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    _select_kernels(settings)
    logger.info("kernels", extra=backend.describe())
    served = ServedModel.load(settings)
    phases.end("tokenizer")
    device = _device(settings)
    dtype = _dtype(settings, device)
    model = _load(Path(settings.model or ""), device, dtype)
    phases.end("weights")
    layer_formats = _layer_formats(settings, served.config, device, dtype)
    memory = FormatMemory.of(settings.cache_folder / "formats", served.config)
    processor_time = ProcessorTime()
    prepared = prepare_for_inference(model, layer_formats, _vision_formats(settings), memory.load())
    memory.save(prepared.formats, is_disturbed=processor_time.is_disturbed(torch.get_num_threads()))
    for shape, best in prepared.formats.items():
        logger.info("weights %s: %s", shape, ", ".join(f"{name} from {rows}" for rows, name in best.items()))
    if all(gated.is_closed for gated in model.gated_layers().values()):
        logger.warning("the gates are closed: the model is not trained yet, and images change no answer")
    phases.end("formats")
    dtype = model.language_model.embed.weight.dtype  # a format may have changed it
    config = engine_config(served, settings, dtype)
    record = record_cuda if device.type == "cuda" and can_be_recorded(served.config) else None
    engine = Engine(prepared, served.tokenizer, config, salt=served.config.to_json().encode(), record=record)
    phases.end("caches")
    # meanwhile the table of tokens is built, which would hold the interpreter's lock during a step
    engine.grammars.compile(Grammar(kind="regex", text="a"))
    warm_up(engine, served.tokenizer.media_token_id, served.config.vision.image_size)
    phases.end("warm-up")
    info = {
        "model": served.config.name,
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "weight_formats": prepared.formats,
        "backend": {name: str(value) for name, value in backend.describe().items()},
        "threads": torch.get_num_threads(),
        "num_blocks": config.num_blocks,
        "block_size": config.block_size,
        "block_bytes": block_bytes(served.config, config.block_size, dtype),
        "num_media_slots": config.num_media_slots,
        "max_model_len": config.max_model_len,
        "load_seconds": round(sum(phases.seconds.values()), 2),
        "load_phases": phases.seconds,
    }
    return engine, info


def _select_kernels(settings: Settings) -> None:
    try:
        backend.select(settings.kernels)
    except backend.BackendError as error:
        raise SettingsError(f"kernels: {error}; auto takes what runs here") from None


def _load(folder: Path, device: torch.device, dtype: torch.dtype) -> Flamingo:
    try:
        return load_folder(folder, device, dtype)
    except (CheckpointError, ConfigError) as error:
        raise SettingsError(f"model: {error}") from None


def _layer_formats(
    settings: Settings, config: FlamingoConfig, device: torch.device, dtype: torch.dtype
) -> tuple[Format, ...]:
    """Return the formats for the decoder's layers on a CPU, none where the weights stay as loaded.

    `weight_format` auto keeps a model's own four bits, and otherwise the dtype.
    """
    if settings.vision_format == "bfloat16" and device.type != "cpu":
        raise SettingsError(f"vision_format: bfloat16 is for a CPU, and the device is {device.type}")
    weight_format = settings.weight_format
    if weight_format == "auto":
        is_q4 = config.language_model.weights == "q4"
        weight_format = "int4" if device.type == "cpu" and settings.dtype == "auto" and is_q4 else "native"
    if weight_format == "native":
        return FLOAT32 if device.type == "cpu" and dtype == torch.float32 else ()
    if device.type != "cpu":
        raise SettingsError(f"weight_format: {weight_format} is for a CPU, and the device is {device.type}")
    return weight_format, "bfloat16"


def _vision_formats(settings: Settings) -> tuple[Format, ...]:
    if settings.vision_format == "auto":
        return FLOAT32 + ROUNDED if settings.dtype == "auto" else FLOAT32
    return FLOAT32 if settings.vision_format == "native" else ROUNDED


def engine_config(served: ServedModel, settings: Settings, dtype: torch.dtype) -> EngineConfig:
    """Return limits with as many blocks and slots as fit. Raises `SettingsError` if the longest request does not fit.

    Each request that shares a prompt computes the rest after its last full block again: expensive on a CPU, where small
    blocks cost nothing; a GPU reads large blocks faster.
    """
    block_size = settings.block_size or (4 if _device(settings).type == "cpu" else 16)
    longest = -(-served.max_model_len // block_size)
    num_blocks = _num_entries("kv_cache_mb", settings.kv_cache_mb, block_bytes(served.config, block_size, dtype))
    if num_blocks < longest:
        raise SettingsError(
            f"kv_cache_mb: {settings.kv_cache_mb} holds {num_blocks} blocks of {block_size} tokens, but one request of "
            f"max_model_len {served.max_model_len} needs {longest}; raise kv_cache_mb or lower max_model_len"
        )
    return EngineConfig(
        block_size=block_size,
        num_blocks=num_blocks,
        num_media_slots=_num_entries("media_cache_mb", settings.media_cache_mb, page_bytes(served.config, dtype)),
        host_media_bytes=settings.host_media_mb * MIB,
        max_sequences=settings.max_num_seqs,
        max_tokens_per_step=settings.max_num_batched_tokens,
        step_seconds=settings.step_time_target,
        max_model_len=served.max_model_len,
    )


def block_bytes(config: FlamingoConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block: keys and values of all layers."""
    lm = config.language_model
    return prod((lm.num_layers, 2, lm.num_kv_heads, block_size, lm.head_dim, dtype.itemsize))


def page_bytes(config: FlamingoConfig, dtype: torch.dtype) -> int:
    """Return the bytes of one media page: keys and values of all gated layers."""
    gated = config.gated
    return prod(
        (len(config.gated_layers), gated.num_heads, 2, config.resampler.num_latents, gated.head_dim, dtype.itemsize)
    )


def _num_entries(setting: str, mebibytes: int, entry_bytes: int) -> int:
    if mebibytes * MIB < entry_bytes:
        raise SettingsError(f"{setting}: {mebibytes} is less than one entry, of {entry_bytes} bytes")
    # tables with more entries cost more than they save
    return min(mebibytes * MIB // entry_bytes, 2**16)


def _device(settings: Settings) -> torch.device:
    if settings.device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if settings.device == "cuda" and not torch.cuda.is_available():
        raise SettingsError("device: torch finds no CUDA device here; cpu and auto are accepted")
    return torch.device(settings.device)


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def warm_up(engine: Engine, media_token_id: int, image_size: int) -> None:
    """Run two requests like any others, while kernels are compiled and libraries choose their algorithms.

    An image is encoded, a prompt is computed and decoded, and a second prompt that shares its beginning is computed while
    the first decodes. The prefix cache is empty afterwards, and the steps are forgotten: they take many times as long as
    later ones. The image keeps its slot until another one needs it.
    """
    length = min(NUM_PROMPT_TOKENS, engine.config.max_model_len - NUM_NEW_TOKENS)
    shape = (1, image_size, image_size, 3)
    pixels = MediaPixels(digest=WARM_UP_DIGEST, shape=shape, data=bytes(image_size * image_size * 3))
    engine.add(_warm_up_request("first", media_token_id, length))
    for step in range(MAX_STEPS):
        if not engine.has_work():
            break
        if step == 2:  # the first request decodes by now
            engine.add(_warm_up_request("second", media_token_id, length))
        for event in engine.step():
            if isinstance(event, MediaWanted):
                engine.supply(pixels)
    engine.blocks.clear_cache()
    engine.scheduler.forget_steps()


def _warm_up_request(name: str, media_token_id: int, length: int) -> Generate:
    """Return a request that differs from the other only in its last token."""
    token_ids = [media_token_id, *[0] * (length - 2), len(name) % 2]
    sampling = Sampling(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    return Generate(
        request_id=f"warm-up-{name}",
        prompt=EncodedPrompt(token_ids=token_ids, media_index=[0] * length, media=[WARM_UP_DIGEST]),
        sampling=sampling,
    )
