"""Other people's load tools on this server, unmodified: `python -m bench.load_tools [guidellm] [aiperf]`.

Each is installed into a virtual environment of its own, and asks a server of the given model for text and for images,
streamed and whole. A row says what the tool itself counted; a request that failed ends the command with status 1.
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

from bench.drive import BenchFailed
from bench.options import add_model, model_folder, parse, server_settings, shown
from bench.serving import HOST, serving
from bench.table import Bar, Report, Row

QUICK = {"model": "tiny", "requests": 2, "new_tokens": 2, "prompt_tokens": 4}
PACKAGES = {"guidellm": "guidellm[vision]", "aiperf": "aiperf"}
SIDE = 224


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    route: str
    images: int
    is_stream: bool

    @property
    def name(self) -> str:
        what = f"text and {self.images} images" if self.images else "text"
        return f"{self.route}, {what}, {'streamed' if self.is_stream else 'whole'}"


CASES = [
    Case(route=route, images=images, is_stream=is_stream)
    for route, images in (("completions", 0), ("chat/completions", 0), ("chat/completions", 2))
    for is_stream in (True, False)
] + [Case(route="embeddings", images=0, is_stream=False)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """How much is asked, of whom. `tokenizer` is the model's folder: neither tool needs more of it than tokenizer.json."""

    url: str
    model: str
    tokenizer: Path
    requests: int
    clients: int
    prompt_tokens: int
    new_tokens: int


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    folder = model_folder(options.model)
    tools = options.tools or list(PACKAGES)
    binaries = {tool: install(tool, Path(options.venvs)) for tool in tools}
    report = Report("Load tools of others, unmodified", shown(options))
    with serving(server_settings(options, folder)) as server:
        for tool, binary in binaries.items():
            load = Load(
                url=f"http://{HOST}:{server.port}",
                model=json.loads((folder / "config.json").read_text())["name"],
                tokenizer=folder,
                requests=options.requests,
                clients=options.clients,
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


def install(tool: str, venvs: Path) -> Path:
    """The tool's own command; its environment is made once."""
    folder = venvs / tool
    binary = folder / "bin" / tool
    if not binary.exists():
        print(f"installing {tool} into {folder}, once", file=sys.stderr)
        venv.create(folder, with_pip=True)
        subprocess.run([folder / "bin" / "pip", "install", "--quiet", PACKAGES[tool]], check=True)
    return binary


def run(tool: str, binary: Path, case: Case, load: Load) -> Row:
    command, read = TOOLS[tool]
    with tempfile.TemporaryDirectory() as folder:
        arguments = [str(binary), *command(case, load, Path(folder))]
        done = subprocess.run(arguments, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise BenchFailed(
                f"{' '.join(arguments)} ended with {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
            )
        return read(Path(folder))


def guidellm(case: Case, load: Load, folder: Path) -> Iterator[str]:
    yield "run"
    target = f"kind=openai_http,target={load.url},request_format=/v1/{case.route}"
    yield from ("--backend", f"{target},stream={str(case.is_stream).lower()}")
    yield from ("--profile", f"kind=concurrent,streams={load.clients}")
    yield from ("--constraint", f"kind=max_requests,count={load.requests}")
    yield from ("--tokenizer", f"kind=hf_auto,model={load.tokenizer}")
    yield from ("--data", f"kind=synthetic_text,prompt_tokens={load.prompt_tokens},output_tokens={load.new_tokens}")
    for seed in range(case.images):  # more than one a dataset it does not combine with text
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
    yield from ("--request-count", str(load.requests), "--concurrency", str(load.clients), "--workers-max", "1")
    yield from ("--synthetic-input-tokens-mean", str(load.prompt_tokens), "--synthetic-input-tokens-stddev", "0")
    if case.route != "embeddings":
        yield from ("--output-tokens-mean", str(load.new_tokens), "--output-tokens-stddev", "0")
        yield from ("--extra-inputs", "ignore_eos:true")
    if case.images:
        yield from ("--image-width-mean", str(SIDE), "--image-height-mean", str(SIDE), "--image-format", "png")
        yield from ("--image-width-stddev", "0", "--image-height-stddev", "0", "--image-batch-size", str(case.images))
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
    made = argparse.ArgumentParser(prog="python -m bench.load_tools", description=__doc__)
    made.add_argument("tools", nargs="*", choices=[*PACKAGES, []], help="which (default: all)")
    add_model(made, "default")
    made.add_argument("--requests", type=int, default=16, help="requests of a case (default: 16)")
    made.add_argument("--clients", type=int, default=2, help="requests at once (default: 2)")
    made.add_argument("--prompt-tokens", type=int, default=16, help="tokens of a prompt's text (default: 16)")
    made.add_argument("--new-tokens", type=int, default=8, help="tokens of an answer (default: 8)")
    home = Path.home() / ".cache" / "flamboyance" / "load-tools"
    made.add_argument("--venvs", default=str(home), help="folder that they are installed into")
    return made


if __name__ == "__main__":
    sys.exit(main())
