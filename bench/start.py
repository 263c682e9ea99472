"""Measures the time to start a server, and its memory at rest: `python -m bench.start [--repeats 3] [--full]`.

Each round starts `python -m server` with stored weight formats, and waits until /health/ready is 200 and the first answer
equals that of the warm-up start. Then the memory of its processes is read from /proc: at rest and, with --full, after real
requests have filled all caches, or after `--fill-seconds`. A page that several processes share counts fully in the RSS of
each, and in equal parts in their PSS.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from bench.driver import BenchFailed
from bench.filling import complete, fill
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.serving import exit_on_sigterm, free_port, start_server, stop_server
from bench.table import ROOT, Bar, Report, Sample
from bench.target import Request, Target, get, image_part, post, wait_until
from model.config import load_config
from model.zoo.default import DEFAULT
from server.settings import Settings

QUICK: dict[str, Any] = {"model": "tiny", "repeats": 1, "bars": False}
PACKAGES = ("numba", "safetensors", "uvicorn")
START_SECONDS, IDLE_SECONDS = 300.0, 60.0
POLL_SECONDS = 0.02
GB = 1e9
READY_SECONDS, REST_GB, FULL_GB = 4.0, 1.5, 2.5
EXAMPLES = ROOT / "docs" / "examples"
SHOTS = {"noto-elephant.png": "dax", "noto-bicycle.png": "wug", "noto-banana.png": "blicket"}


@dataclass(frozen=True, slots=True)
class Start:
    """One start, in seconds since the process was spawned."""

    seconds: dict[str, float]
    answer: str


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    folder = model_folder(options.model)
    settings = server_settings(options, folder, host="127.0.0.1")
    report = Report("Start and standing costs", as_settings(options), PACKAGES)
    request = few_shot_request(has_end_of_chunk=bool(load_config(folder).prompt.end_of_chunk))
    expected = _first_answer(settings, request)
    last = options.repeats - 1
    starts = [_measure(settings, request, report, options, is_last=n == last) for n in range(options.repeats)]
    for name in starts[0].seconds:
        values = Sample(tuple(start.seconds[name] for start in starts))
        report.add({"what": name, "seconds": values.median, "range": values.spread()})
    _add_disk(report, folder, settings)
    is_right = float(all(start.answer == expected for start in starts))
    report.bars.append(Bar(name="first answer equals that of the warm-up start", value=is_right, at_least=1))
    if options.bars:
        ready = Sample(tuple(start.seconds["ready"] for start in starts))
        report.bars.append(Bar(name="seconds until ready", value=ready.median, at_most=READY_SECONDS))
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


def _first_answer(settings: Settings, request: Request) -> str:
    """Start once, so that the formats are measured and files are in memory, and return the answer."""
    with _server(settings) as (target, _):
        _wait(target, target.is_ready)
        return _ask(target, request)


def _measure(
    settings: Settings, request: Request, report: Report, options: argparse.Namespace, *, is_last: bool
) -> Start:
    with _server(settings) as (target, spawned):
        start = _time(target, request, spawned)
        if is_last:
            if settings.spare_worker:
                _wait_for_spare(target)
            wait_until(lambda: bool(target.trials()), IDLE_SECONDS, "the trial process of grammars")
            _wait_until_idle(target.trials()[0])
            rest = _add_memory(report, target, "at rest")
            _add_bar(report, options, "worker RSS in GB at rest", rest, REST_GB)
        if is_last and options.full:
            full = _fill(target, settings, report, options.fill_seconds)
            _add_bar(report, options, "worker RSS in GB with full caches", full, FULL_GB)
        return start


def _add_bar(report: Report, options: argparse.Namespace, name: str, num_bytes: float, limit: float) -> None:
    if options.bars:
        report.bars.append(Bar(name=name, value=num_bytes / GB, at_most=limit))


@contextmanager
def _server(settings: Settings) -> Iterator[tuple[Target, float]]:
    """Run a server with a data folder of its own; yield it, and when it was spawned."""
    with tempfile.TemporaryDirectory() as folder:
        port, spawned = free_port(), time.time()
        process = start_server(_by_name(settings), port, Path(folder))
        exit_on_sigterm()
        try:
            yield Target(port, process=psutil.Process(process.pid)), spawned
        finally:
            stop_server(process)


def _by_name(settings: Settings) -> Settings:
    """Return settings that name the default model, as its users do: the server imports more modules for a folder."""
    is_default = settings.model == str(model_folder("default"))
    return settings.model_copy(update={"model": DEFAULT.name}) if is_default else settings


def _wait(target: Target, condition: Callable[[], bool]) -> float:
    """Wait for a condition of a server that runs, and return the time at which it held."""

    def holds() -> bool:
        if target.process.status() == psutil.STATUS_ZOMBIE:
            raise BenchFailed("the server ended while it started")
        return condition()

    wait_until(holds, START_SECONDS, "a server", POLL_SECONDS)
    return time.time()


def _time(target: Target, request: Request, spawned: float) -> Start:
    listening = _wait(target, lambda: target.send(get("/health/live"), timeout=5).status == 200)
    ready = _wait(target, target.is_ready)
    answer = _ask(target, request)
    answered = time.time()
    engine = target.send(get("/version")).json()["engine"]
    # on the clock of the kernel, which may differ from the wall clock by a second
    worker = psutil.Process(engine["pid"]).create_time() - target.process.create_time()
    seconds = {
        "worker spawned": worker,
        "listening": listening - spawned,
        "worker: imports": ready - spawned - worker - engine["load_seconds"],
        **{f"worker: {phase}": value for phase, value in engine["load_phases"].items()},
        "ready": ready - spawned,
        "first answer": answered - spawned,
    }
    return Start(seconds, answer)


def few_shot_request(*, has_end_of_chunk: bool) -> Request:
    """Return the few-shot request of the README."""
    parts: list[dict[str, Any]] = []
    for name, word in SHOTS.items():
        parts += [_image(name), {"type": "text", "text": f"This is a {word}."}]
        parts += [{"type": "end_of_chunk"}] * has_end_of_chunk
    parts += [_image("fluent-elephant.png"), {"type": "text", "text": "This is a"}]
    return post("/v1/completions", prompt=parts, max_tokens=4, temperature=0.0, ignore_eos=True)


def _ask(target: Target, request: Request) -> str:
    return str(complete(target, request)["choices"][0]["text"])


def _image(name: str) -> dict[str, Any]:
    return image_part((EXAMPLES / name).read_bytes())


def _wait_for_spare(target: Target) -> None:
    """Wait until the spare worker has imported the engine: it takes no more processor time."""
    wait_until(lambda: bool(target.spares()), IDLE_SECONDS, "a spare worker")
    _wait_until_idle(target.spares()[0])


def _wait_until_idle(process: psutil.Process) -> None:
    used = -1.0
    while (now := sum(process.cpu_times()[:2])) != used:
        used = now
        time.sleep(1.0)


def _add_memory(report: Report, target: Target, state: str) -> float:
    """Add a row per process, and return the RSS of the worker in bytes."""
    worker = target.worker()
    processes = {"API": target.process, "worker": worker}
    processes |= {f"spare worker {n}": spare for n, spare in enumerate(target.spares(), 1)}
    processes |= {f"decoder {n}": decoder for n, decoder in enumerate(target.decoders(), 1)}
    processes |= {f"trials of grammars {n}": trial for n, trial in enumerate(target.trials(), 1)}
    for name, process in processes.items():
        memory = process.memory_full_info()
        peak = Path(f"/proc/{process.pid}/status").read_text().partition("VmHWM:")[2].split()[0]
        report.add(
            {
                "what": f"{name}, {state}",
                "RSS MB": memory.rss / 1e6,
                "PSS MB": memory.pss / 1e6,
                "own MB": memory.uss / 1e6,
                "peak RSS MB": int(peak) * 1024 / 1e6,
            }
        )
    return float(worker.memory_info().rss)


def _fill(target: Target, settings: Settings, report: Report, seconds: float) -> float:
    """Fill the caches, and return the RSS of the worker when they are full, in bytes: unwritten bytes count."""
    caches = fill(target, load_config(Path(str(settings.model))), settings, seconds)
    for cache in caches:
        report.add(cache.row)
    state = "full caches" if all(cache.is_full for cache in caches) else "caches as written"
    return _add_memory(report, target, state) + sum(cache.unwritten_bytes for cache in caches)


def _add_disk(report: Report, folder: Path, settings: Settings) -> None:
    report.add({"what": "disk, model folder", "disk MB": _disk_bytes(folder) / 1e6})
    report.add({"what": "disk, weight formats", "disk MB": _disk_bytes(settings.cache_folder / "formats") / 1e6})
    report.add({"what": "disk, packages of this Python", "disk MB": _disk_bytes(Path(sys.prefix)) / 1e6})


def _disk_bytes(folder: Path) -> int:
    """Return the bytes of disk that the files of a folder take."""
    files = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sum(path.stat().st_blocks * 512 for path in files)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.start", description=__doc__)
    add_model(parser, "default")
    parser.add_argument(
        "--full", action="store_true", help="also measure with full caches; bytes that stay unwritten are added"
    )
    parser.add_argument("--fill-seconds", type=float, default=300.0, help="maximum seconds of the fill (default: 300)")
    parser.set_defaults(bars=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
