"""Measures the cost of shots over HTTP: `python -m bench.fewshot [--model FOLDER] [--repeats 15]`.

Measures, in alternation, the time to the first token of a query without shots and with a warm support set, and the time of
a classification. A new image is one that the server has never received. It is sent as a JPEG and encoded in each case.
Shots of a large set are selected by likeness to the new image, in the order of their likeness; they attend to earlier shots
or alone. They are compared with shots that are the same for every query, whose prompts begin with a cached prefix. Finally
many clients send such requests at the same time.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.driver import BenchFailed
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.serving import HOST, REQUEST_SECONDS, serving
from bench.table import Bar, Report, Row, Run, Sample, interleave
from bench.workload import NOUNS, JpegImage, random_image, random_text

QUICK = {"model": "tiny", "shots": 4, "k": [2, 4], "large": 12, "repeats": 1, "cold": 1, "requests": 1}
AT_MOST = 1.5
# limit, relative to the time of a prompt whose prefix is cached
ALONE_AT_MOST = 1.05
FORMS = "previous", "alone"
CLIENTS = 16
MORE_REQUESTS = 2.0
MANY_EXAMPLES = 10_000
COMPLETIONS = "/v1/fewshot/completions"
CLASSIFY = "/v1/classify"
RICES = "rices_image"
MEASURES = {COMPLETIONS: "first token", CLASSIFY: "classify"}
LABELS = NOUNS[:5]
# The seed of the image that all queries with a seen image use; new images have larger seeds.
SEEN_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of request. `k` 0 means no shots; `order` None means the default order of the strategy."""

    route: str = COMPLETIONS
    k: int = 0
    strategy: str = "first"
    order: str | None = None
    is_image_new: bool = True
    set_size: int = 0  # examples of the support set; 0: the maximum number of shots
    shots_attend: str = "previous"

    @property
    def title(self) -> str:
        order = f" {self.order}" if self.order else ""
        of_set = f" of {self.set_size:,}" if self.set_size else ""
        form = f", attend {self.shots_attend}" if self.set_size else ""
        return f"{MEASURES[self.route]}, {self.k} shots{of_set}" + (f", {self.strategy}{order}{form}" if self.k else "")

    @property
    def image(self) -> str:
        return "new" if self.is_image_new else "seen"

    @property
    def name(self) -> str:
        return f"{self.title}, {self.image} image"

    @property
    def without_shots(self) -> Case:
        return replace(self, k=0, strategy="first", order=None, set_size=0, shots_attend="previous")

    @property
    def with_cached_prefix(self) -> Case:
        """The case with the same shots for every query."""
        return replace(self, strategy="first", order=None, shots_attend="previous")


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    report = Report("The cost of shots over HTTP, in milliseconds", as_settings(options))
    with tempfile.TemporaryDirectory() as data_dir:
        settings = server_settings(options, model_folder(options.model), data_dir=data_dir)
        with serving(settings) as server:
            FewShot(options, Client(server.port)).measure(report)
    report.print()
    return 0


