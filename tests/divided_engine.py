"""An engine on a divided model, whose other ranks follow it in the threads of one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import torch
import torch.distributed as dist

from model.folder import load_folder
from model.inference import InferenceModel, prepare_for_inference
from model.parallel import join
from model.ranks import Rank
from server.engine.caches.media import MediaCache
from server.engine.config import EngineConfig
from server.engine.device.runner import Runner
from server.engine.device.sampler import Sampler
from server.engine.engine import Engine
from server.engine.ranks.follower import Follower
from server.engine.ranks.messages import Followers, decode
from tests.ranks import gloo
from tests.tiny_models import prompt_tokenizer


@contextmanager
def divided_engine(folder: Path, config: EngineConfig, size: int = 2) -> Iterator[tuple[Engine, list[Runner]]]:
    """Give an engine on a divided model, and the runners of the other ranks, which follow it in threads."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    messages = [SimpleQueue[bytes | None]() for _ in range(size - 1)]
    runners: list[Runner] = []

    def load(rank: Rank) -> InferenceModel:
        return prepare_for_inference(join(load_folder(folder, "cpu", torch.float32, rank), gloo(store, rank)))

    def run(number: int) -> None:
        runner = Runner(load(Rank(number, size)), config, Sampler((), ()), MediaCache(config.num_media_slots, 0, b""))
        runners.append(runner)
        follower = Follower(runner)
        while (data := messages[number - 1].get()) is not None:
            follower.follow(decode(data))

    with ThreadPoolExecutor(size) as threads:
        followers = [threads.submit(run, number) for number in range(1, size)]
        leader = threads.submit(load, Rank(0, size)).result()
        sends = Followers([queue.put for queue in messages])
        try:
            yield Engine(leader, prompt_tokenizer(), config, salt=b"test", followers=sends), runners
        finally:
            for queue in messages:
                queue.put(None)
            for follower in followers:
                follower.result()
