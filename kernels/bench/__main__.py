"""The kernel benchmark: `python -m kernels.bench [--quick] [--out FILE] [--launches FILE]` runs seven stages.

Each value is measured in a separate process, so that a failure affects only that value, and is written to the file of the
run at once. The same command continues an interrupted run. A table is printed at the end. Full sizes need a GPU; toy sizes
check on a CPU that everything runs. Stages 4 to 6 run code of the model and the server, and need a clone of the repository.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.backend import architecture, describe
from kernels.bench import core, correctness, machine, operators, task, tuning, whole_model
from kernels.bench.journal import Journal, JournalError, Row, source_digest
from kernels.bench.machine import Machine
from kernels.bench.sizes import SIZES, Sizes
from kernels.bench.task import Task

ROOT = Path(__file__).resolve().parents[2]

# seconds after which a stage starts no further task; the same command continues with the rest
MAX_SECONDS = {"1": 40, "2": 150, "3": 180, "4": 60, "5": 120, "6": 60, "7": 200}


def all_tasks(sizes: Sizes, *, is_gpu: bool) -> list[Task]:
    return [
        *machine.tasks(sizes),
        *correctness.tasks(sizes, is_gpu=is_gpu),
        *operators.tasks(),
        *core.tasks(sizes, is_gpu=is_gpu),
        *whole_model.tasks(sizes),
        *(tuning.tasks(sizes) if is_gpu else ()),
    ]


def run(tasks: Iterable[Task], journal: Journal, sizes: str, max_seconds: float | None = None) -> int:
    """Measure the tasks that have no row yet; return how many remain because a stage ran out of time."""
    stage, deadline, num_left = "", 0.0, 0
    for each in tasks:
        if each.stage != stage:
            stage = each.stage
            deadline = time.monotonic() + (MAX_SECONDS[stage[0]] if max_seconds is None else max_seconds)
            print(stage, file=sys.stderr, flush=True)
        if each.key in journal.rows:
            continue
        if time.monotonic() >= deadline:
            num_left += 1
            continue
        row = Row.of(each, task.run(each, sizes))
        journal.add(row)
        print(f"  {line(row, None)}", file=sys.stderr, flush=True)
    return num_left


def line(row: Row, yardstick: Machine | None) -> str:
    """Return a row as text, with its value relative to the bound from the machine's bandwidth and FLOPs."""
    share = ""
    if yardstick is not None and row.unit == "us" and row.value and (row.num_bytes or row.flops):
        share = f"{100 * yardstick.bound(row.num_bytes, row.flops) / row.value:.0f}% of the bound"
    value = "-" if row.value is None else f"{row.value:,.2f} {row.unit}"
    return f"{row.case:44} {row.name:34} {value:>18} {share:>20}  {row.failure or row.note}".rstrip()


def table(rows: Sequence[Row], yardstick: Machine | None) -> str:
    lines, stage = [], ""
    for row in rows:
        if row.stage != stage:
            stage = row.stage
            lines.append(f"\n{stage}")
        lines.append(f"  {line(row, yardstick)}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return 1 if a result is wrong or the launch file could not be written yet, 2 for an error."""
    is_gpu = torch.cuda.is_available()
    options = _options(arguments, is_gpu=is_gpu)
    sizes = "quick" if options.quick or not is_gpu else "full"
    chosen = [each for each in all_tasks(SIZES[sizes], is_gpu=is_gpu) if each.stage[0] in options.stages]
    about: dict[str, Any] = {name: describe()[name] for name in ("device", "torch", "triton")}
    about |= {"sizes": sizes, "sources": source_digest(ROOT)}
    try:
        journal = Journal(options.out, about)
    except (JournalError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if options.retry:
        journal.forget_failures()
    num_left = run(chosen, journal, sizes, options.stage_seconds)
    is_written = options.launches is None or write_launches(options.launches, chosen, journal)
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    if num_left:
        print(f"left: {num_left} rows, because their stages ran out of time; the same command measures them")
    rows = journal.in_order(chosen)
    print(table(rows, Machine.of(journal.rows.values())))
    return 0 if is_written and not any(row.is_wrong for row in rows) else 1


def write_launches(file: Path, tasks: Sequence[Task], journal: Journal) -> bool:
    """Write the faster rows of the launch table, if each launch has been tried; return whether they are written."""
    if num_left := sum(each.launch is not None and each.key not in journal.rows for each in tasks):
        print(f"{file} is not written: {num_left} rows of stage 7 are left", file=sys.stderr)
        return False
    faster = tuning.faster_launches(tasks, journal.rows, architecture())
    file.write_text(json.dumps(faster, indent=1) + "\n", encoding="utf-8")
    return True


def _options(arguments: Sequence[str] | None, *, is_gpu: bool) -> argparse.Namespace:
    """Return the options of a command line; exit with a message if they are invalid."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if not is_gpu and (options.launches or "7" in (options.stages or ())):
        parser.error("stage 7 and --launches need a GPU, and torch sees none")
    options.stages = options.stages or [*MAX_SECONDS]
    if options.launches and "7" not in options.stages:
        parser.error("--launches needs stage 7, which --stages leaves out")
    return options


def _stages(text: str) -> list[str]:
    stages = [stage.strip() for stage in text.split(",")]
    for stage in stages:
        if stage not in MAX_SECONDS:
            raise argparse.ArgumentTypeError(f"stage {stage!r} is not one of {', '.join(MAX_SECONDS)}")
    return stages


def _seconds(text: str) -> float:
    seconds = float(text)
    if not seconds >= 0:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or more")
    return seconds


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="toy sizes, the only ones on a machine without a GPU")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("kernels-bench.jsonl"),
        help="file of the run, which is continued if it exists (default: kernels-bench.jsonl)",
    )
    parser.add_argument(
        "--launches", type=Path, help="file for launches faster than the launch table's, if any (stage 7)"
    )
    parser.add_argument("--stages", type=_stages, help="numbers of the stages to run, comma-separated (default: all)")
    parser.add_argument("--retry", action="store_true", help="measure values again that failed in an earlier call")
    limits = ", ".join(f"{stage}: {seconds}" for stage, seconds in MAX_SECONDS.items())
    parser.add_argument(
        "--stage-seconds", type=_seconds, help=f"seconds after which a stage starts no measurement (default: {limits})"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
