"""Runs a real Prometheus that scrapes a server, with the alerts of `prometheus/`, while a block runs."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import yaml

from bench.serving import HOST, free_port

ALERTS = Path(__file__).parent / "prometheus" / "alerts.yml"
START_SECONDS = 30.0


class Prometheus(NamedTuple):
    """A Prometheus that scrapes a server."""

    http: httpx.Client

    def query(self, expression: str) -> list[dict[str, Any]]:
        """Return the current value of each series of an expression."""
        return self._result("/api/v1/query", query=expression)

    def query_range(self, expression: str, start: float, end: float, step: float) -> list[dict[str, Any]]:
        """Return the values of each series of an expression over a time."""
        return self._result("/api/v1/query_range", query=expression, start=start, end=end, step=step)

    def _result(self, path: str, **parameters: str | float) -> list[dict[str, Any]]:
        response = self.http.get(path, params=parameters)
        response.raise_for_status()
        result: list[dict[str, Any]] = response.json()["data"]["result"]
        return result

    def wait_until_ready(self) -> None:
        """Return once the server has been scraped twice. Raises `TimeoutError`."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                series = self.query("count_over_time(flamboyance:engine_ready[1m])")
            except httpx.HTTPError:
                series = []
            if series and float(series[0]["value"][1]) >= 2:
                return
            time.sleep(0.3)
        raise TimeoutError(f"the server was not scraped within {START_SECONDS:g} seconds")


@contextmanager
def scraping(address: str, folder: Path, seconds: int) -> Iterator[Prometheus]:
    """Run a Prometheus that scrapes the server at an address every `seconds`; its files are in a folder."""
    config = {
        "global": {"scrape_interval": f"{seconds}s", "evaluation_interval": f"{seconds}s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "flamboyance", "static_configs": [{"targets": [address]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    listen = f"{HOST}:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", f"--storage.tsdb.path={folder / 'data'}"]
    process = subprocess.Popen([*command, f"--web.listen-address={listen}", "--log.level=error"])
    try:
        with httpx.Client(base_url=f"http://{listen}") as http:
            prometheus = Prometheus(http)
            prometheus.wait_until_ready()
            yield prometheus
    finally:
        process.terminate()
        process.wait()
