"""Faults of processes, which are killed, stopped, terminated, or run out of file descriptors."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from contextlib import suppress

import psutil

from bench.faults.scenario import Fault, Trial, is_serving, wait_for_status
from bench.target import get, image_request, wait_until
from server.media.pool import WAIT_FACTOR

# short, so that a stopped worker soon counts as stalled
STALL_SECONDS = 4.0
ORPHAN_SECONDS = 10.0
READY_SECONDS = 1.0
END_SECONDS = 60.0
SPARE_SECONDS = 30.0
# in which a stopped decoder is noticed
DECODE_SECONDS = 3.0


def _kill_worker(trial: Trial) -> None:
    trial.target.worker().kill()
    noticed = wait_for_status(trial.target, "/health/ready", 503, READY_SECONDS)
    trial.facts["ready is 503 after s"] = round(noticed, 2) if noticed is not None else "never"
    trial.expect("readiness", noticed is not None)
    trial.expect_recovery()
    trial.run_load()


def _signal_spare(number: signal.Signals) -> Callable[[Trial], None]:
    """Return a fault of the spare worker, and then of the worker whose place it should take."""

    def make(trial: Trial) -> None:
        wait_until(lambda: bool(trial.target.spares()), SPARE_SECONDS, "a spare worker")
        for spare in trial.target.spares():
            spare.send_signal(number)
        _kill_worker(trial)

    return make


def _stop_worker(trial: Trial) -> None:
    worker = trial.target.worker()
    worker.send_signal(signal.SIGSTOP)
    noticed = wait_for_status(trial.target, "/health/ready", 503, 3 * STALL_SECONDS)
    trial.facts["ready is 503 after s"] = round(noticed, 1) if noticed is not None else "never"
    trial.expect("readiness", noticed is not None)
    trial.expect_recovery(60.0)
    with suppress(psutil.NoSuchProcess):
        worker.send_signal(signal.SIGCONT)


def _kill_api(trial: Trial) -> None:
    children = trial.target.process.children(recursive=True)
    trial.may_lose_connections = True
    trial.target.process.kill()
    _, alive = psutil.wait_procs(children, ORPHAN_SECONDS)
    trial.expect("children end", not alive)
    for child in alive:
        child.kill()
    trial.load.stop()
    trial.target = trial.server.start()
    trial.expect_recovery()


def _stop_api(trial: Trial) -> None:
    trial.target.process.send_signal(signal.SIGSTOP)
    time.sleep(3)
    trial.target.process.send_signal(signal.SIGCONT)
    trial.expect_recovery()


def _kill_idle_decoders(trial: Trial) -> None:
    trial.load.stop()
    for decoder in trial.target.decoders():
        decoder.kill()
        time.sleep(0.5)
        answer = trial.target.send(image_request(int(time.time() * 1000)))
        trial.expect(f"next image is served, not {answer.status}", answer.status == 200)


def _kill_decoders(trial: Trial) -> None:
    for _ in range(10):
        for decoder in trial.target.decoders():
            with suppress(psutil.NoSuchProcess):
                decoder.kill()
        trial.run_load(0.3)
    trial.expect_recovery()


def _stop_decoders(trial: Trial) -> None:
    decoders = trial.target.decoders()
    for decoder in decoders:
        decoder.send_signal(signal.SIGSTOP)
    trial.run_load(2 * DECODE_SECONDS)
    trial.load.stop()
    # a decoder that was idle all the time is still stopped
    for _ in decoders:
        answer = trial.target.send(image_request(int(time.time() * 1000)))
        trial.expect(f"later image is served, not {answer.status}", answer.status == 200)


def _exhaust_descriptors(trial: Trial) -> None:
    """Leave the API process few file descriptors, and open more connections than it has."""
    process = trial.target.process
    before = process.rlimit(psutil.RLIMIT_NOFILE)
    limit = process.num_fds() + 8
    process.rlimit(psutil.RLIMIT_NOFILE, (limit, before[1]))
    trial.may_lose_connections = True
    trial.run_load()
    process.rlimit(psutil.RLIMIT_NOFILE, before)
    trial.expect_recovery(30.0)


def _terminate(trial: Trial) -> None:
    trial.target.process.terminate()
    refused = wait_for_status(trial.target, "/health/ready", 503, READY_SECONDS)
    trial.expect("readiness", refused is not None)
    trial.may_lose_connections = True  # after the end no process listens
    status = trial.server.wait(END_SECONDS)
    trial.expect(f"exit status 0, not {status}", status == 0)
    cut = [sent for sent in trial.load.sent if sent.answer.error in ("IncompleteRead", "RemoteDisconnected")]
    trial.expect(f"{len(cut)} answers cut", not cut)
    trial.load.stop()
    trial.target = trial.server.start()
    trial.expect_recovery()


def _kill_workers_repeatedly(trial: Trial) -> None:
    """Kill the worker again as soon as it is back."""
    for _ in range(2):
        trial.target.worker().kill()
        time.sleep(0.5)
        wait_until(lambda: is_serving(trial.target), 120.0, "a worker that is back")
    trial.expect("liveness", trial.target.send(get("/health/live")).status == 200)
    trial.expect_recovery()


FAULTS = (
    Fault(name="worker killed", make=_kill_worker),
    Fault(name="worker killed again", make=_kill_workers_repeatedly),
    Fault(name="spare and worker killed", make=_signal_spare(signal.SIGKILL)),
    Fault(name="spare stopped, worker killed", make=_signal_spare(signal.SIGSTOP)),
    Fault(name="worker stopped", make=_stop_worker, settings={"stall_timeout": STALL_SECONDS}),
    Fault(name="API killed", make=_kill_api),
    Fault(name="API stopped for 3 s", make=_stop_api),
    Fault(name="idle decoders killed", make=_kill_idle_decoders),
    Fault(name="decoders killed", make=_kill_decoders),
    Fault(name="decoders stopped", make=_stop_decoders, settings={"decode_timeout": DECODE_SECONDS / WAIT_FACTOR}),
    Fault(name="no file descriptors", make=_exhaust_descriptors),
    Fault(name="terminated under load", make=_terminate, settings={"shutdown_timeout": 20.0}),
)
