"""Runs unmodified third-party load tools against this server: `python -m bench.load_tools [guidellm] [aiperf]`.

Each tool is installed into its own virtual environment, and sends requests with text and with images, streamed and not.
A row holds the tool's own counts. The command exits with status 1 if any request failed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.driver import BenchFailed
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.serving import HOST, serving
from bench.table import Bar, Report, Row
from model.cache import cache_folder

QUICK = {"model": "tiny", "requests": 2, "new_tokens": 2, "prompt_tokens": 4}
PACKAGES = {"guidellm": "guidellm[vision]", "aiperf": "aiperf"}
SIDE = 224


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of request that the tools send."""

    route: str
    num_images: int
    is_stream: bool

    @property
    def name(self) -> str:
        content = f"text and {self.num_images} images" if self.num_images else "text"
        return f"{self.route}, {content}, {'streamed' if self.is_stream else 'not streamed'}"


CASES = [
    Case(route=route, num_images=num_images, is_stream=is_stream)
    for route, num_images in (("completions", 0), ("chat/completions", 0), ("chat/completions", 2))
    for is_stream in (True, False)
] + [Case(route="embeddings", num_images=0, is_stream=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """The target and the size of a load. `tokenizer` is the model's folder; both tools need only its tokenizer.json."""

    url: str
    model: str
    tokenizer: Path
    num_requests: int
    num_clients: int
    prompt_tokens: int
    new_tokens: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    folder = model_folder(options.model)
    tools = options.tools or list(PACKAGES)
    binaries = {tool: install(tool, [PACKAGES[tool]], Path(options.environments)) for tool in tools}
    report = Report("Third-party load tools, unmodified", as_settings(options))
    with serving(server_settings(options, folder)) as server:
        for tool, binary in binaries.items():
            load = Load(
                url=f"http://{HOST}:{server.port}",
                model=json.loads((folder / "config.json").read_text())["name"],
                tokenizer=folder,
                num_requests=options.requests,
                num_clients=options.clients,
                prompt_tokens=options.prompt_tokens,
                new_tokens=options.new_tokens,
            )
            for case in CASES:
                row = run(tool, binary, case, load)
                report.add({"tool": tool, "case": case.name, **row})
                name = f"{tool}, {case.name}"
                report.bars.append(Bar(name=f"{name}, failed", value=_number(row["failed"]), at_most=0))
                report.bars.append(Bar(name=f"{name}, answered", value=_number(row["answered"]), at_least=1))
    report.print()
    return 0 if all(bar.is_met for bar in report.bars) else 1


def install(tool: str, packages: Sequence[str], environments: Path) -> Path:
    """Return the path of a tool's command, and install packages into its own virtual environment if it is missing."""
    folder = environments / tool
    binary = folder / "bin" / tool
    if not binary.exists():
        print(f"installing {tool} into {folder}", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", *packages], check=True)
    return binary


def run(tool: str, binary: Path, case: Case, load: Load) -> Row:
    """Run one case with a tool and read its report. Raises `BenchFailed` if the tool fails."""
    command, read = TOOLS[tool]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(binary), *command(case, load, Path(folder))]
        process = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
        if process.returncode:
            output = f"{process.stdout[-4000:]}{process.stderr[-4000:]}"
            raise BenchFailed(f"{' '.join(arguments)} ended with status {process.returncode}:\n{output}")
        return read(Path(folder))


def guidellm(case: Case, load: Load, folder: Path) -> Iterator[str]:
    yield "run"
    target = f"kind=openai_http,target={load.url},request_format=/v1/{case.route}"
    yield from ("--backend", f"{target},stream={str(case.is_stream).lower()}")
    yield from ("--profile", f"kind=concurrent,streams={load.num_clients}")
    yield from ("--constraint", f"kind=max_requests,count={load.num_requests}")
    yield from ("--tokenizer", f"kind=hf_auto,model={load.tokenizer}")
    yield from ("--data", f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.new_tokens}")
    for seed in range(case.num_images):  # it cannot combine text with a dataset of several images per row
        yield from ("--data", f"kind=synthetic_image,width={SIDE},height={SIDE},seed={seed}")
    yield from ("--output", f"kind=json,path={folder / 'report.json'}", "--disable-console")


def read_guidellm(folder: Path) -> Row:
    (benchmark,) = json.loads((folder / "report.json").read_text())["benchmarks"]
    metrics = benchmark["metrics"]
    return {
        "answered": metrics["request_totals"]["successful"],
        "failed": metrics["request_totals"]["errored"],
        "latency ms": _median(metrics["request_latency"], 1000),
        "first token ms": _median(metrics["time_to_first_token_ms"], 1),
    }


def _median(summary: dict[str, Any] | None, factor: float) -> float | None:
    value = ((summary or {}).get("successful") or {}).get("median")
    return value * factor if value else None


def aiperf(case: Case, load: Load, folder: Path) -> Iterator[str]:
    yield "profile"
    yield from ("--model", load.model, "--url", load.url, "--tokenizer", str(load.tokenizer))
    yield from ("--endpoint-type", case.route.removesuffix("/completions"))
    if case.is_stream:
        yield "--streaming"
    yield from ("--request-count", str(load.num_requests), "--concurrency", str(load.num_clients), "--workers-max", "1")
    yield from ("--synthetic-input-tokens-mean", str(load.prompt_tokens), "--synthetic-input-tokens-stddev", "0")
    if case.route != "embeddings":
        yield from ("--output-tokens-mean", str(load.new_tokens), "--output-tokens-stddev", "0")
        # not `ignore_eos`: it counts an answer of tokens without a text, such as ends of chunks, as failed
        yield from ("--extra-inputs", f"min_tokens:{load.new_tokens}")
    if case.num_images:
        yield from ("--image-width-mean", str(SIDE), "--image-height-mean", str(SIDE), "--image-format", "png")
        yield from (
            "--image-width-stddev",
            "0",
            "--image-height-stddev",
            "0",
            "--image-batch-size",
            str(case.num_images),
        )
    yield from ("--ui", "simple", "--artifact-dir", str(folder))


def read_aiperf(folder: Path) -> Row:
    (file,) = folder.rglob("profile_export_aiperf.json")
    metrics = json.loads(file.read_text())
    answered = int(metrics["request_count"]["avg"])
    return {
        "answered": answered,
        "failed": int(metrics["completed_request_count"]["avg"]) - answered,
        "latency ms": metrics["request_latency"]["p50"],
        "first token ms": metrics["time_to_first_token"]["p50"] if "time_to_first_token" in metrics else None,
    }


TOOLS = {"guidellm": (guidellm, read_guidellm), "aiperf": (aiperf, read_aiperf)}


def _number(cell: str | int | float | None) -> float:
    assert isinstance(cell, int | float)
    return float(cell)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.load_tools", description=__doc__)
    parser.add_argument("tools", nargs="*", choices=[*PACKAGES, []], help="the tools to run (default: all)")
    add_model(parser, "default")
    parser.add_argument("--requests", type=int, default=16, help="requests per case (default: 16)")
    parser.add_argument("--clients", type=int, default=2, help="concurrent requests (default: 2)")
    parser.add_argument("--prompt-tokens", type=int, default=16, help="text tokens per prompt (default: 16)")
    parser.add_argument("--new-tokens", type=int, default=8, help="tokens per answer (default: 8)")
    home = cache_folder() / "load-tools"
    parser.add_argument("--environments", default=str(home), help="folder into which the tools are installed")
    return parser


if __name__ == "__main__":
    try:
        sys.exit(main())
    except BenchFailed as failure:
        sys.exit(str(failure))
