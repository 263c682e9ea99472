"""Faults of the disk and the database (full, locked, slow, moved, overwritten), and of the clock."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from glob import glob
from pathlib import Path

from bench.faults.scenario import Fault, Skipped, Trial, is_serving
from bench.target import get, post, text_request
from server.settings import child_environment

DISK = "24m"
LOCKED_SECONDS = 5.0
# limit in seconds for requests that need no database and so must not wait for it
UNRELATED_SECONDS = 2.0
LIBRARY = "/usr/lib/*/faketime/libfaketimeMT.so.1"
CLOCK = "clock"
JUMPS = ("+90000", "-90000", "+0")


def _database(trial: Trial) -> Path:
    return trial.server.settings.data_folder / "flamboyance.db"


def _check_unrelated(trial: Trial) -> None:
    """Check that requests that need neither database nor media store are served as before."""
    for request in (text_request(2), post("/tokenize", prompt="a"), get("/health/live"), get("/v1/models")):
        answer = trial.target.send(request, timeout=30)
        is_quick = answer.status == 200 and answer.seconds < UNRELATED_SECONDS
        trial.expect(f"{request.path} in {UNRELATED_SECONDS:g} s ({answer.status}, {answer.seconds:.1f} s)", is_quick)


@contextmanager
def _locked(file: Path) -> Iterator[None]:
    """Hold the write lock of a SQLite database, as a backup or another program would."""
    with closing(sqlite3.connect(file, timeout=10, isolation_level=None)) as connection:
        connection.execute("BEGIN IMMEDIATE")
        yield
        connection.execute("ROLLBACK")


def _lock_database(trial: Trial) -> None:
    with _locked(_database(trial)):
        trial.run_load(LOCKED_SECONDS)
        _check_unrelated(trial)
    trial.expect_recovery(30.0)


def _slow_database(trial: Trial) -> None:
    """Take the lock for half a second, again and again."""
    for _ in range(6):
        with _locked(_database(trial)):
            trial.run_load(0.5)
        time.sleep(0.05)
    _check_unrelated(trial)
    trial.expect_recovery(30.0)


def _move_database(trial: Trial) -> None:
    """Move the database and its log away under the running server, and back."""
    file = _database(trial)
    away = file.with_name("away")
    away.mkdir()
    parts = [file, file.with_name(f"{file.name}-wal")]
    for part in parts:
        part.rename(away / part.name)
    trial.run_load()
    _check_unrelated(trial)
    trial.load.stop()
    trial.server.stop()
    for stray in glob(f"{file}*"):
        Path(stray).unlink()
    for part in parts:
        (away / part.name).rename(part)
    trial.target = trial.server.start()
    trial.expect_recovery()


def _overwrite_database(trial: Trial) -> None:
    """Overwrite the database with noise. Its data are lost; requests that do not need it continue."""
    trial.load.stop()
    for part in glob(f"{_database(trial)}*"):
        Path(part).write_bytes(os.urandom(Path(part).stat().st_size))
    requests = (get("/v1/support_sets"), post("/v1/support_sets", name="late", examples=[{"text": "a"}]))
    for request in requests:
        answer = trial.target.send(request, timeout=60)
        trial.facts[f"{request.method} with a damaged database"] = answer.status
        trial.expect(f"clear refusal, not {answer.status} {answer.body[:100]!r}", answer.is_clear)
    _check_unrelated(trial)
    trial.load.sent.clear()


def _fill_disk(trial: Trial) -> None:
    filler = trial.server.settings.data_folder / "filler"
    with filler.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            trial.facts["filled MiB"] = round(filler.stat().st_size / 2**20, 1)
    trial.run_load()
    _check_unrelated(trial)
    filler.unlink()
    trial.expect_recovery(30.0)
    answer = trial.target.send(post("/v1/support_sets", name="after", examples=[{"text": "a"}]), timeout=30)
    trial.expect(f"stores again, not {answer.status}", answer.status in (200, 201))


def _mount_small(folder: Path) -> None:
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Skipped("a small disk cannot be mounted: this needs the rights of an administrator") from error


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", "-l", str(folder)], check=False, capture_output=True)


def _lose_media(trial: Trial) -> None:
    """Move the folder of the media store away, and back."""
    media = trial.server.settings.data_folder / "media"
    media.rename(media.with_suffix(".away"))
    trial.run_load()
    _check_unrelated(trial)
    trial.load.stop()
    trial.expect("no new folder", not media.exists())
    shutil.rmtree(media, ignore_errors=True)
    media.with_suffix(".away").rename(media)
    trial.expect_recovery(30.0)


def _jump(trial: Trial) -> None:
    for jump in JUMPS:
        _set_clock(trial.folder, jump)
        trial.run_load(2.0)
        trial.expect(f"serves after a jump of {jump} s", is_serving(trial.target))
    trial.expect_recovery(30.0)


def _set_clock(folder: Path, jump: str) -> None:
    """Write the difference in one step: the library ends a process that reads half a number."""
    new = folder / "clock.new"
    new.write_text(f"{jump}\n")
    new.rename(folder / CLOCK)


def _fake_clock(folder: Path) -> dict[str, str]:
    """Return an environment in which the wall clock differs by the seconds in a file; the monotonic clock is real."""
    libraries = glob(LIBRARY)
    if not libraries:
        raise Skipped("the clock cannot be set: the package libfaketime is not installed")
    _set_clock(folder, "+0")
    return child_environment(
        LD_PRELOAD=libraries[0],
        FAKETIME_TIMESTAMP_FILE=str(folder / CLOCK),
        FAKETIME_NO_CACHE="1",
        DONT_FAKE_MONOTONIC="1",
        # otherwise a timed wait ends at once, and threads that want the interpreter keep all others from work
        FAKETIME_FORCE_MONOTONIC_FIX="0",
    )


FAULTS = (
    Fault(name="disk full", make=_fill_disk, mount=_mount_small, unmount=_unmount),
    Fault(name="media folder gone", make=_lose_media),
    Fault(name="database locked", make=_lock_database),
    Fault(name="database slow", make=_slow_database),
    Fault(name="database gone", make=_move_database),
    Fault(name="database overwritten", make=_overwrite_database),
    Fault(name="clock jumps", make=_jump, environment=_fake_clock),
)
