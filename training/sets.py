"""Build a run's data streams, one class per kind of set, and its loss, one class per objective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from model.config import ConfigError
from model.flamingo import Flamingo
from model.prompt import PromptTokenizer
from training.ablations.data import Captions, Kinds, Sequences
from training.bridge import BridgeLoss
from training.config import FEATURE_SETS, GENERATED_SETS, SetConfig, SetKind, TrainConfig
from training.data.stream import ShardStream, find_shards
from training.default.alignment import AlignmentLoss, AlignmentPairs, encode_labels
from training.default.catalogue import Catalogue
from training.default.class_images import CatalogueWithClasses
from training.default.discriminants import Discriminants, Domains, fit_discriminants
from training.default.episodes import Episodes
from training.default.matching import TextAndMatchingLoss, probe_sequences
from training.default.states import single_image_prompt
from training.distributed import World
from training.few_shot.clips import NamedClips
from training.few_shot.images import TaughtImages
from training.few_shot.motions import SIZE
from training.forms import FormStream
from training.mixture import DataSet, GeneratedStream, Mixture, PreparedExample, Stream, owned_streams

# they also show artificial images of the encoder's classes
CLASS_SETS = ("episodes", "alignment")


def build_mixture(config: TrainConfig, model: Flamingo, tokenizer: PromptTokenizer, world: World) -> Mixture:
    sets = [_build_set(data_set, config.seed, model, tokenizer, world) for data_set in config.sets]
    return Mixture(sets, config.accumulate)


def _build_set(config: SetConfig, seed: int, model: Flamingo, tokenizer: PromptTokenizer, world: World) -> DataSet:
    is_generated = config.kind in GENERATED_SETS
    stream_at = (_generated_streams if is_generated else _shard_streams)(config, seed, model, tokenizer)
    streams = {index: stream_at(index) for index in _owned_streams(config, world)}
    if config.p_alone:
        name = f"{seed}/{config.name}"
        streams = {i: FormStream(stream, config.p_alone, f"{name}/{i}") for i, stream in streams.items()}
    return DataSet(
        name=config.name, weight=config.weight, streams=streams, per_stream=config.batch_size // config.streams
    )


def _owned_streams(config: SetConfig, world: World) -> range:
    try:
        return owned_streams(config.streams, world.rank, world.size)
    except ValueError as error:
        raise ConfigError(f"set {config.name}: {error}") from None


def _shard_streams(
    config: SetConfig, seed: int, model: Flamingo, tokenizer: PromptTokenizer
) -> Callable[[int], Stream]:
    language_model = model.config.language_model
    if language_model.position == "learned" and config.max_tokens > language_model.max_positions:
        raise ConfigError(
            f"set {config.name}: max_tokens is {config.max_tokens}, must be at most {language_model.max_positions}, the "
            "language model's learned positions (max_positions)"
        )
    shards = find_shards(config.shards)
    return lambda index: ShardStream(shards, config, tokenizer, model.config.vision, seed=seed, index=index)


def _generated_streams(
    config: SetConfig, seed: int, model: Flamingo, tokenizer: PromptTokenizer
) -> Callable[[int], Stream]:
    if config.kind == "named_clips":
        if (side := model.config.vision.image_size) != SIZE:
            raise ConfigError(
                f"set {config.name}: kind named_clips has images of {SIZE} pixels, but the encoder reads {side}"
            )
        clips = NamedClips(tokenizer, seed)
        return lambda index: GeneratedStream(clips, index, config.streams)
    folder = Path(config.shards).expanduser()
    catalogue = CatalogueWithClasses(folder) if config.kind in CLASS_SETS else Catalogue(folder)
    makers: dict[SetKind, Callable[[], Callable[[int], PreparedExample]]] = {
        "episodes": lambda: Episodes(catalogue, tokenizer, seed, config.batch_size),
        "turned": lambda: Episodes(
            catalogue,
            tokenizer,
            seed,
            config.batch_size,
            Domains(_discriminants(model, folder), model.vision.with_kin, config.strangeness, config.noise),
        ),
        "alignment": lambda: AlignmentPairs(catalogue, tokenizer, seed),
        "sequences": lambda: Sequences(Kinds(catalogue), tokenizer, seed),
        "captions": lambda: Captions(Kinds(catalogue), tokenizer, seed),
        "taught_images": lambda: TaughtImages(catalogue, tokenizer, seed),
    }
    make = makers[config.kind]()
    return lambda index: GeneratedStream(make, index, config.streams)


def loss_factory(config: TrainConfig, tokenizer: PromptTokenizer) -> Callable[[Flamingo], BridgeLoss]:
    if config.objective == "text":
        return BridgeLoss
    if without_features := [data_set.name for data_set in config.sets if data_set.kind not in FEATURE_SETS]:
        raise ConfigError(
            f"objective {config.objective} needs sets with cached features, these have none: "
            f"{', '.join(without_features)}"
        )
    prompt, folder = single_image_prompt(tokenizer), Path(config.sets[0].shards).expanduser()
    if config.objective == "text_and_matching":
        return lambda model: TextAndMatchingLoss(
            model, prompt, _discriminants(model, folder), probe_sequences(tokenizer)
        )
    if any(data_set.kind != "alignment" for data_set in config.sets):
        raise ConfigError("objective alignment accepts only sets of kind alignment")
    labels = encode_labels(sorted(CatalogueWithClasses(folder).named), tokenizer)
    return lambda model: AlignmentLoss(model, labels, prompt, _discriminants(model, folder))


def _discriminants(model: Flamingo, folder: Path) -> Discriminants:
    return fit_discriminants(folder, model.config.resampler.dim, model.vision.kin)
