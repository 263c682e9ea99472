"""Runs each known attack against a real server, and measures another client meanwhile: `python -m bench.attacks`.

A normal request of 4 tokens, with and without a picture, is timed without and during the attack. The exit status is 1 if an
attack ended the worker, slowed a normal request or the liveness probe too much, or was refused in an unclear way.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from urllib.parse import urlsplit

from bench.attacks import connections, media, requests, stored
from bench.attacks.attack import Attack, Session
from bench.attacks.bystander import KINDS, Measured, Plan, Series, measure
from bench.driver import BenchFailed
from bench.options import add_model, model_folder, parse, server_settings
from bench.table import Bar, Cell, Report, Row
from bench.target import START_SECONDS, Target, running, wait_until

ATTACKS = tuple(
    sorted(
        (*requests.ATTACKS, *media.ATTACKS, *connections.ATTACKS, *stored.ATTACKS),
        key=lambda attack: ("critical", "high", "medium", "low").index(attack.severity),
    )
)
ATTACKER, BYSTANDER = "127.0.0.1", "127.0.0.2"
QUICK = {"model": "tiny", "count": 3, "max_seconds": 6.0}
SHORT = {"count": 5, "max_seconds": 10.0}
MAX_RATIO = 3.0
MAX_PROBE_SECONDS = 1.0
FIRST_SECONDS = 30.0
END_SECONDS = 60.0
RECOVERY_SECONDS = 180.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The effects of one attack."""

    attack: Attack
    alone: Measured
    attacked: Measured
    session: Session
    has_survived: bool
    recovery: float | None

    def __str__(self) -> str:
        ratios = ", ".join(f"{kind} {self.ratio(kind, 0):.1f} x" for kind in KINDS)
        recovery = "none" if self.recovery is None else f"{self.recovery:.1f} s"
        return (
            f"{self.attack.name}: missed {', '.join(self.missed()) or 'nothing'} "
            f"({ratios}, liveness {self.attacked.slowest_probe:.2f} s, recovery {recovery})"
        )

    def missed(self) -> list[str]:
        """Return the names of the bounds that were missed."""
        slow = [kind for kind in KINDS if self.ratio(kind, 0) > MAX_RATIO]
        bounds = {
            "worker": self.has_survived,
            "liveness": self.attacked.slowest_probe < MAX_PROBE_SECONDS,
            "refusal": not self.session.unclear(),
            "recovery": self.recovery is not None,
            "accepted": not (self.attack.is_refused and self._was_served()),
            "deadline": self._ended_in_time(),
        }
        return [*(name for name, is_met in bounds.items() if not is_met), *slow]

    def ratio(self, kind: str, address: int) -> float:
        return self.attacked.series[kind, address].percentile(95) / self.alone.series[kind, 0].percentile(95)

    def row(self) -> Row:
        kinds: dict[str, Cell] = {}
        for kind in KINDS:
            alone, attacked = self.alone.series[kind, 0], self.attacked.series[kind, 0]
            kinds |= {
                f"{kind} alone p50": alone.percentile(50),
                f"{kind} alone p95": alone.percentile(95),
                f"{kind} p50": attacked.percentile(50),
                f"{kind} p95": attacked.percentile(95),
                f"{kind} ratio": self.ratio(kind, 0),
                f"{kind} ratio, same address": self.ratio(kind, len(self.attacked.series) // len(KINDS) - 1),
                f"{kind} failed": _counted(attacked),
            }
        return {
            "attack": self.attack.name,
            "severity": self.attack.severity,
            "missed": ", ".join(self.missed()),
            "survived": "yes" if self.has_survived else "no",
            **kinds,
            "live max": self.attacked.slowest_probe,
            "recovery s": self.recovery,
            "API MiB": self.attacked.peak_mb,
            "rounds": self.session.num_rounds,
            "its answers": ", ".join(f"{count} x {name}" for name, count in self.session.statuses().items()),
        }

    def _ended_in_time(self) -> bool:
        """Return whether answers came, and came in time."""
        limit, answers = self.attack.max_seconds, self.session.answers
        return limit is None or (bool(answers) and all(answer.seconds <= limit for answer in answers))

    def _was_served(self) -> bool:
        return any(not 400 <= answer.status < 500 for answer in self.session.answers)


class Range:
    """Runs attacks against one server, with one normal client."""

    def __init__(self, target: Target, options: argparse.Namespace, pool: ProcessPoolExecutor) -> None:
        self._target = target
        self._pool = pool
        is_local = target.host.startswith("127.")
        self._attacker = ATTACKER if is_local else ""
        self._plan = Plan(
            host=target.host,
            port=target.port,
            api_process=target.process.pid if target.has_process else None,
            addresses=(BYSTANDER, ATTACKER) if is_local else (None,),
            count=options.count,
            max_seconds=options.max_seconds,
        )

    def run(self, attack: Attack) -> Outcome:
        """Measure without the attack, during it, and until the server has recovered from it."""
        wait_until(self._target.is_ready, START_SECONDS, "a ready server")
        if attack.prepare is not None:
            attack.prepare(self._target)
        self._measure(replace(self._plan, count=1))  # warm-up
        alone = self._measure(replace(self._plan, addresses=self._plan.addresses[:1]))
        worker = self._target.worker_id()
        session = Session(self._target, self._attacker)
        attacker = threading.Thread(target=_repeat, args=(attack, session), daemon=True)
        attacker.start()
        session.wait_for_first(FIRST_SECONDS)
        attacked = self._measure(self._plan)
        session.end()
        ended = time.monotonic()
        attacker.join(END_SECONDS)
        recovery = self._recover(alone, ended)
        has_survived = self._target.worker_id() == worker
        if attack.clean is not None:
            attack.clean(self._target)
        return Outcome(
            attack=attack,
            alone=alone,
            attacked=attacked,
            session=session,
            has_survived=has_survived,
            recovery=recovery,
        )

    def _measure(self, plan: Plan) -> Measured:
        return self._pool.submit(measure, plan).result()

    def _recover(self, alone: Measured, ended: float) -> float | None:
        """Return the seconds until normal requests take no longer than the bound again."""
        source = self._plan.addresses[0]

        def is_normal() -> bool:
            answers = {kind: self._target.send(make(), source=source) for kind, make in KINDS.items()}
            return all(
                answer.status == 200 and answer.seconds <= MAX_RATIO * alone.series[kind, 0].percentile(95)
                for kind, answer in answers.items()
            )

        try:
            wait_until(is_normal, RECOVERY_SECONDS, "normal requests")
        except BenchFailed:
            return None
        return time.monotonic() - ended


def _repeat(attack: Attack, session: Session) -> None:
    while not session.is_over:
        attack.run(session)
        session.num_rounds += 1
        session.sleep(0.05)


def _counted(series: Series) -> str:
    failures = series.failures
    return f"{len(failures)} of {len(series.seconds)}: {', '.join(sorted(set(failures)))}" if failures else ""


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    report = Report("A normal client during attacks", {"model": options.model, "requests": options.count})
    context = multiprocessing.get_context("spawn")
    with _target(options) as target, ProcessPoolExecutor(1, mp_context=context) as pool:
        attacks = Range(target, options, pool)
        for attack in ATTACKS:
            if not options.only or attack.name in options.only:
                outcome = attacks.run(attack)
                print(outcome, flush=True)
                report.add(outcome.row())
                report.bars.append(Bar(name=attack.name, value=len(outcome.missed()), at_most=0))
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


@contextmanager
def _target(options: argparse.Namespace) -> Iterator[Target]:
    if options.url is not None:
        address = urlsplit(options.url)
        yield Target(address.port or 80, address.hostname or ATTACKER)
        return
    with running(server_settings(options, model_folder(options.model))) as target:
        yield target


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.attacks", description=__doc__)
    add_model(parser, "default")
    names = [attack.name for attack in ATTACKS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--url", help="attack this server instead of starting one")
    parser.add_argument("--count", type=int, default=20, help="requests of each kind during an attack (default: 20)")
    parser.add_argument(
        "--max-seconds", type=float, default=150.0, help="maximum seconds of a measurement (default: 150)"
    )
    parser.add_argument("--short", action="store_true", help="measure only a few seconds per attack")
    if parser.parse_known_args(arguments)[0].short:
        parser.set_defaults(**SHORT)
    return parse(parser, arguments, QUICK)


if __name__ == "__main__":
    sys.exit(main())
