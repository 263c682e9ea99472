"""Break the code on purpose, and check that the tests fail: `python -m bench.mutations [NAME ...]`.

Each patch of `bench/mutations/*.yaml` is applied to a copy of the repository, where the tests that it names are run. The
command fails if less than 95 per cent of the patches are killed. The last line of its output is JSON.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from bench.mutations.patches import Patch, PatchError, check, read_patches
from bench.mutations.runner import Result, RunError, run_patches, tracked_files
from bench.table import ROOT, Bar, Report

AT_LEAST = 0.95
TIMEOUT_SECONDS = 180.0


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    try:
        patches = _selected(read_patches(), options.names)
        check(patches, ROOT)
        report = Report("Patches that break the code", {"patches": len(patches), "jobs": options.jobs})
        results = run_patches(
            ROOT, tracked_files(ROOT), patches, jobs=options.jobs, timeout=options.timeout, report=_print_progress
        )
    except (PatchError, RunError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for result in results:
        report.add(_row(result))
    report.bars.append(score(results))
    report.print()
    return 0 if report.bars[0].is_met else 1


def score(results: Sequence[Result]) -> Bar:
    killed = sum(result.outcome == "killed" for result in results)
    return Bar(
        name=f"share of patches killed ({killed} of {len(results)})", value=killed / len(results), at_least=AT_LEAST
    )


def _selected(patches: Sequence[Patch], names: Sequence[str]) -> list[Patch]:
    """Return the patches with one of these names, or in a file below one of these paths; without names, all.

    Raises `PatchError` for names that select nothing.
    """
    if unknown := [name for name in names if not any(_has_name(patch, name) for patch in patches)]:
        raise PatchError(f"no patch has the name or changes the path {', '.join(unknown)}")
    return [patch for patch in patches if not names or any(_has_name(patch, name) for name in names)]


def _has_name(patch: Patch, name: str) -> bool:
    return patch.name == name or patch.file.startswith(name)


def _row(result: Result) -> dict[str, str | float]:
    patch = result.patch
    return {
        "patch": patch.name,
        "file": patch.file,
        "outcome": result.outcome,
        "by": result.by.rpartition("::")[2] or result.by,
        "seconds": round(result.seconds, 1),
        "breaks": patch.breaks,
    }


def _print_progress(result: Result) -> None:
    print(f"{result.outcome:<9} {result.seconds:5.1f} s  {result.patch.name}", file=sys.stderr, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.mutations", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="names of patches, or paths that they change")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="copies in which tests run concurrently")
    parser.add_argument(
        "--timeout", type=float, default=TIMEOUT_SECONDS, help=f"seconds per patch (default: {TIMEOUT_SECONDS:.0f})"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
