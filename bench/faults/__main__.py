"""Faults of processes, disk, database and clock under load: `python -m bench.faults [--only NAME ...]`.

Each request must get an answer or a clear refusal, acknowledged data must be there afterwards, and the server must recover
by itself. The exit status is 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.driver import BenchFailed
from bench.faults import processes, storage
from bench.faults.load import Load
from bench.faults.scenario import Fault, Skipped, Trial
from bench.options import add_model, model_folder, parse, server_settings
from bench.serving import exit_on_sigterm
from bench.table import Bar, Report, Row
from bench.target import Server
from server.settings import Settings

FAULTS = (*processes.FAULTS, *storage.FAULTS)
QUICK = {"model": "tiny"}
LOAD_SECONDS = 2.0
DATA = "data"


def run(fault: Fault, settings: Settings) -> tuple[Row, list[str]]:
    """Run one fault on a new server; return its row and the names of what was missed."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as name:
        folder = Path(name)
        try:
            environment = None if fault.environment is None else fault.environment(folder)
            if fault.mount is not None:
                fault.mount(folder / DATA)
        except Skipped as reason:
            return {"fault": fault.name, "missed": f"skipped: {reason}"}, []
        server = Server(settings.model_copy(update=fault.settings), folder, environment)
        try:
            trial = _run(fault, server)
        except BenchFailed as error:
            return {"fault": fault.name, "missed": str(error).splitlines()[0]}, [str(error)]
        finally:
            server.stop()
            if fault.unmount is not None:
                fault.unmount(folder / DATA)
        return _row(fault, trial), trial.missed


def _run(fault: Fault, server: Server) -> Trial:
    target = server.start()
    trial = Trial(server, target, Load(target).start(), server.folder)
    trial.run_load(LOAD_SECONDS)
    fault.make(trial)
    trial.load.stop()
    lost, unclear, unanswered = trial.load.lost(trial.target), trial.load.unclear(), trial.load.unanswered()
    trial.facts["lost"] = len(lost)
    trial.expect(f"{len(lost)} acknowledged and lost", not lost)
    example = f"{unclear[0].answer.status} {unclear[0].answer.body[:100]!r}" if unclear else ""
    trial.expect(f"{len(unclear)} unclear answers: {example}", not unclear)
    if not trial.may_lose_connections:
        silence = "; ".join(
            f"{sent.kind}, {sent.answer.error} after {sent.answer.seconds:.1f} s" for sent in unanswered
        )
        trial.expect(f"{len(unanswered)} requests without an answer: {silence}", not unanswered)
    return trial


def _row(fault: Fault, trial: Trial) -> Row:
    sent = trial.load.sent
    return {
        "fault": fault.name,
        "missed": "; ".join(trial.missed),
        "requests": len(sent),
        "served": sum(200 <= each.answer.status < 300 for each in sent),
        "refused": sum(each.answer.status >= 400 for each in sent),
        "no answer": len(trial.load.unanswered()),
        "acknowledged": len(trial.load.acknowledged),
        **trial.facts,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    options = _options(arguments)
    settings = server_settings(options, model_folder(options.model))
    exit_on_sigterm()
    report = Report("Faults under load", {"model": options.model})
    for fault in FAULTS:
        if not options.only or fault.name in options.only:
            row, missed = run(fault, settings)
            print(f"{fault.name}: {row['missed'] or 'nothing missed'}", flush=True)
            report.add(row)
            report.bars.append(Bar(name=fault.name, value=len(missed), at_most=0))
    report.print()
    return int(not all(bar.is_met for bar in report.bars))


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench.faults", description=__doc__)
    add_model(parser, "tiny")
    names = [fault.name for fault in FAULTS]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    return parse(parser, arguments, QUICK)


if __name__ == "__main__":
    sys.exit(main())
