"""Compare few-shot requests with IDEFICS in transformers: `python -m bench.peer idefics`.

Both programs run the same checkpoint of random weights, prompts and threads in float32, in alternation. The peer caches
nothing between requests, so it has no warm case; instead, it can receive the precomputed output of its own resampler.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from bench.driver import Driver, Outcome
from bench.options import as_settings, parse, server_settings
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
SAME_TOKENS = "greedy tokens equal the peer's"


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    peer_folder, imported_folder = checkpoint(options.size)
    settings = server_settings(options, imported_folder, dtype="float32", speculative_tokens=0)
    engine, _ = build(settings)
    model = ServedModel.load(settings)
    peer = Peer(peer_folder, model.tokenizer, model.config.vision)
    facts = {**as_settings(options), "parameters": peer.num_parameters, "dtype": "float32"}
    report = Report("Few-shot requests compared with IDEFICS in transformers", facts, PACKAGES)
    bench = Bench(options, model, Driver(engine), peer, report)
    bench.first_tokens()
    bench.decode()
    with serving(settings) as server:
        bench.throughput(server)
    bench.finish()
    report.print()
    return 0


class Bench:
    """Measures both programs and collects the rows of the report."""

    def __init__(
        self, options: argparse.Namespace, model: ServedModel, engine: Driver, peer: Peer, report: Report
    ) -> None:
        self.report = report
        self._options = options
        self._model = model
        self._engine = engine
        self._peer = peer
        self._prompts = Prompts(model.tokenizer)
        # Pairs of greedy tokens, ours and the peer's, for the same prompt.
        self._token_pairs: list[tuple[int, int]] = []

    def first_tokens(self) -> None:
        interleave([self._first_token_round(0)])  # warm-up
        by_shots = {shots: self._first_token(shots) for shots in self._options.shots}
        fewest, most = by_shots[min(by_shots)], by_shots[max(by_shots)]
        name = f"first token, {max(by_shots)} shots"
        warm, new_image = (most[kind].over(fewest[kind]).median for kind in ("warm", "new image"))
        self._bar(f"{name}, warm / warm at {min(by_shots)} shots", warm, at_most=1.5)
        self._bar(f"{name}, new image / new image at {min(by_shots)} shots", new_image, at_most=1.5)
        self._bar(f"{name}, cold / peer", most["cold"].over(most["peer"]).median, at_most=0.8)

    def _first_token(self, shots: int) -> dict[str, Sample]:
        seconds = interleave(self._first_token_round(shots) for _ in range(self._options.repeats))
        for kind in ("cold", "new image", "warm"):
            self._add(f"first token ms, {shots} shots, {kind}", seconds[kind], seconds["peer"], scale=1000)
        return seconds

    def _first_token_round(self, shots: int) -> Mapping[str, Run]:
        """Return the runs of a round.

        Cold: all images and texts are new. New image: the support set is cached. Warm: all images are cached, the query's
        text is new.
        """
        support_set = self._prompts.new_support_set(shots)
        cold = self._prompts.new_prompt(support_set)
        warm = self._prompts.new_prompt(support_set, cold.query.image)
        inputs = self._peer.inputs([cold])
        return {
            "cold": lambda: self._ours([cold], 1).traces[0].first_token_seconds,
            "peer": lambda: self._peer.run(inputs, 1).traces[0].first_token_seconds,
            "new image": lambda: self._ours([self._prompts.new_prompt(support_set)], 1).traces[0].first_token_seconds,
            "warm": lambda: self._ours([warm], 1).traces[0].first_token_seconds,
        }

    def decode(self) -> None:
        for shots in self._options.decode_shots:
            rates = interleave(self._decode_round(shots) for _ in range(self._options.repeats))
            self._add(f"decode tokens/s, {shots} shots", rates["ours"], rates["peer"])
            if shots == max(self._options.decode_shots):
                ratio = rates["ours"].over(rates["peer"]).median
                self._bar(f"decode, {shots} shots, ours / peer", ratio, at_least=30)

    def _decode_round(self, shots: int) -> Mapping[str, Run]:
        prompt = self._prompts.new_prompt(self._prompts.new_support_set(shots))
        inputs = self._peer.inputs([prompt])
        outcomes: list[Outcome] = []

        def rate(outcome: Outcome) -> float:
            outcomes.append(outcome)
            if len(outcomes) == 2:
                self._compare_tokens(*outcomes)
            return outcome.decode_tokens_per_second

        return {
            "ours": lambda: rate(self._ours([prompt], self._options.decode_tokens)),
            "peer": lambda: rate(self._peer.run(inputs, self._options.peer_decode_tokens)),
        }

    def throughput(self, server: HttpDriver) -> None:
        """Measure different queries on one support set, which is new to both programs in every round."""
        server.run(self._prompts.sharing_shots(2, 1), 2, 1)  # warm-up
        rates = interleave(self._throughput_round(server) for _ in range(self._options.throughput_rounds))
        best = {kind: _best(rates, kind) for kind in ("peer", "peer, perceived")}
        name = f"tokens/s, {self._options.throughput_shots} shots"
        for run, rate in rates.items():
            self._add(f"{name}, {run}", rate, rates[best["peer"]])
        max_clients = max(self._options.clients)
        for ours in (f"engine, {max_clients} clients", f"server, {max_clients} clients"):
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
        prompts = self._prompts.sharing_shots(self._options.requests, self._options.throughput_shots)

        def run() -> float:
            if server is not None:
                return len(prompts) * max_tokens / server.run(prompts, max_tokens, clients)
            return self._ours(prompts, max_tokens, clients).tokens_per_second

        return run

    def _peer_load(self, batch: int, *, perceived: bool) -> Run:
        prompts = self._prompts.sharing_shots(batch, self._options.throughput_shots)

        def run() -> float:
            inputs = self._peer.inputs(prompts)
            # The measured time excludes the precomputation, in favour of the peer.
            inputs = self._peer.perceive(inputs) if perceived else inputs
            return self._peer.run(inputs, self._options.new_tokens).tokens_per_second

        return run

    def _ours(self, prompts: Sequence[Prompt], max_tokens: int, clients: int = 1) -> Outcome:
        sampling = greedy(max_tokens)
        requests = [prompt.request(str(i), self._model.tokenizer, sampling) for i, prompt in enumerate(prompts)]
        return self._engine.run(requests, frames_of(prompts, self._model.config.vision), clients)

    def _compare_tokens(self, ours: Outcome, peer: Outcome) -> None:
        for our_trace, peer_trace in zip(ours.traces, peer.traces, strict=True):
            self._token_pairs += zip(our_trace.token_ids, peer_trace.token_ids, strict=False)

    def finish(self) -> None:
        """Check the agreement of the tokens: two programs with different answers cannot be compared."""
        self._bar(SAME_TOKENS, sum(a == b for a, b in self._token_pairs) / len(self._token_pairs), at_least=1)

    def _add(self, case: str, ours: Sample, peer: Sample, scale: float = 1) -> None:
        ratio = ours.over(peer)
        self.report.add(
            {
                "case": case,
                "measured": scale * ours.median,
                "peer": scale * peer.median,
                "ratio": ratio.median,
                "range": ratio.spread(),
            }
        )

    def _bar(self, name: str, value: float, *, at_least: float | None = None, at_most: float | None = None) -> None:
        self.report.bars.append(Bar(name=name, value=value, at_least=at_least, at_most=at_most))


def _best(rates: Mapping[str, Sample], kind: str) -> str:
    """Return the name of the peer's run with the highest rate, over its batch sizes."""
    return max((run for run in rates if run.startswith(f"{kind}, batch")), key=lambda run: rates[run].median)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.peer idefics", description=__doc__)
    parser.add_argument("--size", default="200m", help="size of the random checkpoint: tiny or 200m (default)")
    parser.add_argument(
        "--shots", type=int, nargs="+", default=[0, 4, 8, 16, 32], help="numbers of shots, first-token rows"
    )
    parser.add_argument("--decode-shots", type=int, nargs="+", default=[0, 8], help="numbers of shots, decode rows")
    parser.add_argument("--decode-tokens", type=int, default=48, help="our decoded tokens per round (default: 48)")
    parser.add_argument(
        "--peer-decode-tokens", type=int, default=6, help="the peer's decoded tokens per round (default: 6)"
    )
    parser.add_argument("--throughput-shots", type=int, default=8, help="shots, throughput rows (default: 8)")
    parser.add_argument("--throughput-rounds", type=int, default=2, help="rounds, throughput rows (default: 2)")
    parser.add_argument("--requests", type=int, default=64, help="our requests per throughput row (default: 64)")
    parser.add_argument("--new-tokens", type=int, default=32, help="tokens per answer, throughput rows (default: 32)")
    parser.add_argument(
        "--clients", type=int, nargs="+", default=[1, 4, 16], help="numbers of clients, our throughput rows"
    )
    parser.add_argument("--peer-batches", type=int, nargs="+", default=[1, 4], help="the peer's batch sizes")
    parser.add_argument(
        "--perceived-batches",
        type=int,
        nargs="+",
        default=[1, 4, 16],
        help="the peer's batch sizes with precomputed media",
    )
    return parser
