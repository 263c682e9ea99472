"""Tests that response times do not reveal what another tenant has sent: `python -m bench.tenants [--pairs 300]`.

A victim sends an input that no client has sent before. Then a stranger, with the key of another tenant, sends the same
input and a new one, in random order, and measures the time of each. A two-sample Kolmogorov-Smirnov test compares the two
lists: a small p means that they can be distinguished. The same is done with `share_caches`, where p must be small. The
cache hits that the server reports are also counted: there must be none with separate caches, and some with shared ones.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import http.client
import json
import random
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from scipy.stats import ks_2samp

from bench.driver import BenchFailed
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.serving import HOST, REQUEST_SECONDS, serving
from bench.table import Bar, Report, Sample
from bench.workload import random_image, random_text
from server.access.keys import Keys
from server.settings import Settings
from server.store.database import Database

QUICK = {"model": "tiny", "pairs": 4, "probes": ["picture", "upload"]}
LEVEL = 0.05
# with fewer pairs, the test has no power
MIN_PAIRS = 100
NUM_CAPTIONS = 12
LABELS = ("cat", "dog")


@dataclass(frozen=True, slots=True)
class Probe:
    """A kind of request; `body` is made from a seed, and bodies of different seeds share nothing."""

    name: str
    path: str
    body: Callable[[int], dict[str, Any]]


def _part(seed: int) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": _url(seed)}}


def _url(seed: int) -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(random_image(seed).data).decode()}"


def _picture(seed: int) -> dict[str, Any]:
    return {"prompt": [_part(seed), {"type": "text", "text": "?"}], "max_tokens": 1, "temperature": 0}


def _text(seed: int) -> dict[str, Any]:
    captions = [random_text(NUM_CAPTIONS * seed + index) for index in range(NUM_CAPTIONS)]
    first = (
        f"{40503 * seed % 2**16:04x} "  # an odd factor: no two of 65,536 begin alike, so none finds a block of another
    )
    return {"prompt": first + " ".join(captions), "max_tokens": 1, "temperature": 0}


def _embedding(seed: int) -> dict[str, Any]:
    return {"input": [_part(seed)]}


def _upload(seed: int) -> dict[str, Any]:
    return {"url": _url(seed)}


def _classification(seed: int) -> dict[str, Any]:
    shots = [{"media": [_part(2 * seed + index)], "label": label} for index, label in enumerate(LABELS)]
    return {"shots": shots, "query": {"media": [_part(0)]}, "method": "nearest_mean"}


PROBES = {
    probe.name: probe
    for probe in (
        Probe("picture", "/v1/completions", _picture),
        Probe("text", "/v1/completions", _text),
        Probe("embedding", "/v1/embeddings", _embedding),
        Probe("classification", "/v1/classify", _classification),
        Probe("upload", "/v1/images", _upload),
    )
}
# probes of data that `share_caches` shares: everything in the engine's caches, but no stored data
SHARED = ("picture", "text", "embedding")
# probes whose answers report cache hits
REPORTED = ("picture", "text")


class Caller:
    """A client with a key and a new connection per request. `hits` counts requests for which the server reports hits."""

    def __init__(self, port: int, key: str) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=REQUEST_SECONDS)
        self._headers = {"Content-Type": "application/json", "Authorization": f"Bearer {key}"}
        self.hits = 0

    def time(self, probe: Probe, seed: int) -> float:
        """Send the request of a seed, and return its time in milliseconds. Raises `BenchFailed` unless it succeeds."""
        body = json.dumps(probe.body(seed)).encode()
        self._connection.close()  # the server closes one that is idle for long
        self._connection.connect()
        began = time.perf_counter()
        self._connection.request("POST", probe.path, body, self._headers)
        response = self._connection.getresponse()
        answer = response.read()
        milliseconds = 1000 * (time.perf_counter() - began)
        if response.status != 200:
            raise BenchFailed(f"POST {probe.path} responded with status {response.status}: {answer.decode()}")
        self.hits += _is_hit(json.loads(answer))
        return milliseconds


def _is_hit(answer: dict[str, Any]) -> bool:
    """Return whether the usage of an answer names cached tokens or media; an upload has none."""
    usage = answer.get("usage", {})
    details = usage.get("prompt_tokens_details", {}), usage.get("fewshot_details", {})
    return any(part.get(name) for part in details for name in ("cached_tokens", "media_cached"))


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    title = "What a tenant learns from times about what another one has sent, in milliseconds"
    report = Report(title, as_settings(options), packages=["scipy"])
    folder = model_folder(options.model)
    for is_shared in (False, True):
        with tempfile.TemporaryDirectory() as data_dir:
            settings = server_settings(options, folder, data_dir=data_dir, share_caches=is_shared)
            victim, stranger = asyncio.run(_make_keys(settings, "victim", "stranger"))
            with serving(settings) as server:
                callers = Caller(server.port, victim), Caller(server.port, stranger)
                for name in options.probes:
                    _measure(PROBES[name], *callers, report, options, is_shared=is_shared)
    report.print("caches")
    return int(not all(bar.is_met for bar in report.bars))


async def _make_keys(settings: Settings, *tenants: str) -> list[str]:
    """Create a key for each tenant, and return the secrets."""
    database = Database(settings.database_url)
    try:
        keys = Keys(database)
        return [(await keys.create(tenant, "manage", tenant=tenant))[1] for tenant in tenants]
    finally:
        database.close()


def _measure(
    probe: Probe, victim: Caller, stranger: Caller, report: Report, options: argparse.Namespace, *, is_shared: bool
) -> None:
    draw = random.Random(f"{options.seed} {probe.name}")
    # of each kind of its own: a picture of one kind is not seen in another
    first = 10**6 * (len(PROBES) * options.seed + list(PROBES).index(probe.name)) + 1
    for seed in range(first, first + 8):  # the first requests of a server take longer
        stranger.time(probe, seed)
    seen: list[float] = []
    new: list[float] = []
    hits_before = stranger.hits
    for index in range(options.pairs):
        seed = first + 8 + 2 * index
        victim.time(probe, seed)
        timed = [(seed, seen), (seed + 1, new)]
        draw.shuffle(timed)
        for which, times in timed:
            times.append(stranger.time(probe, which))
    result, hits = ks_2samp(seen, new), stranger.hits - hits_before
    caches = "shared by the operator" if is_shared else "of each tenant"
    report.add(
        {
            "caches": caches,
            "input": probe.name,
            "n": options.pairs,
            "hits": hits,
            "seen by the other": Sample(tuple(seen)).median,
            "new": Sample(tuple(new)).median,
            "statistic": round(float(result.statistic), 3),
            "p": float(result.pvalue),
        }
    )
    name = f"{probe.name}, caches {caches}"
    if probe.name in REPORTED:
        bound = {"at_least": options.pairs} if is_shared else {"at_most": 0}
        report.bars.append(Bar(name=f"hits, {name}", value=hits, **bound))
    if options.pairs < MIN_PAIRS:
        return
    if not is_shared:
        report.bars.append(Bar(name=f"p, {name}", value=float(result.pvalue), at_least=LEVEL))
    elif probe.name in SHARED:
        report.bars.append(Bar(name=f"p, {name}", value=float(result.pvalue), at_most=LEVEL))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.tenants", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--pairs", type=int, default=300, help="pairs of inputs per kind (default: 300)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the inputs and their order (default: 0)")
    parser.add_argument(
        "--probes", nargs="+", choices=PROBES, default=list(PROBES), help="kinds of inputs (default: all)"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
