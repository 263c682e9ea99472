"""From a run's configuration to what it reads and how it is scored: a stream for each kind of set, a loss an objective."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from model.config import ConfigError, FlamingoConfig
from model.flamingo import Flamingo
from model.tokenizer import PromptTokenizer
from training.ablations.data import Captions, Kinds, Sequences
from training.bridge import BridgeLoss
from training.config import MADE_SETS, SetConfig, SetKind, TrainConfig
from training.data.stream import ShardStream, find_shards
from training.default.alignment import AlignmentLoss, Alignments, label_ids
from training.default.catalogue import Catalogue
from training.default.discriminants import Discriminants, fit_discriminants
from training.default.episodes import Episodes
from training.default.matching import TextAndMatchingLoss, probe
from training.default.states import one_image
from training.distributed import World
from training.mixture import DataSet, Generated, Mixture, Prepared, Stream, owned


def make_mixture(config: TrainConfig, model: FlamingoConfig, tokenizer: PromptTokenizer, world: World) -> Mixture:
    sets = [_set(one, config.seed, model, tokenizer, world) for one in config.sets]
    return Mixture(sets, config.accumulate)


def _set(config: SetConfig, seed: int, model: FlamingoConfig, tokenizer: PromptTokenizer, world: World) -> DataSet:
    made = config.kind in MADE_SETS
    make = (_made if made else _read)(config, seed, model, tokenizer)
    streams = {index: make(index) for index in owned(config.streams, world.rank, world.size)}
    return DataSet(
        name=config.name, weight=config.weight, streams=streams, per_stream=config.batch_size // config.streams
    )


def _read(config: SetConfig, seed: int, model: FlamingoConfig, tokenizer: PromptTokenizer) -> Callable[[int], Stream]:
    shards = find_shards(config.shards)
    return lambda index: ShardStream(shards, config, tokenizer, model.vision, seed=seed, index=index)


def _made(config: SetConfig, seed: int, model: FlamingoConfig, tokenizer: PromptTokenizer) -> Callable[[int], Stream]:
    folder = Path(config.shards).expanduser()
    catalogue = Catalogue(folder)
    makers: dict[SetKind, Callable[[], Callable[[int], Prepared]]] = {
        "episodes": lambda: Episodes(catalogue, tokenizer, seed, config.batch_size),
        "turned": lambda: Episodes(
            catalogue,
            tokenizer,
            seed,
            config.batch_size,
            fit_discriminants(folder, model.resampler.dim),
            config.strangeness,
            config.noise,
        ),
        "alignment": lambda: Alignments(catalogue, tokenizer, seed),
        "sequences": lambda: Sequences(Kinds(catalogue), tokenizer, seed),
        "captions": lambda: Captions(Kinds(catalogue), tokenizer, seed),
    }
    make = makers[config.kind]()
    return lambda index: Generated(make, index, config.streams)


def loss_of(config: TrainConfig, tokenizer: PromptTokenizer) -> Callable[[Flamingo], BridgeLoss]:
    if config.objective == "text":
        return BridgeLoss
    if shown := [one.name for one in config.sets if one.kind not in MADE_SETS]:
        raise ConfigError(f"objective {config.objective} needs cached features, which {', '.join(shown)} has not")
    prompt, folder = one_image(tokenizer), Path(config.sets[0].shards).expanduser()
    if config.objective == "text_and_matching":
        return lambda model: TextAndMatchingLoss(model, prompt, _discriminants(model, folder), probe(tokenizer))
    if any(one.kind != "alignment" for one in config.sets):
        raise ConfigError("objective alignment learns from sets of kind alignment, and from no others")
    labels = label_ids(sorted(Catalogue(folder).labels), tokenizer)
    return lambda model: AlignmentLoss(model, labels, prompt, _discriminants(model, folder))


def _discriminants(model: Flamingo, folder: Path) -> Discriminants:
    return fit_discriminants(folder, model.config.resampler.dim)
