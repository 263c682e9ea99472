"""Few-shot requests, against transformers' IDEFICS: `python -m bench.peer idefics`.

One checkpoint of random weights, the same prompts, threads and float32 for both, by turns. The peer keeps nothing from one
request to the next, so it has no warm case; what it may be handed instead is the output of its own resampler.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from bench.drive import Driver, Outcome
from bench.options import parse, server_settings, shown
from bench.peer.idefics_model import Peer, checkpoint
from bench.serving import HttpDriver, serving
from bench.table import Bar, Report, Run, Sample, interleave
from bench.workload import Prompt, Prompts, frames_of, greedy
from server.engine.build import build
from server.served_model import ServedModel

QUICK = {
    "size": "tiny",
    "shots": [0, 2],
    "decode_shots": [0, 2],
    "decode_tokens": 4,
    "peer_decode_tokens": 3,
    "throughput_shots": 2,
    "requests": 4,
    "new_tokens": 3,
    "clients": [1, 2],
    "peer_batches": [1, 2],
    "perceived_batches": [1, 2],
    "repeats": 1,
    "throughput_rounds": 1,
}
PACKAGES = ("transformers",)
SAME_WORDS = "the peer's greedy tokens are ours"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    theirs, ours = checkpoint(options.size)
    settings = server_settings(options, ours, dtype="float32")
    engine, _ = build(settings)
    model = ServedModel.load(settings)
    peer = Peer(theirs, model.tokenizer, model.config.vision)
    facts = {**shown(options), "parameters": peer.num_parameters, "dtype": "float32"}
    report = Report("Few-shot requests, beside IDEFICS in transformers", facts, PACKAGES)
    bench = Bench(options, model, Driver(engine), peer, report)
    bench.first_tokens()
    bench.decode()
    with serving(settings) as server:
        bench.throughput(server)
    bench.finish()
    report.print()
    return 0


class Bench:
    def __init__(
        self, options: argparse.Namespace, model: ServedModel, engine: Driver, peer: Peer, report: Report
    ) -> None:
        self.report = report
        self._options = options
        self._model = model
        self._engine = engine
        self._peer = peer
        self._prompts = Prompts(model.tokenizer)
        # greedy tokens of both for the same prompt, pairwise
        self._answers: list[tuple[int, int]] = []

    # time to the first token

    def first_tokens(self) -> None:
        interleave([self._first_token_round(0)])  # warm-up
        by_shots = {shots: self._first_token(shots) for shots in self._options.shots}
        least, most = by_shots[min(by_shots)], by_shots[max(by_shots)]
        name = f"first token, {max(by_shots)} shots"
        warm, new_picture = (most[kind].over(least[kind]).median for kind in ("warm", "new picture"))
        self._bar(f"{name}, warm / warm at {min(by_shots)} shots", warm, at_most=1.5)
        self._bar(f"{name}, new picture / the same at {min(by_shots)} shots", new_picture, at_most=1.5)
        self._bar(f"{name}, cold / peer", most["cold"].over(most["peer"]).median, at_most=0.8)

    def _first_token(self, shots: int) -> dict[str, Sample]:
        seconds = interleave(self._first_token_round(shots) for _ in range(self._options.repeats))
        for kind in ("cold", "new picture", "warm"):
            self._add(f"first token ms, {shots} shots, {kind}", seconds[kind], seconds["peer"], scale=1000)
        return seconds

    def _first_token_round(self, shots: int) -> Mapping[str, Run]:
        """Cold: nothing seen before. New picture: the support set was. Warm: every picture was, the question not."""
        support_set = self._prompts.support_set(shots)
        cold = self._prompts.ask(support_set)
        warm = self._prompts.ask(support_set, seen=cold.query.picture)
        inputs = self._peer.inputs([cold])
        return {
            "cold": lambda: self._ours([cold], 1).traces[0].first_token_seconds,
            "peer": lambda: self._peer.run(inputs, 1).traces[0].first_token_seconds,
            "new picture": lambda: self._ours([self._prompts.ask(support_set)], 1).traces[0].first_token_seconds,
            "warm": lambda: self._ours([warm], 1).traces[0].first_token_seconds,
        }

    # decoding

    def decode(self) -> None:
        for shots in self._options.decode_shots:
            rates = interleave(self._decode_round(shots) for _ in range(self._options.repeats))
            self._add(f"decode tokens/s, {shots} shots", rates["ours"], rates["peer"])
            if shots == max(self._options.decode_shots):
                ratio = rates["ours"].over(rates["peer"]).median
                self._bar(f"decode, {shots} shots, ours / peer", ratio, at_least=30)

    def _decode_round(self, shots: int) -> Mapping[str, Run]:
        prompt = self._prompts.ask(self._prompts.support_set(shots))
        inputs = self._peer.inputs([prompt])
        outcomes: list[Outcome] = []

        def rate(outcome: Outcome) -> float:
            outcomes.append(outcome)
            if len(outcomes) == 2:
                self._note(*outcomes)
            return outcome.decode_tokens_per_second

        return {
            "ours": lambda: rate(self._ours([prompt], self._options.decode_tokens)),
            "peer": lambda: rate(self._peer.run(inputs, self._options.peer_decode_tokens)),
        }

    # throughput

    def throughput(self, server: HttpDriver) -> None:
        """One support set and different queries; new to everybody in every round."""
        server.run(self._prompts.shared(2, 1), 2, 1)  # warm-up
        rates = interleave(self._throughput_round(server) for _ in range(self._options.throughput_rounds))
        best = {kind: _best(rates, kind) for kind in ("peer", "peer, perceived")}
        name = f"tokens/s, {self._options.throughput_shots} shots"
        for run, rate in rates.items():
            self._add(f"{name}, {run}", rate, rates[best["peer"]])
        most = max(self._options.clients)
        for ours in (f"engine, {most} clients", f"server, {most} clients"):
            for kind, at_least in (("peer", 40), ("peer, perceived", 8)):
                ratio = rates[ours].over(rates[best[kind]]).median
                self._bar(f"{name}, {ours} / {best[kind]}", ratio, at_least=at_least)

    def _throughput_round(self, server: HttpDriver) -> dict[str, Run]:
        options, runs = self._options, dict[str, Run]()
        for clients in options.clients:
            for name, driver in (("engine", None), ("server", server)):
                runs[f"{name}, {clients} clients"] = self._load(driver, clients)
        for batch in options.peer_batches:
            runs[f"peer, batch {batch}"] = self._peer_load(batch, perceived=False)
        for batch in options.perceived_batches:
            runs[f"peer, perceived, batch {batch}"] = self._peer_load(batch, perceived=True)
        return runs

    def _load(self, server: HttpDriver | None, clients: int) -> Run:
        max_tokens = self._options.new_tokens
        asked = self._prompts.shared(self._options.requests, self._options.throughput_shots)

        def run() -> float:
            if server is not None:
                return len(asked) * max_tokens / server.run(asked, max_tokens, clients)
            return self._ours(asked, max_tokens, clients).tokens_per_second

        return run

    def _peer_load(self, batch: int, *, perceived: bool) -> Run:
        asked = self._prompts.shared(batch, self._options.throughput_shots)

        def run() -> float:
            inputs = self._peer.inputs(asked)
            # perceived beforehand: that time is a gift to the peer
            inputs = self._peer.perceive(inputs) if perceived else inputs
            return self._peer.run(inputs, self._options.new_tokens).tokens_per_second

        return run

    # both

    def _ours(self, asked: Sequence[Prompt], max_tokens: int, clients: int = 1) -> Outcome:
        requests = [p.request(str(i), self._model.tokenizer, greedy(max_tokens)) for i, p in enumerate(asked)]
        return self._engine.run(requests, frames_of(asked, self._model.config.vision), clients)

    def _note(self, ours: Outcome, theirs: Outcome) -> None:
        for mine, other in zip(ours.traces, theirs.traces, strict=True):
            self._answers += zip(mine.token_ids, other.token_ids, strict=False)

    def finish(self) -> None:
        """Two programs that answer differently were not compared."""
        self._bar(SAME_WORDS, sum(a == b for a, b in self._answers) / len(self._answers), at_least=1)

    def _add(self, what: str, ours: Sample, peer: Sample, scale: float = 1) -> None:
        ratio = ours.over(peer)
        self.report.add(
            {
                "what": what,
                "measured": scale * ours.median,
                "peer": scale * peer.median,
                "ratio": ratio.median,
                "seen": ratio.spread(),
            }
        )

    def _bar(self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        self.report.bars.append(Bar(name=name, value=value, at_least=at_least, at_most=at_most))


def _best(rates: Mapping[str, Sample], kind: str) -> str:
    """The peer's batch size of the highest rate."""
    return max((run for run in rates if run.startswith(f"{kind}, batch")), key=lambda run: rates[run].median)


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.peer idefics", description=__doc__)
    made.add_argument("--size", default="200m", help="of the random checkpoint: tiny or 200m (default)")
    made.add_argument("--shots", type=int, nargs="+", default=[0, 4, 8, 16, 32], help="of the first-token rows")
    made.add_argument("--decode-shots", type=int, nargs="+", default=[0, 8], help="of the decode rows")
    made.add_argument("--decode-tokens", type=int, default=48, help="ours, a round (default: 48)")
    made.add_argument("--peer-decode-tokens", type=int, default=6, help="the peer's, a round (default: 6)")
    made.add_argument("--throughput-shots", type=int, default=8, help="of the throughput rows (default: 8)")
    made.add_argument("--throughput-rounds", type=int, default=2, help="of the throughput rows (default: 2)")
    made.add_argument("--requests", type=int, default=64, help="ours, of a throughput row (default: 64)")
    made.add_argument("--new-tokens", type=int, default=32, help="of an answer, throughput (default: 32)")
    made.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16], help="of our throughput rows")
    made.add_argument("--peer-batches", type=int, nargs="+", default=[1, 4], help="its requests at once")
    made.add_argument(
        "--perceived-batches", type=int, nargs="+", default=[1, 4, 16], help="and when it is handed media"
    )
    return made
