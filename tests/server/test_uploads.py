"""A server that is killed during uploads keeps all acknowledged files, and no incomplete ones."""

from __future__ import annotations

import random
import threading
import time
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from server.media.source import encoded
from server.media.store import MediaStore
from tests.server.test_main import Server, running

UPLOADERS, ROUNDS = 4, 3


def noise(seed: int, file: Path) -> bytes:
    """Return an image of about 300 kilobytes, different for each seed."""
    pixels = np.random.default_rng(seed).integers(0, 256, (300, 350, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(file, "PNG")
    return file.read_bytes()


def upload_until_killed(server: Server, first: int, folder: Path, acknowledged: dict[str, bytes]) -> None:
    with httpx.Client(base_url=server.http.base_url, timeout=60) as http:
        for seed in range(first, first + 10_000):
            data = noise(seed, folder / f"{first}.png")
            try:
                response = http.post("/v1/images", content=data, headers={"Content-Type": "image/png"})
            except httpx.TransportError:
                return
            assert response.status_code == 200, response.text
            acknowledged[response.json()["id"]] = data


def test_a_killed_server_keeps_acknowledged_uploads_and_no_incomplete_files(model_folder: Path, tmp_path: Path) -> None:
    acknowledged: dict[str, bytes] = {}
    rng = random.Random(0)
    for round_index in range(ROUNDS):
        with running(model_folder, tmp_path / "log", "-m", "tests.server.scripted_server") as server:
            before = len(acknowledged)
            threads = [
                threading.Thread(
                    target=upload_until_killed,
                    args=(server, (round_index * UPLOADERS + i) * 10_000, tmp_path, acknowledged),
                )
                for i in range(UPLOADERS)
            ]
            for thread in threads:
                thread.start()
            end = time.monotonic() + 60
            while len(acknowledged) < before + 5 and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(rng.random() * 0.2)
            server.process.kill()
            for thread in threads:
                thread.join()
        store = MediaStore(str(tmp_path / "data" / "media"))
        assert len(acknowledged) >= before + 5
        assert acknowledged.keys() <= set(store.names())
        for name in store.names():  # raises if the bytes do not match the id
            data = store.get(name).data
            assert name == encoded(data, "image", "").id
            assert store.describe(name).width == 350
    with running(model_folder, tmp_path / "log", "-m", "tests.server.scripted_server") as server:
        for name, data in acknowledged.items():
            assert server.http.get(f"/v1/images/{name}/content").content == data
