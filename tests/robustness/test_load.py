"""Loads of many kinds: the mixture is served, cancelled requests leave nothing, faults and overload are counted."""

from __future__ import annotations

import argparse
import multiprocessing
import random
import socket
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from typing import Any
from unittest.mock import create_autospec, patch

import pytest
import torch

from bench import mixture, overload
from bench.cancellations import (
    GAUGES,
    NUM_CACHED_TOKENS,
    PRIMITIVE_CACHES,
    Snapshot,
    compare,
    run,
    with_small_caches,
)
from bench.driver import BenchFailed
from bench.faults.load import Load
from bench.overload import Outcome, Overload
from bench.table import Report
from bench.target import Answer, Request, Target
from server.engine.build import engine_config
from server.served_model import ServedModel
from server.settings import child_environment

HELD = Snapshot(
    gauges=dict.fromkeys(GAUGES, 0.0),
    descriptors={"API": 20},
    threads={"API": 10},
    memory_mb={"API": 100.0},
    num_decoders=1,
    num_zombies=0,
)
# more shapes than the caches hold, in two rounds
PRODUCTS = """
import torch
from model.products import OneDNN

products = [OneDNN(torch.ones(16 * number, 16), None) for number in (1, 2, 3, 4)]
for _ in range(2):
    print("round", flush=True)
    for product in products:
        for num_rows in range(1, 33):
            product(torch.ones(num_rows, 16))
"""
# what oneDNN prints when it describes a product, and when it compiles one
DESCRIBED, COMPILED = "create:dispatch", "create:cache_miss"


def test_every_kind_of_request_is_served(target: Target) -> None:
    mixture.prepare(target)
    rng = random.Random(0)
    answers = {kind.name: target.send(kind.make(rng)) for kind in mixture.KINDS}
    assert {name: answer.body for name, answer in answers.items() if not 200 <= answer.status < 300} == {}
    mixture.clean(target)
    assert target.send(Request(method="GET", path="/v1/support_sets")).json()["data"] == []


def test_cancelled_requests_leave_nothing(target: Target) -> None:
    report = Report("", {})
    run(target, 60, 0, report)
    assert [str(bar) for bar in report.bars if not bar.is_met] == []
    assert sum(count for name, count in report.settings.items() if name.startswith("cancelled")) == 60


def test_the_caches_are_so_small_that_the_warm_up_fills_them() -> None:
    settings = with_small_caches(argparse.Namespace(model="tiny", settings=[]))
    config = engine_config(ServedModel.load(settings), settings, torch.float32)
    assert NUM_CACHED_TOKENS <= config.num_blocks * config.block_size < 2 * NUM_CACHED_TOKENS


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="torch has no oneDNN here")
def test_products_of_many_shapes_are_not_kept() -> None:
    """In the second round, all of them are described and compiled again."""
    environment = child_environment(**PRIMITIVE_CACHES, ONEDNN_VERBOSE="dispatch,profile_create")
    command = [sys.executable, "-c", PRODUCTS]
    printed = subprocess.run(command, env=environment, capture_output=True, check=True, text=True).stdout
    _, first, second = printed.split("round\n")
    assert second.count(COMPILED) == first.count(COMPILED) > 0
    assert second.count(DESCRIBED) == first.count(DESCRIBED) > 0


def test_whatever_is_still_held_is_a_missed_bound() -> None:
    leaks = [
        *(replace(HELD, gauges=HELD.gauges | {name: 1.0}) for name in GAUGES),
        replace(HELD, descriptors={"API": 100}),
        replace(HELD, threads={"API": 100}),
        replace(HELD, memory_mb={"API": 400.0}),
        replace(HELD, num_decoders=3),
        replace(HELD, num_zombies=1),
    ]
    for leak in leaks:
        report = Report("", {})
        compare(report, HELD, HELD, leak, deaths=0)
        assert len([bar for bar in report.bars if not bar.is_met]) == 1
    report = Report("", {})
    compare(report, HELD, HELD, HELD, deaths=1)
    assert [bar.name for bar in report.bars if not bar.is_met] == ["deaths of the worker"]


