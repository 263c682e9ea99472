"""The server on a real socket in this process, in uvicorn, optionally with a real engine of a tiny model."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import Thread

import uvicorn
from fastapi import FastAPI
from pydantic import SecretStr

from model.folder import save_folder
from server.app import create_app
from server.engine_client.client import WorkerClient
from server.engine_client.spare import Spare
from server.media.pool import DecodePool
from server.served_model import ServedModel
from server.settings import Settings
from server.telemetry.metrics import Metrics
from server.wire import ENGINE_FACTORY
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

CONFIG = CONFIGS["openflamingo"]
KEY = "a-key-of-the-tests"
GRACEFUL_SECONDS = 5


@contextmanager
def listening(app: FastAPI) -> Iterator[str]:
    """Serve an application until the block ends, and return its URL."""
    # uvloop cannot start processes in groups of their own; a connection that a client never reads keeps uvicorn open
    config = uvicorn.Config(
        app, host="127.0.0.1", port=0, log_config=None, loop="asyncio", timeout_graceful_shutdown=GRACEFUL_SECONDS
    )
    server = uvicorn.Server(config)
    thread = Thread(target=server.run)
    thread.start()
    try:
        wait_until(lambda: server.started or not thread.is_alive())
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@contextmanager
def tiny_server(folder: Path) -> Iterator[str]:
    """Run the whole server with a tiny model: its worker, its decode pool and its store. All files are in `folder`."""
    model_folder = folder / "tiny"
    save_folder(model_folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    settings = Settings(
        model=str(model_folder),
        data_dir=folder / "data",
        cache_dir=folder / "cache",
        api_key=SecretStr(KEY),
        device="cpu",
        decode_processes=1,
    )
    model, metrics = ServedModel.load(settings), Metrics(CONFIG.name)
    decoder = DecodePool(CONFIG.vision, settings)
    engine = WorkerClient(settings, decoder, metrics, Spare(ENGINE_FACTORY, settings.max_restart_delay))
    with listening(create_app(engine, model, settings, metrics, decoder)) as url:
        wait_until(lambda: engine.state != "starting")
        yield url


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)
