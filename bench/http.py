"""What HTTP costs: `python -m bench.http [--model FOLDER]`.

The same requests to the engine in this process and, streamed over HTTP, to a server of the same settings in its own,
round by round. The engine alone is handed decoded pictures; the server is sent JPEGs, and decodes each once.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

from bench.drive import Driver
from bench.options import add_model, model_folder, parse, server_settings, shown
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
    report = Report("The server against its own engine", {**shown(options), "dtype": info["dtype"]})
    with serving(settings) as server:
        bench = Http(options, ServedModel.load(settings), Driver(engine), server)
        interleave([bench.round(2)])  # warm-up
        for concurrency in options.concurrency:
            bench.compare(report, concurrency)
    report.print()
    return 0


class Http:
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
                "seen": ratio.spread(),
            }
        )
        name = f"server / engine at {concurrency} clients"
        report.bars.append(Bar(name=name, value=ratio.median, at_least=AT_LEAST))

    def round(self, concurrency: int) -> Mapping[str, Run]:
        """The same prompts, new to both; tokens a second."""
        asked = self._prompts.shared(self._options.requests, self._options.shots)
        sampling = greedy(self._options.new_tokens)
        requests = [p.request(str(i), self._model.tokenizer, sampling) for i, p in enumerate(asked)]
        frames = frames_of(asked, self._model.config.vision)
        num_tokens = len(asked) * sampling.max_tokens
        return {
            "engine": lambda: num_tokens / self._engine.run(requests, frames, concurrency).seconds,
            "server": lambda: num_tokens / self._server.run(asked, sampling.max_tokens, concurrency),
        }


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.http", description=__doc__)
    add_model(made, "default")
    made.add_argument("--shots", type=int, default=8, help="examples of a prompt (default: 8)")
    made.add_argument("--requests", type=int, default=64, help="requests of a round (default: 64)")
    made.add_argument("--new-tokens", type=int, default=32, help="tokens of an answer (default: 32)")
    made.add_argument("--concurrency", type=int, nargs="+", default=[1, 4, 16], help="clients, a row each")
    return made


if __name__ == "__main__":
    sys.exit(main())
