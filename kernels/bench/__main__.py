"""The command `python -m kernels.bench [--toy] [--out FILE] [--launches FILE]` runs six stages and prints a table last.

It also writes the rows as JSON. Full sizes need a GPU and take under ten minutes on one H100; toy sizes check on a CPU that
everything runs.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch

from kernels.backend import describe
from kernels.bench.core import measure_core
from kernels.bench.correctness import check_all
from kernels.bench.layer import measure_layer
from kernels.bench.machine import measure_machine
from kernels.bench.measure import Report, Stopwatch
from kernels.bench.sizes import FULL, SMALL, Sizes
from kernels.bench.step import measure_first_token, measure_step

# Time limits per stage; measurements after the limit are reported as out of time.
MAX_SECONDS = {1: 40, 2: 60, 3: 180, 4: 90, 5: 150, 6: 60}


def run(sizes: Sizes, device: torch.device, stages: set[int]) -> Report:
    report, watch = Report(), Stopwatch(device, sizes.replays)
    with torch.inference_mode():
        print("stage 1", flush=True)
        machine = measure_machine(report, watch, sizes)
        if 2 in stages:
            print("stage 2", flush=True)
            with report.stage(MAX_SECONDS[2]):
                check_all(report, watch, sizes)
        measures = {3: measure_core, 4: measure_layer, 5: measure_step, 6: measure_first_token}
        for number, measure in measures.items():
            if number in stages:
                print(f"stage {number}", flush=True)
                with report.stage(MAX_SECONDS[number]):
                    measure(report, watch, sizes, machine)
    return report


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__)
    parser.add_argument("--toy", action="store_true", help="toy sizes, the only ones on a machine without a GPU")
    parser.add_argument(
        "--out", type=Path, default=Path("kernels-bench.json"), help="file for the JSON (default: kernels-bench.json)"
    )
    parser.add_argument("--launches", type=Path, help="file for faster rows of the launch table, if any")
    parser.add_argument(
        "--stages", default="1,2,3,4,5,6", help="numbers of the stages to run (default: all); stage 1 always runs"
    )
    options = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    is_toy = options.toy or device.type == "cpu"
    torch.manual_seed(0)
    begin = time.monotonic()
    report = run(SMALL if is_toy else FULL, device, {int(number) for number in options.stages.split(",")})
    about = {**describe(), "sizes": "toy" if is_toy else "full", "seconds": round(time.monotonic() - begin, 1)}
    report.write(options.out, about)
    if options.launches:
        options.launches.write_text(json.dumps(report.launches, indent=1) + "\n", encoding="utf-8")
    print("\n".join(f"{key}: {value}" for key, value in about.items()))
    print(report.table())


if __name__ == "__main__":
    main()