def test_what_was_acknowledged_and_is_gone_is_lost(target: Target) -> None:
    load = Load(target, num_clients=2, seed=1).start()
    end = time.monotonic() + 30
    while not load.acknowledged and time.monotonic() < end:
        time.sleep(0.1)
    load.stop()
    assert load.unclear() + load.unanswered() == []
    assert load.lost(target) == []
    path = load.acknowledged[0]
    assert target.send(Request(method="DELETE", path=path)).status == 200
    assert load.lost(target) == [path]
    mixture.clean(target)


def test_overload_has_a_line_per_load_a_peak_and_a_row_per_form(
    target: Target, capsys: pytest.CaptureFixture[str]
) -> None:
    options = argparse.Namespace(seconds=1.0, drain=20.0, clients=[2])
    report = Report("", {})
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        Overload(target.port, options, pool, report).measure("text")
    peak, clients, arrivals = report.rows
    assert peak["served/s"] > 0  # type: ignore[operator]
    assert clients["load"] == "text, 20 clients"
    assert "200" in str(clients["answers"])
    assert "200" in str(arrivals["answers"])
    lines = capsys.readouterr().out.splitlines()
    loads = [line.partition(":")[0].removeprefix("text, ") for line in lines]
    assert loads[:4] == ["2 clients", "2 clients", "20 clients", "2 clients"]
    assert loads[4].endswith(" requests per second")
    assert loads[5:] == ["2 clients"]


def measured(rates: list[float]) -> Report:
    """Return the report of overloads whose loads are served at these rates, one after the other."""
    options = argparse.Namespace(seconds=1.0, drain=1.0, clients=[2])
    report, remaining = Report("", {}), iter(rates)
    answer = Answer(status=200, seconds=1.0)
    with patch.object(Overload, "_run", lambda *_, **__: Outcome([answer], int(next(remaining)), 1.0)):
        Overload(0, options, create_autospec(ProcessPoolExecutor), report).measure("text")
    return report


def test_an_overload_is_compared_with_the_peaks_before_and_after_it() -> None:
    report = measured([90, 100, 60, 90, 70, 81])
    assert [row.get("peak") for row in report.rows] == [None, 95, 85.5]
    recovery = {bar.name: bar for bar in report.bars if bar.name.endswith("peak, after / before")}
    assert [bar.value for bar in recovery.values()] == [0.9, 0.9]
    assert all(bar.is_met for bar in recovery.values())


def test_a_server_that_does_not_recover_is_reported() -> None:
    bars = measured([90, 100, 60, 89, 70, 85]).bars
    assert [bar.name for bar in bars if not bar.is_met and "peak, after" in bar.name] == [
        "text, 20 clients: peak, after / before"
    ]
    with pytest.raises(BenchFailed, match="no request was served within 1 seconds after 20 clients"):
        measured([90, 100, 60, 0])


@pytest.mark.parametrize("form", [{"clients": 3}, {"rate": 50.0}])
def test_a_load_gives_up_what_is_never_answered(form: dict[str, Any]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        load = overload.Load(port=silent.getsockname()[1], kind="text", seconds=0.2, drain=0.1, **form)
        outcome = overload.run(load)
    assert set(outcome.statuses().split(" x ")[1:]) == {"given up 0.1 s after the end"}
    assert len(outcome.answers) == 3 or "rate" in form


def test_answers_after_the_end_are_in_no_rate() -> None:
    answers = [Answer(status=200, seconds=1.0), Answer(status=200, seconds=3.0), Answer(status=503, seconds=0.1)]
    outcome = Outcome(answers, 1, 2.0)
    assert outcome.goodput == 0.5
    assert len(outcome.served) == 2
    assert len(outcome.refused) == 1
