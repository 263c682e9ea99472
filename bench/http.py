"""Measures the cost of HTTP: `python -m bench.http [--model FOLDER]`.

In each round, the same requests go to the engine in this process and, streamed over HTTP, to a server with the same
settings in its own process. The engine receives decoded images; the server receives JPEGs and decodes each once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from bench.driver import Driver
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.serving import HttpDriver, serving
from bench.table import Bar, Report, Run, interleave
from bench.workload import Prompts, frames_of, greedy
from server.engine.build import build
from server.served_model import ServedModel

QUICK = {"model": "tiny", "shots": 2, "requests": 4, "new_tokens": 3, "concurrency": [2], "repeats": 1}
AT_LEAST = 0.9


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    settings = server_settings(options, model_folder(options.model))
    engine, info = build(settings)
    report = Report("The server compared with its engine alone", {**as_settings(options), "dtype": info["dtype"]})
    with serving(settings) as server:
        bench = Http(options, ServedModel.load(settings), Driver(engine), server)
        interleave([bench.round(2)])  # warm-up
        for concurrency in options.concurrency:
            bench.compare(report, concurrency)
    report.print()
    return 0


class Http:
    """Compares the token rates of an engine and of a server."""

    def __init__(self, options: argparse.Namespace, model: ServedModel, engine: Driver, server: HttpDriver) -> None:
        self._options = options
        self._model = model
        self._engine = engine
        self._server = server
        self._prompts = Prompts(model.tokenizer)

    def compare(self, report: Report, concurrency: int) -> None:
        rates = interleave(self.round(concurrency) for _ in range(self._options.repeats))
        ratio = rates["server"].over(rates["engine"])
        report.add(
            {
                "clients": concurrency,
                "engine tokens/s": rates["engine"].median,
                "server tokens/s": rates["server"].median,
                "server / engine": ratio.median,
                "range": ratio.spread(),
            }
        )
        name = f"server / engine at {concurrency} clients"
        report.bars.append(Bar(name=name, value=ratio.median, at_least=AT_LEAST))

    def round(self, concurrency: int) -> Mapping[str, Run]:
        """Return runs of the same prompts, new to both sides, in tokens per second."""
        prompts = self._prompts.sharing_shots(self._options.requests, self._options.shots)
        sampling = greedy(self._options.new_tokens)
        requests = [prompt.request(str(i), self._model.tokenizer, sampling) for i, prompt in enumerate(prompts)]
        frames = frames_of(prompts, self._model.config.vision)
        num_tokens = len(prompts) * sampling.max_tokens
        return {
            "engine": lambda: num_tokens / self._engine.run(requests, frames, concurrency).seconds,
            "server": lambda: num_tokens / self._server.run(prompts, sampling.max_tokens, concurrency),
        }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.http", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--shots", type=int, default=8, help="shots per prompt (default: 8)")
    parser.add_argument("--requests", type=int, default=64, help="requests per round (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer (default: 32)")
    parser.add_argument(
        "--concurrency", type=int, nargs="+", default=[1, 4, 16], help="numbers of clients, one row per number"
    )
    return parser


if __name__ == "__main__":
    sys.exit(main())