class Client:
    """A client with one connection that waits for each answer."""

    def __init__(self, port: int) -> None:
        self.port = port
        self._connection = http.client.HTTPConnection(HOST, port, timeout=REQUEST_SECONDS)

    def close(self) -> None:
        """Close the connection; the next request opens it again."""
        self._connection.close()

    def post(
        self, path: str, body: Mapping[str, Any] | bytes, content_type: str = "application/json"
    ) -> dict[str, Any]:
        """Post a body and return the answer. Raises `BenchFailed` unless the status is a success."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request("POST", path, data, {"Content-Type": content_type})
        response = self._connection.getresponse()
        answer = response.read()
        if not 200 <= response.status < 300:
            raise BenchFailed(f"POST {path} responded with status {response.status}: {answer.decode()}")
        decoded: dict[str, Any] = json.loads(answer)
        return decoded


class FewShot:
    """Measures all cases, with warm support sets and with cold ones."""

    def __init__(self, options: argparse.Namespace, client: Client) -> None:
        self._options = options
        self._client = client
        self._last_seed = SEEN_SEED
        self._usage: dict[Case, dict[str, Any]] = {}

    def measure(self, report: Report) -> None:
        cases, large = _cases(self._options), self._options.large
        sets = {size: self._support_set(size or self._options.shots) for size in (0, large)}
        self._warm(sets[0])
        answer = self._warm_one(sets[large], template="caption", shots_attend="alone")
        self._warm_one(sets[large], template="classification", shots_attend="alone")
        for case in cases:  # warm-up: the embeddings of the support set, and the seen image
            self._time(case, sets[case.set_size])
        measured = interleave(self._round(cases, sets) for _ in range(self._options.repeats))
        for case in cases:
            ratio = measured[case.name].over(measured[case.without_shots.name])
            report.add(self._row(case, measured[case.name], ratio))
            is_largest = case.k == self._options.shots and case.is_image_new and case.route == COMPLETIONS
            if is_largest and case.set_size == 0:
                report.bars.append(Bar(name=f"{case.name} / no shots", value=ratio.median, at_most=AT_MOST))
            if case.shots_attend == "alone":
                ratio = measured[case.name].over(measured[case.with_cached_prefix.name])
                bar = Bar(name=f"{case.name} / cached prefix", value=ratio.median, at_most=ALONE_AT_MOST)
                report.bars.append(bar)
        bytes_per_shot = answer["shot_bytes"] / large
        report.settings["KiB per shot that attends alone"] = round(bytes_per_shot / 1024, 1)
        report.settings[f"GiB of {MANY_EXAMPLES:,} such shots"] = round(MANY_EXAMPLES * bytes_per_shot / 2**30, 2)
        self._add_throughput(report, sets[large])
        self._add_cold(report, _cold_cases(self._options))

    def _add_throughput(self, report: Report, support_set: str) -> None:
        """Add the requests per second of many clients at once, by route and form."""
        for route in (COMPLETIONS, CLASSIFY):
            cases = [_retrieved(self._options, route, form) for form in FORMS]
            runs = {case.shots_attend: partial(self._throughput, case, support_set) for case in cases}
            measured = interleave(runs for _ in range(min(self._options.repeats, 5)))
            for case in cases:
                sample = measured[case.shots_attend]
                title = f"{case.title}, {CLIENTS} clients"
                report.add({"case": title, "image": "new", "requests/s": sample.median})
            ratio = measured["alone"].over(measured["previous"])
            name = f"requests/s of {CLIENTS} clients, {MEASURES[route]}, alone / previous"
            report.bars.append(Bar(name=f"{name} ({ratio.spread()})", value=ratio.median, at_least=MORE_REQUESTS))

    def _throughput(self, case: Case, support_set: str) -> float:
        """Return the requests per second of many clients that send one request after the other."""
        number = self._options.requests
        bodies = [json.dumps(self._body(case, support_set)).encode() for _ in range(CLIENTS * number)]

        def send(client: int) -> None:
            connection = Client(self._client.port)
            for body in bodies[client * number : (client + 1) * number]:
                connection.post(case.route, body)

        began = time.perf_counter()
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(send, range(CLIENTS)))
        seconds = time.perf_counter() - began
        self._client.close()  # the server closes a connection that is idle for long
        return len(bodies) / seconds

    def _add_cold(self, report: Report, cases: Sequence[Case]) -> None:
        measured = interleave(
            {case.name: partial(self._time_cold, case) for case in cases} for _ in range(self._options.cold)
        )
        for case in cases:
            report.add({"case": f"{case.title}, cold", "image": case.image, "ms": measured[case.name].median})

    def _round(self, cases: Sequence[Case], sets: Mapping[int, str]) -> Mapping[str, Run]:
        return {case.name: partial(self._time_warm, case, sets[case.set_size]) for case in cases}

    def _time_warm(self, case: Case, support_set: str) -> float:
        milliseconds = self._time(case, support_set)
        encoded = self._usage[case]["fewshot_details"]["media_encoded"]
        if encoded > case.is_image_new:
            raise BenchFailed(f"{case.name}: {encoded} media were encoded, so the support set was not warm")
        return milliseconds

    def _time_cold(self, case: Case) -> float:
        """Time a request with a new support set, whose images must all be encoded."""
        return self._time(case, self._support_set(self._options.shots))

    def _time(self, case: Case, support_set: str) -> float:
        """Return the milliseconds until the answer: one token, or the probabilities of all candidates."""
        body = json.dumps(self._body(case, support_set)).encode()
        began = time.perf_counter()
        answer = self._client.post(case.route, body)
        milliseconds = 1000 * (time.perf_counter() - began)
        if len(answer["fewshot"]["shots"]) != case.k:
            raise BenchFailed(f"{case.name}: {len(answer['fewshot']['shots'])} shots were used, expected {case.k}")
        self._usage[case] = answer["usage"]
        return milliseconds

    def _body(self, case: Case, support_set: str) -> dict[str, Any]:
        image = self._new_image() if case.is_image_new else random_image(SEEN_SEED)
        body: dict[str, Any] = {"query": {"image": "data:image/jpeg;base64," + base64.b64encode(image.data).decode()}}
        if case.k:
            body["examples"] = {
                "support_set": support_set,
                "k": case.k,
                "strategy": case.strategy,
                "order": case.order,
            }
        if case.set_size:
            body["shots_attend"] = case.shots_attend
        if case.route == CLASSIFY:
            return {**body, "candidates": list(LABELS), "method": "in_context"}
        return {**body, "template": "caption", "max_tokens": 1, "temperature": 0, "ignore_eos": True}

    def _row(self, case: Case, milliseconds: Sample, ratio: Sample) -> Row:
        usage = self._usage[case]
        return {
            "case": case.title,
            "image": case.image,
            "ms": milliseconds.median,
            "p90": milliseconds.percentile(90),
            "/ no shots": ratio.median,
            "range": ratio.spread(),
            "prompt tokens": usage["prompt_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
        }

    def _support_set(self, size: int) -> str:
        """Create a support set of newly uploaded images, each with a text and one of five labels."""
        examples = [self._example(index) for index in range(size)]
        support_set_id: str = self._client.post("/v1/support_sets", {"examples": examples})["id"]
        return support_set_id

    def _example(self, index: int) -> dict[str, Any]:
        image = self._client.post("/v1/images", self._new_image().data, "image/jpeg")["id"]
        return {"image": image, "text": random_text(self._last_seed), "label": LABELS[index % len(LABELS)]}

    def _warm(self, support_set: str) -> None:
        for template in ("caption", "classification"):
            self._warm_one(support_set, template=template, k=self._options.shots)

    def _warm_one(self, support_set: str, **fields: Any) -> dict[str, Any]:
        """Warm a support set, and return what was computed."""
        answer = self._client.post(f"/v1/support_sets/{support_set}/warm", {**fields, "wait": True})
        if answer["status"] != "ready":
            raise BenchFailed(f"the support set is not warm: {answer}")
        warm: dict[str, Any] = answer["warm"]
        return warm

    def _new_image(self) -> JpegImage:
        self._last_seed += 1
        return random_image(self._last_seed)


def _cases(options: argparse.Namespace) -> list[Case]:
    return [case for is_image_new in (True, False) for case in _cases_of_image(options, is_image_new)]


def _cases_of_image(options: argparse.Namespace, is_image_new: bool) -> Iterator[Case]:
    yield Case(is_image_new=is_image_new)
    for k in options.k:
        yield Case(k=k, is_image_new=is_image_new)
        yield Case(k=k, strategy=RICES, is_image_new=is_image_new)
    # The same shots in the same order for every query, so that prompts share their beginning.
    yield Case(k=options.shots, strategy=RICES, order="stored", is_image_new=is_image_new)
    yield Case(route=CLASSIFY, is_image_new=is_image_new)
    yield Case(route=CLASSIFY, k=options.shots, is_image_new=is_image_new)
    if is_image_new:
        for route in (COMPLETIONS, CLASSIFY):
            yield Case(route=route, k=options.shots, set_size=options.large)
            yield from (_retrieved(options, route, form) for form in FORMS)


def _retrieved(options: argparse.Namespace, route: str, form: str) -> Case:
    """Return the case whose shots are the examples of the large set that are most like a new image, in this order."""
    return Case(route=route, k=options.shots, strategy=RICES, set_size=options.large, shots_attend=form)


def _cold_cases(options: argparse.Namespace) -> list[Case]:
    return [Case(k=options.shots, strategy=strategy) for strategy in ("first", RICES)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.fewshot", description=__doc__)
    add_model(parser, "default")
    parser.add_argument("--shots", type=int, default=32, help="examples in the support set (default: 32)")
    parser.add_argument("--k", type=int, nargs="+", default=[8, 32], help="numbers of shots per request")
    parser.add_argument("--large", type=int, default=1000, help="examples in the large set (default: 1000)")
    parser.add_argument("--requests", type=int, default=4, help="requests of each of many clients (default: 4)")
    parser.add_argument("--cold", type=int, default=1, help="rounds with cold support sets (default: 1)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
