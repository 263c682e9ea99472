"""A fleet on a real Ray for tests: two replicas of the server, each with worker processes whose engine is scripted."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import IO

import httpx
import psutil
import yaml

from bench.postgresql import postgresql
from bench.serving import free_port
from model.folder import save_folder
from server.settings import child_environment
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = (
    "import sys; from deploy.ray.__main__ import main; "
    "sys.exit(main(sys.argv[1:], factory='tests.server.scripted_engine:build'))"
)
START_SECONDS, STOP_SECONDS, REQUEST_SECONDS = 90.0, 20.0, 60.0


@dataclass
class Fleet:
    """A running fleet, its folder, and its command. `api_key` is that of the setting."""

    folder: Path
    port: int
    database: str
    flags: Sequence[str]
    api_key: str | None = None
    address: str = ""
    process: subprocess.Popen[str] = field(init=False)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.api_key is None else {"Authorization": f"Bearer {self.api_key}"}

    def models(self, **folders: str) -> None:
        """Write the file of the models: their names, each with its folder."""
        entries = {name: {"model": str(self.folder / model)} for name, model in folders.items()}
        (self.folder / "models.yaml").write_text(yaml.safe_dump(entries, sort_keys=False))

    def start(self, log: IO[str], *arguments: str) -> subprocess.Popen[str]:
        settings = {
            "database": self.database,
            "data_dir": self.folder / "data",
            "port": self.port,
            "spare_worker": "false",
            "decode_processes": 1,
            "max_model_len": 16384,
        }
        flags = [text for name, value in settings.items() for text in (f"--{name.replace('_', '-')}", str(value))]
        fleet = ["--models", str(self.folder / "models.yaml"), "--models-per-replica", "2", *self.flags]
        command = [sys.executable, "-c", PROGRAM, *arguments, *fleet, *flags]
        secrets = {} if self.api_key is None else {"FLAMBOYANCE_API_KEY": self.api_key}
        # of Ray: a program that connects to a cluster by its address must say that it has a token
        environment = child_environment(RAY_AUTH_MODE="token", **secrets)
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, text=True, env=environment)

    def update(self, *arguments: str) -> None:
        """Change the running fleet, and wait until it is done."""
        log = self.folder / "update.log"
        with log.open("w") as file:
            process = self.start(file, "update", "--address", self.address, *arguments)
            assert process.wait(START_SECONDS) == 0, log.read_text()

    def replicas(self) -> dict[str, set[str]]:
        """Return the models that each replica has loaded."""
        text = httpx.get(f"{self.url}/metrics", timeout=REQUEST_SECONDS).text
        models: dict[str, set[str]] = {}
        for model, replica in re.findall(
            r'^flamboyance:engine_ready\{model_name="(.*?)",replica="(.*?)"\} 1', text, re.M
        ):
            models.setdefault(replica, set()).add(model)
        return models

    def engines(self) -> dict[str, int]:
        """Return the process of the first model's engine in the replicas that have it.

        The requests are concurrent, because one replica may answer all of those that follow each other.
        """
        ask = partial(httpx.get, headers=self.headers, timeout=REQUEST_SECONDS)
        with ThreadPoolExecutor(8) as pool:
            responses = list(pool.map(ask, [f"{self.url}/version"] * 64))
        return {response.headers["x-replica"]: response.json()["engine"]["pid"] for response in responses}

    def kill(self, engine: int) -> None:
        """Kill the replica whose engine is this process, its child."""
        replica = psutil.Process(engine).parent()
        assert replica is not None
        replica.kill()


@contextmanager
def running(
    folder: Path, models: Mapping[str, str], flags: Sequence[str], api_key: str | None = None
) -> Iterator[Fleet]:
    """Run a fleet of two replicas until the block ends. `models` are the folders of tiny ones by name."""
    for family in ("openflamingo", "flamingo"):
        # long enough for answers that last for seconds
        config = replace(CONFIGS[family], language_model=replace(CONFIGS[family].language_model, max_positions=16384))
        save_folder(folder / family, config, tiny_model(config).state_dict().items(), byte_tokenizer().to_str())
    with postgresql() as database:
        fleet = Fleet(folder, free_port(), database, flags, api_key)
        fleet.models(**models)
        log = folder / "fleet.log"
        with log.open("w") as file:
            fleet.process = fleet.start(file, "--replicas", "2")
        try:
            fleet.address = _ready(fleet.process, log)
            yield fleet
        finally:
            fleet.process.terminate()
            fleet.process.wait(STOP_SECONDS)


def _ready(process: subprocess.Popen[str], log: Path) -> str:
    """Wait until the fleet is ready, and return the address of Ray."""
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if (match := re.search(r"the fleet is ready .*address=(\S+)", log.read_text())) is not None:
            return match[1]
        time.sleep(0.3)
    process.kill()
    raise AssertionError(f"the fleet did not start:\n{log.read_text()[-5000:]}")
