"""Builds an engine from settings: the model folder's weights on the device, and caches as large as the settings allow.

The only file of the server that both reads settings and imports torch; the worker calls it by name. The engine is warmed up
before the worker reports that it is ready, so that clients do not wait for compilation.
"""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kernels import backend
from kernels.launch_files import LaunchFileError, load_launches, shipped_file
from model.config import ConfigError, FlamingoConfig
from model.flamingo import Flamingo
from model.folder import CheckpointError, load_folder
from model.footprint import Footprint, page_bytes, token_bytes
from model.format_memory import FormatMemory, ProcessorTime
from model.inference import InferenceModel, prepare_for_inference
from model.parallel import join
from model.products import FLOAT32, ROUNDED, Format
from model.prompt import EncodedPrompt
from model.quantised import WeightFormat
from model.ranks import ALONE, Rank, rank_config
from server.engine.caches.media import MediaCache
from server.engine.config import DEVICE_LIMITS, EngineConfig
from server.engine.device.graphs import CudaRecorder, can_be_recorded
from server.engine.device.largest_step import measure
from server.engine.device.memory import MIB, CudaMemory, DeviceMemory, Room, check_weights, divide, fixed_caches
from server.engine.device.runner import Runner
from server.engine.device.sampler import Sampler
from server.engine.device.step_threads import StepThreads, schedule_files
from server.engine.device.weight_formats import WeightFormats
from server.engine.engine import Engine
from server.engine.ranks.division import check_division
from server.engine.ranks.group import connect, leading
from server.engine.ranks.messages import NO_FOLLOWERS, Followers
from server.grammar.compiler import Grammars
from server.grammar.trials import Trials
from server.served_model import ServedModel
from server.settings import Settings, SettingsError
from server.wire import Generate, MediaPixels, MediaWanted, Sampling

