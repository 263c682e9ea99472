"""Sends ten times more requests than a server can serve: `python -m bench.overload`.

First the peak is measured: the best rate of a few clients. Then ten times as many clients send one request after the other
and wait as long as a refusal says. Finally requests arrive at ten times the peak, independently of earlier ones. The peak
is measured again after each of these loads, and each is compared with the mean of the peaks before and after it, since the
speed of a machine may change; but the one after it must be at least 0.9 of the one before, since a server has to recover.
Requests come from many addresses, because the refusals of a single client that ignores `Retry-After` are delayed.
Clients begin within the first second, and wait up to a quarter longer than a refusal says: if hundreds acted at the
same instant from one process, the time of that process to connect would be measured. The served rate should stay at the
peak, and a refusal should be quick and say how long to wait. Each load prints a line, and takes at most `--seconds`
plus `--drain`.
"""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal

from bench.driver import BenchFailed
from bench.options import add_model, model_folder, parse, server_settings
from bench.table import Bar, Report, Sample
from bench.target import Answer, Request, encoded, image_part, jpeg, running, text_request

Kind = Literal["text", "image"]
QUICK = {"model": "tiny", "seconds": 2.0, "clients": [4, 8]}
SHORT = {"seconds": 5.0, "drain": 20.0, "clients": [16], "kinds": ["text"]}
FACTOR = 10
# number of loads of each kind: the warm-up, two forms of overload, and the peak again after each
NUM_OTHER_LOADS = 5
MIN_GOODPUT = 0.9
MAX_REFUSAL_MS = 20.0
# seconds within which clients begin, in a short load a quarter of it, and by how much their waits differ
RAMP = 1.0
JITTER = 0.25
# a client that obeys a refusal must not come back long before there is room
MIN_WAIT_RATIO = 0.5
MAX_TOKENS = 8
SEPARATOR = b"\r\n\r\n"
COMMENT = b"\xff\xfe\x00\x0a"
ADDRESSES = tuple(f"127.0.0.{number}" for number in range(2, 66))


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """Either `clients` that wait for each answer, or a `rate` of arrivals per second.

    Requests of the last seconds may finish in the `drain` seconds after the end; then they are given up.
    """

    port: int
    kind: Kind
    seconds: float
    drain: float
    clients: int = 0
    rate: float = 0.0


@dataclass(frozen=True, slots=True)
class Outcome:
    """The answers of a load. Served requests that finish after its end do not count in rates."""

    answers: list[Answer]
    num_served_in_time: int
    seconds: float

    @property
    def goodput(self) -> float:
        return self.num_served_in_time / self.seconds

    @property
    def served(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status == 200]

    @property
    def refused(self) -> list[Answer]:
        return [answer for answer in self.answers if answer.status in (429, 503)]

    def statuses(self) -> str:
        counts = Counter(str(answer.status or answer.error) for answer in self.answers)
        return ", ".join(f"{count} x {name}" for name, count in counts.items())


def run(load: Load) -> Outcome:
    """Send a load from this process."""
    return asyncio.run(_run(load))


async def _run(load: Load) -> Outcome:
    answers: list[Answer] = []
    served_at: list[float] = []
    num_sent = 0
    end = time.perf_counter() + load.seconds

    async def send(source: str) -> Answer:
        nonlocal num_sent
        num_sent += 1
        answer = await exchange(load.port, _request(load.kind), source)
        answers.append(answer)
        if answer.status == 200:
            served_at.append(time.perf_counter())
        return answer

    with suppress(TimeoutError):
        async with asyncio.timeout(load.seconds + load.drain), asyncio.TaskGroup() as group:
            if load.rate:
                await _arrivals(load.rate, send, end, group)
            else:
                ramp = min(RAMP, load.seconds / 4)
                for number in range(load.clients):
                    group.create_task(_client(partial(send, ADDRESSES[number % len(ADDRESSES)]), ramp, end))
    given_up = Answer(status=0, seconds=load.drain, error=f"given up {load.drain:g} s after the end")
    answers += [given_up] * (num_sent - len(answers))
    return Outcome(answers, sum(moment <= end for moment in served_at), load.seconds)