WARM_UP_DIGEST = b"warm-up" + bytes(25)
NUM_PROMPT_TOKENS = 48
NUM_NEW_TOKENS = 4
MAX_STEPS = 200
# with and without log-probabilities, which are chosen by other loops
WARM_UP_SAMPLING = Sampling(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
PLAIN_SAMPLING = Sampling(max_tokens=NUM_NEW_TOKENS, temperature=0.0, ignore_eos=True)

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
    phases, rank = Phases(), Rank(0, settings.tensor_parallel)
    _set_threads(settings)
    _select_kernels(settings)
    logger.info("kernels", extra=backend.describe())
    served = ServedModel.load(settings)
    phases.end("tokenizer")
    device = _device(settings, rank)
    dtype = _dtype(settings, device)
    launches = _load_launches(settings, device)
    weight_formats = WeightFormats.of(settings, served.config, device, dtype)
    check_division(settings, served.config, device, dtype, weight_formats.packed)
    memory = _device_memory(device, rank)
    if memory is not None:
        footprint = Footprint.of(served.config, dtype, weight_format=weight_formats.packed)
        check_weights(memory, settings.memory_fraction, sum(footprint.weights.values()))
    model, followers = _load_model(settings, served, device, dtype, weight_formats.packed)
    phases.end("weights")
    prepared = _prepare(model, weight_formats.layers, served, settings)
    if all(gated.is_closed for gated in model.gated_layers().values()):
        logger.warning("the gates are closed: the model is not trained yet, and images have no effect on answers")
    phases.end("formats")
    dtype = model.language_model.embed.weight.dtype  # a format may have changed it
    record = _recorder(served.config, device, rank)
    room = None if memory is None else _room(memory, prepared, served, settings, is_recorded=record is not None)
    config = engine_config(served, settings, dtype, room, rank)
    salt = served.config.to_json().encode()
    grammars = Grammars(served.tokenizer, Trials(served.tokenizer))
    threads = _step_threads(device, rank)
    engine = Engine(
        prepared, served.tokenizer, config, salt, record, followers=followers, grammars=grammars, threads=threads
    )
    phases.end("caches")
    # meanwhile the table of tokens is built, which would hold the interpreter's lock during a step
    grammars.build_table()
    logger.info("warming up; loops that are not compiled yet may take minutes")
    warm_up(engine, served.tokenizer.media_token_id, served.config.vision.image_size)
    phases.end("warm-up")
    grammars.start_trials()
    return engine, _describe(engine, phases) | {
        "model": served.config.name,
        "device": str(device),
        "tensor_parallel": rank.size,
        "weight_format": weight_formats.name,
        "weight_formats": prepared.formats,
        "kernel_launches": launches and str(launches),
    }


def _describe(engine: Engine, phases: Phases) -> dict[str, Any]:
    """Return what clients may know about an engine that is built; `build` adds its choices."""
    config, runner = engine.config, engine.runner
    return {
        "dtype": str(runner.dtype).removeprefix("torch."),
        "backend": {name: str(value) for name, value in backend.describe().items()},
        "threads": engine.threads.num_all,
        "num_blocks": config.num_blocks,
        "block_size": config.block_size,
        "block_bytes": runner.block_bytes,
        "num_media_slots": config.num_media_slots,
        "max_model_len": config.max_model_len,
        "load_seconds": round(sum(phases.seconds.values()), 2),
        "load_phases": phases.seconds,
    }


def build_rank(settings: Settings, rank: Rank, store: str) -> Runner:
    """Build the runner of a rank other than rank 0, which has checked the settings."""
    _set_threads(settings)
    _select_kernels(settings)
    served, device = ServedModel.load(settings), _device(settings, rank)
    _load_launches(settings, device)
    dtype = _dtype(settings, device)
    model = join(_load(Path(settings.model or ""), device, dtype, rank), connect(rank, store, device))
    config = engine_config(served, settings, dtype, rank=rank)
    media = MediaCache(config.num_media_slots, 0, b"")
    return Runner(prepare_for_inference(model), config, Sampler((), ()), media)


def _set_threads(settings: Settings) -> None:
    """Set the threads of each rank; without a setting, the ranks on a CPU share torch's default."""
    if settings.num_threads is not None:
        torch.set_num_threads(settings.num_threads)
    elif settings.tensor_parallel > 1:
        torch.set_num_threads(max(1, torch.get_num_threads() // settings.tensor_parallel))


def _step_threads(device: torch.device, rank: Rank) -> StepThreads:
    """Return the threads of the engine's steps; those of a divided model are always the same."""
    return StepThreads(schedule_files) if device.type == "cpu" and rank.size == 1 else StepThreads()


def _select_kernels(settings: Settings) -> None:
    try:
        backend.select(settings.kernels)
    except backend.BackendError as error:
        raise SettingsError(f"kernels: {error}; auto selects a backend that runs here") from None


def _load_launches(settings: Settings, device: torch.device) -> Path | None:
    """Load the measured launches of the settings, or else of the GPU, and return their file; None: those of the table."""
    if device.type != "cuda" or settings.kernels == "reference":
        if settings.kernel_launches is not None:
            reason = "kernels is reference" if device.type == "cuda" else f"the device is {device.type}"
            raise SettingsError(f"kernel_launches: they are for the kernels of a GPU, and {reason}")
        return None
    file = settings.kernel_launches or shipped_file(torch.cuda.get_device_name(device))
    if file is None:
        return None
    try:
        number = load_launches(file)
    except LaunchFileError as error:
        raise SettingsError(f"kernel_launches: {error}") from None
    logger.info("kernel launches: %s has %d for this GPU", file, number)
    return file


def _load_model(
    settings: Settings,
    served: ServedModel,
    device: torch.device,
    dtype: torch.dtype,
    weight_format: WeightFormat | None,
) -> tuple[Flamingo, Followers]:
    """Load the model, or the part of rank 0 while processes of their own load the others."""
    folder, rank = Path(settings.model or ""), Rank(0, settings.tensor_parallel)
    if rank == ALONE:
        return _load(folder, device, dtype, rank, weight_format), NO_FOLLOWERS
    # settings that cannot work are refused before processes are started
    engine_config(served, settings, dtype, rank=rank)
    with leading(settings) as (followers, store):
        model = _load(folder, device, dtype, rank)
        return join(model, connect(rank, store, device)), followers


def _load(
    folder: Path, device: torch.device, dtype: torch.dtype, rank: Rank, weight_format: WeightFormat | None = None
) -> Flamingo:
    try:
        return load_folder(folder, device, dtype, rank, weight_format)
    except (CheckpointError, ConfigError) as error:
        raise SettingsError(f"model: {error}") from None


def _prepare(
    model: Flamingo, layer_formats: tuple[Format, ...], served: ServedModel, settings: Settings
) -> InferenceModel:
    """Convert the weights to their fastest formats: those of an earlier start, or else measured ones, which are stored."""
    known_formats = FormatMemory.of(settings.cache_folder / "formats", served.config)
    if not (known := known_formats.load()):
        logger.info("the first start on this machine measures the formats of the weights, which may take minutes")
    processor_time = ProcessorTime()
    prepared = prepare_for_inference(model, layer_formats, _vision_formats(settings), known)
    known_formats.save(prepared.formats, is_disturbed=processor_time.is_disturbed(torch.get_num_threads()))
    for shape, best in prepared.formats.items():
        logger.debug("weights %s: %s", shape, ", ".join(f"{name} from {rows}" for rows, name in best.items()))
    return prepared


def _recorder(config: FlamingoConfig, device: torch.device, rank: Rank) -> CudaRecorder | None:
    """Return what records decode steps; None where they cannot be: torch's operators read tables on the host."""
    is_able = device.type == "cuda" and backend.runs_triton() and rank == ALONE
    return CudaRecorder() if is_able and can_be_recorded(config) else None


def _vision_formats(settings: Settings) -> tuple[Format, ...]:
    if settings.vision_format == "auto":
        # without arithmetic in bfloat16, rounding would gain nothing
        return FLOAT32 + ROUNDED if settings.dtype == "auto" and backend.has_bfloat16() else FLOAT32
    return FLOAT32 if settings.vision_format == "native" else ROUNDED


def engine_limits(served: ServedModel, settings: Settings) -> EngineConfig:
    """Return the limits of the settings, or else of the device, with blocks for one request of max_model_len."""
    defaults = DEVICE_LIMITS[_device(settings).type]
    block_size = settings.block_size or defaults.block_size
    return replace(
        defaults,
        block_size=block_size,
        num_blocks=-(-served.max_model_len // block_size),
        host_media_bytes=settings.host_media_mb * MIB,
        max_sequences=settings.max_num_seqs or defaults.max_sequences,
        max_tokens_per_step=settings.max_num_batched_tokens or defaults.max_tokens_per_step,
        step_seconds=settings.step_time_target,
        speculative_tokens=settings.speculative_tokens,
        reports_encoding=settings.otlp_endpoint is not None,
        max_model_len=served.max_model_len,
    )


def engine_config(
    served: ServedModel, settings: Settings, dtype: torch.dtype, room: Room | None = None, rank: Rank = ALONE
) -> EngineConfig:
    """Return limits with as many blocks and slots as fit: into `room`, or without it into caches of fixed sizes.

    The memory for caches is that of each rank.
    Raises `SettingsError` if the longest request does not fit.
    """
    limits = engine_limits(served, settings)
    block_size, longest = limits.block_size, limits.num_blocks
    divided = rank_config(served.config, rank)
    block, page = block_bytes(divided, block_size, dtype), page_bytes(divided, dtype)
    caches = fixed_caches(settings) if room is None else divide(room, settings, longest * block, page)
    num_blocks = _num_entries("kv_cache_mb", caches.text, block)
    if num_blocks < longest:
        raise SettingsError(
            f"kv_cache_mb: {caches.text // MIB} holds {num_blocks} blocks of {block_size} tokens, but one request of "
            f"max_model_len {served.max_model_len} needs {longest}; raise kv_cache_mb or lower max_model_len"
        )
    return replace(limits, num_blocks=num_blocks, num_media_slots=_num_entries("media_cache_mb", caches.media, page))


def block_bytes(config: FlamingoConfig, block_size: int, dtype: torch.dtype) -> int:
    """Return the bytes of one block: keys and values of all layers."""
    return block_size * token_bytes(config, dtype)


def _num_entries(setting: str, num_bytes: int, entry_bytes: int) -> int:
    if num_bytes < entry_bytes:
        raise SettingsError(f"{setting}: {num_bytes // MIB} is less than one entry, of {entry_bytes} bytes")
    # a cache of more entries costs more time than it saves
    return min(num_bytes // entry_bytes, 2**16)


def _room(
    memory: DeviceMemory, model: InferenceModel, served: ServedModel, settings: Settings, *, is_recorded: bool
) -> Room:
    limits = engine_limits(served, settings)
    room = measure(memory, settings.memory_fraction, model, served.tokenizer, limits, is_recorded=is_recorded)
    logger.info("memory: %s", room)
    return room


def _device_memory(device: torch.device, rank: Rank) -> DeviceMemory | None:
    """Return the memory whose free part the caches fill; None where they have fixed sizes: on a CPU, and if divided."""
    return CudaMemory(device) if device.type == "cuda" and rank == ALONE else None


def _device(settings: Settings, rank: Rank = ALONE) -> torch.device:
    """Return the device of a rank, and make it the default one."""
    if settings.device == "cpu" or (settings.device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise SettingsError("device: torch finds no CUDA device here; cpu and auto are accepted")
    if rank == ALONE:
        return torch.device("cuda")
    if rank.size > (count := torch.cuda.device_count()):
        raise SettingsError(f"tensor_parallel: {rank.size} needs as many CUDA devices, and torch finds {count} here")
    torch.cuda.set_device(rank.number)
    return torch.device("cuda", rank.number)


def _dtype(settings: Settings, device: torch.device) -> torch.dtype:
    if settings.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return getattr(torch, settings.dtype)


def warm_up(engine: Engine, media_token_id: int, image_size: int) -> None:
    """Compile the loops of attention, and run two requests like any others, while libraries choose their algorithms.

    An image is encoded, a prompt is computed and decoded, and a second prompt that shares its beginning is computed while
    the first decodes. If keys have offsets, a third one has a shot that attends alone. The prefix cache is empty
    afterwards, and the steps are forgotten: they take many times as long as later ones. The image keeps its slot until
    another one needs it.
    """
    engine.runner.compile_kernels()
    length = min(NUM_PROMPT_TOKENS, engine.config.max_model_len - NUM_NEW_TOKENS)
    shape = (1, image_size, image_size, 3)
    pixels = MediaPixels(digest=WARM_UP_DIGEST, shape=shape, data=bytes(image_size * image_size * 3))
    engine.add(_warm_up_request("first", media_token_id, length, WARM_UP_SAMPLING))
    for step in range(MAX_STEPS):
        if not engine.has_work():
            break
        if step == 2:  # the first request decodes by now
            engine.add(_warm_up_request("second", media_token_id, length, PLAIN_SAMPLING))
            if engine.runner.model.config.language_model.has_key_offsets:
                engine.add(_warm_up_shots(media_token_id, length))
        for event in engine.step():
            if isinstance(event, MediaWanted):
                engine.supply(pixels)
    engine.blocks.clear_cache()
    engine.scheduler.pace.forget()


def _warm_up_request(name: str, media_token_id: int, length: int, sampling: Sampling) -> Generate:
    """Return a request that differs from the other only in its last token."""
    token_ids = [media_token_id, *[0] * (length - 2), len(name) % 2]
    prompt = EncodedPrompt(token_ids=token_ids, media_index=[0] * length, media=[WARM_UP_DIGEST])
    return Generate(request_id=f"warm-up-{name}", prompt=prompt, sampling=sampling)


def _warm_up_shots(media_token_id: int, length: int) -> Generate:
    """Return a request with two shots of two tokens that attend alone; the query sees the second one with an offset."""
    shot, media = [media_token_id, 0], [WARM_UP_DIGEST] * 3
    query = [media_token_id, *[0] * max(length - 5, 0)]
    prompt = EncodedPrompt(
        token_ids=[*shot, *shot, *query],
        media_index=[0, 0, 1, 1, *[2] * len(query)],
        media=media,
        shots_attend="alone",
    )
    return Generate(request_id="warm-up-shots", prompt=prompt, sampling=WARM_UP_SAMPLING)