async def _client(send: Callable[[], Awaitable[Answer]], ramp: float, end: float) -> None:
    """Send one request after the other, and wait as long as a refusal says, or a little longer."""
    await asyncio.sleep(random.uniform(0, ramp))
    while (left := end - time.perf_counter()) > 0:
        answer = await send()
        if answer.status != 200:
            seconds = float(answer.headers.get("retry-after", 0.1)) * random.uniform(1, 1 + JITTER)
            await asyncio.sleep(min(seconds, max(left, 0.0)))


async def _arrivals(
    rate: float, send: Callable[[str], Coroutine[None, None, Answer]], end: float, group: asyncio.TaskGroup
) -> None:
    """Send requests at random times, without waiting for earlier ones."""
    due = time.perf_counter()
    while due < end:
        await asyncio.sleep(max(due - time.perf_counter(), 0.0))
        group.create_task(send(random.choice(ADDRESSES)))
        due += random.expovariate(rate)


async def exchange(port: int, request: bytes, source: str) -> Answer:
    """Send a request on a new connection from the address `source`; a failure is an answer with status 0."""
    began = time.perf_counter()
    writer: asyncio.StreamWriter | None = None
    try:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(source, 0))
        writer.write(request)
        head, _, body = (await reader.read()).partition(SEPARATOR)
    except OSError as error:
        return Answer(status=0, seconds=time.perf_counter() - began, error=type(error).__name__)
    finally:
        if writer is not None:
            writer.close()
    seconds = time.perf_counter() - began
    if not head:
        return Answer(status=0, seconds=seconds, error="closed")
    first, *lines = head.decode("latin-1").split("\r\n")
    headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
    return Answer(status=int(first.split()[1]), seconds=seconds, body=body, headers=headers)


def _request(kind: Kind) -> bytes:
    prompt = f"{random.randrange(10**6)} flamingos are"
    if kind == "text":
        return encoded(text_request(MAX_TOKENS, prompt=prompt))
    return encoded(_image_request(prompt))


def _image_request(prompt: str) -> Request:
    """Return a request with a picture that is new because of a comment in it, which costs the client little."""
    data = jpeg(0)
    new = data[:2] + COMMENT + random.randbytes(8) + data[2:]
    return text_request(MAX_TOKENS, prompt=[image_part(new), {"type": "text", "text": prompt}])


class Overload:
    """Loads one server from another process, so that clients and report do not share an interpreter."""

    def __init__(self, port: int, options: argparse.Namespace, pool: ProcessPoolExecutor, report: Report) -> None:
        self._port = port
        self._options = options
        self._pool = pool
        self._report = report

    def measure(self, kind: Kind) -> None:
        """Find the peak, then add a row and bars per form of overload, each next to another measurement of the peak."""
        self._run(kind, clients=self._options.clients[0])  # warm-up
        rates = {clients: self._run(kind, clients=clients).goodput for clients in self._options.clients}
        clients, peak = max(rates.items(), key=lambda item: item[1])
        if not peak:
            raise BenchFailed(f"no request was served within {self._options.seconds:g} seconds")
        self._report.add({"load": f"{kind}, peak of {clients} clients", "served/s": peak})
        many = FACTOR * max(self._options.clients)
        loads: list[tuple[str, Callable[[], Outcome]]] = [
            (f"{many} clients", lambda: self._run(kind, clients=many)),
            (f"{FACTOR} x the peak", lambda: self._run(kind, rate=FACTOR * peak)),
        ]
        for name, send in loads:
            outcome, before = send(), peak
            peak = self._run(kind, clients=clients).goodput
            self._add(f"{kind}, {name}", outcome, (before + peak) / 2)
            if not peak:
                raise BenchFailed(f"no request was served within {self._options.seconds:g} seconds after {name}")
            self._report.bars.append(
                Bar(name=f"{kind}, {name}: peak, after / before", value=peak / before, at_least=MIN_GOODPUT)
            )

    def _run(self, kind: Kind, *, clients: int = 0, rate: float = 0.0) -> Outcome:
        options = self._options
        load = Load(
            port=self._port, kind=kind, seconds=options.seconds, drain=options.drain, clients=clients, rate=rate
        )
        outcome = self._pool.submit(run, load).result()
        name = f"{rate:.3g} requests per second" if rate else f"{clients} clients"
        print(f"{kind}, {name}: {outcome.goodput:.3g} served per second ({outcome.statuses()})", flush=True)
        return outcome

    def _add(self, name: str, outcome: Outcome, peak: float) -> None:
        limit = self._options.seconds + self._options.drain
        served = Sample(tuple(answer.seconds for answer in outcome.served) or (limit,))
        refusals = Sample(tuple(1000 * answer.seconds for answer in outcome.refused) or (0.0,))
        waits = Sample(tuple(float(a.headers.get("retry-after", 0)) for a in outcome.refused) or (0.0,))
        unclear = sum(not answer.is_clear for answer in outcome.answers)
        self._report.add(
            {
                "load": name,
                "served/s": outcome.goodput,
                "peak": peak,
                "of the peak": outcome.goodput / peak,
                "served p50 s": served.median,
                "served p99 s": served.percentile(99),
                "refused": len(outcome.refused),
                "refused p50 ms": refusals.median,
                "refused p99 ms": refusals.percentile(99),
                "Retry-After": waits.median,
                "answers": outcome.statuses(),
            }
        )
        self._report.bars += [
            Bar(name=f"{name}: served, of the peak", value=outcome.goodput / peak, at_least=MIN_GOODPUT),
            Bar(name=f"{name}: refusal, p99 ms", value=refusals.percentile(99), at_most=MAX_REFUSAL_MS),
            Bar(name=f"{name}: unclear answers", value=unclear, at_most=0),
        ]
        if outcome.refused:
            ratio = waits.median / served.median
            bar = Bar(name=f"{name}: Retry-After / time of the served", value=ratio, at_least=MIN_WAIT_RATIO)
            self._report.bars.append(bar)


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    report = Report("Overload", {"model": options.model, "seconds": options.seconds})
    num_loads = len(options.kinds) * (len(options.clients) + NUM_OTHER_LOADS)
    seconds = num_loads * options.seconds, num_loads * (options.seconds + options.drain)
    print(f"{num_loads} loads take {seconds[0]:g} to {seconds[1]:g} seconds once the server is ready", flush=True)
    context = multiprocessing.get_context("spawn")
    with (
        running(server_settings(options, model_folder(options.model))) as target,
        ProcessPoolExecutor(1, mp_context=context) as pool,
    ):
        overload = Overload(target.port, options, pool, report)
        for kind in options.kinds:
            overload.measure(kind)
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.overload", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--seconds", type=float, default=20.0, help="seconds of each load (default: 20)")
    help = "seconds after a load in which its last requests may finish (default: 60)"
    parser.add_argument("--drain", type=float, default=60.0, help=help)
    parser.add_argument("--clients", type=int, nargs="+", default=[16, 32, 64], help="numbers of clients, for the peak")
    parser.add_argument("--kinds", nargs="+", choices=["text", "image"], default=["text", "image"])
    parser.add_argument(
        "--short", action="store_true", help="six loads of text, of 5 seconds and a drain of 20 at most"
    )
    if parser.parse_known_args(arguments)[0].short:
        parser.set_defaults(**SHORT)
    return parse(parser, arguments, QUICK)


if __name__ == "__main__":
    sys.exit(main())
