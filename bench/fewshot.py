"""What shots cost over HTTP: `python -m bench.fewshot [--model FOLDER] [--repeats 15]`.

By turns, the first token of a query alone and of the same kind of query behind a warm support set, and the time of a
classification. A new picture is one that the server has never seen; it is sent as a JPEG, and has to be encoded either way.
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
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from bench.drive import BenchFailed
from bench.options import add_model, model_folder, parse, server_settings, shown
from bench.serving import HOST, REQUEST_SECONDS, serving
from bench.table import Bar, Report, Row, Run, Sample, interleave
from bench.workload import NOUNS, Picture, picture, text

QUICK = {"model": "tiny", "shots": 4, "k": [2, 4], "repeats": 1, "cold": 1}
AT_MOST = 1.5
COMPLETIONS = "/v1/fewshot/completions"
CLASSIFY = "/v1/classify"
RICES = "rices_image"
WHAT = {COMPLETIONS: "first token", CLASSIFY: "classify"}
LABELS = NOUNS[:5]
# of the picture that is asked about again and again; new ones come behind it
SEEN_SEED = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A kind of request. `k` 0: without shots; `order` None: the strategy's own."""

    route: str = COMPLETIONS
    k: int = 0
    strategy: str = "first"
    order: str | None = None
    is_new: bool = True

    @property
    def what(self) -> str:
        order = f" {self.order}" if self.order else ""
        return f"{WHAT[self.route]}, {self.k} shots" + (f", {self.strategy}{order}" if self.k else "")

    @property
    def picture(self) -> str:
        return "new" if self.is_new else "seen"

    @property
    def name(self) -> str:
        return f"{self.what}, {self.picture} picture"

    @property
    def alone(self) -> Case:
        """The same without shots."""
        return replace(self, k=0, strategy="first", order=None)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, QUICK)
    report = Report("What shots cost over HTTP, milliseconds", shown(options))
    with tempfile.TemporaryDirectory() as data_dir:
        settings = server_settings(options, model_folder(options.model), data_dir=data_dir)
        with serving(settings) as server:
            FewShot(options, Caller(server.port)).measure(report)
    report.print()
    return 0


class Caller:
    """One client with one connection, that waits for each answer."""

    def __init__(self, port: int) -> None:
        self._connection = http.client.HTTPConnection(HOST, port, timeout=REQUEST_SECONDS)

    def post(
        self, path: str, body: Mapping[str, Any] | bytes, content_type: str = "application/json"
    ) -> dict[str, Any]:
        """Raises `BenchFailed` for any answer but success."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._connection.request("POST", path, data, {"Content-Type": content_type})
        response = self._connection.getresponse()
        answer = response.read()
        if not 200 <= response.status < 300:
            raise BenchFailed(f"POST {path} was answered {response.status}: {answer.decode()}")
        found: dict[str, Any] = json.loads(answer)
        return found


class FewShot:
    def __init__(self, options: argparse.Namespace, server: Caller) -> None:
        self._options = options
        self._server = server
        self._next = SEEN_SEED
        self._usage: dict[Case, dict[str, Any]] = {}

    def measure(self, report: Report) -> None:
        cases, warm = _cases(self._options), self._support_set()
        self._warm(warm)
        for case in cases:  # what nobody has asked for yet: the set's vectors, the seen picture
            self._time(case, warm)
        measured = interleave(self._round(cases, warm) for _ in range(self._options.repeats))
        for case in cases:
            ratio = measured[case.name].over(measured[case.alone.name])
            report.add(self._row(case, measured[case.name], ratio))
            if case.k == self._options.shots and case.is_new and case.route == COMPLETIONS:
                report.bars.append(Bar(name=f"{case.name} / no shots", value=ratio.median, at_most=AT_MOST))
        self._add_cold(report, _cold_cases(self._options))

    def _add_cold(self, report: Report, cases: Sequence[Case]) -> None:
        measured = interleave(
            {case.name: partial(self._cold, case) for case in cases} for _ in range(self._options.cold)
        )
        for case in cases:
            report.add({"what": f"{case.what}, cold", "picture": case.picture, "ms": measured[case.name].median})

    def _round(self, cases: Sequence[Case], support_set: str) -> Mapping[str, Run]:
        return {case.name: partial(self._warm_time, case, support_set) for case in cases}

    def _warm_time(self, case: Case, support_set: str) -> float:
        taken = self._time(case, support_set)
        encoded = self._usage[case]["fewshot_details"]["media_encoded"]
        if encoded > case.is_new:
            raise BenchFailed(f"{case.name}: {encoded} media were encoded, so the support set was not warm")
        return taken

    def _cold(self, case: Case) -> float:
        """With a set that nobody has asked for: this request pays for all of its pictures."""
        return self._time(case, self._support_set())

    def _time(self, case: Case, support_set: str) -> float:
        """Milliseconds until the answer is there: one token, or the probabilities of all candidates."""
        body = json.dumps(self._body(case, support_set)).encode()
        began = time.perf_counter()
        answer = self._server.post(case.route, body)
        taken = 1000 * (time.perf_counter() - began)
        if len(answer["fewshot"]["shots"]) != case.k:
            raise BenchFailed(f"{case.name}: {len(answer['fewshot']['shots'])} shots were shown")
        self._usage[case] = answer["usage"]
        return taken

    def _body(self, case: Case, support_set: str) -> dict[str, Any]:
        asked = self._new() if case.is_new else picture(SEEN_SEED)
        body: dict[str, Any] = {"query": {"image": "data:image/jpeg;base64," + base64.b64encode(asked.data).decode()}}
        if case.k:
            chosen = {"support_set": support_set, "k": case.k, "strategy": case.strategy, "order": case.order}
            body["examples"] = chosen
        if case.route == CLASSIFY:
            return {**body, "candidates": list(LABELS)}
        return {**body, "template": "caption", "max_tokens": 1, "temperature": 0, "ignore_eos": True}

    def _row(self, case: Case, taken: Sample, ratio: Sample) -> Row:
        usage = self._usage[case]
        return {
            "what": case.what,
            "picture": case.picture,
            "ms": taken.median,
            "p90": taken.percentile(90),
            "of no shots": ratio.median,
            "seen": ratio.spread(),
            "prompt tokens": usage["prompt_tokens"],
            "cached": usage["prompt_tokens_details"]["cached_tokens"],
        }

    # what is asked about

    def _support_set(self) -> str:
        """New pictures, uploaded, with a text and one of five labels each."""
        examples = [self._example(number) for number in range(self._options.shots)]
        made: str = self._server.post("/v1/support_sets", {"examples": examples})["id"]
        return made

    def _example(self, number: int) -> dict[str, Any]:
        image = self._server.post("/v1/images", self._new().data, "image/jpeg")["id"]
        return {"image": image, "text": text(self._next), "label": LABELS[number % len(LABELS)]}

    def _warm(self, support_set: str) -> None:
        for template in ("caption", "classification"):
            wanted = {"template": template, "k": self._options.shots, "wait": True}
            found = self._server.post(f"/v1/support_sets/{support_set}/warm", wanted)
            if found["status"] != "ready":
                raise BenchFailed(f"the support set is not warm: {found}")

    def _new(self) -> Picture:
        self._next += 1
        return picture(self._next)


def _cases(options: argparse.Namespace) -> list[Case]:
    return [case for is_new in (True, False) for case in _of_picture(options, is_new)]


def _of_picture(options: argparse.Namespace, is_new: bool) -> Iterator[Case]:
    yield Case(is_new=is_new)
    for k in options.k:
        yield Case(k=k, is_new=is_new)
        yield Case(k=k, strategy=RICES, is_new=is_new)
    # the same shots whatever is asked about, so the same beginning of the prompt
    yield Case(k=options.shots, strategy=RICES, order="stored", is_new=is_new)
    yield Case(route=CLASSIFY, is_new=is_new)
    yield Case(route=CLASSIFY, k=options.shots, is_new=is_new)


def _cold_cases(options: argparse.Namespace) -> list[Case]:
    return [Case(k=options.shots, strategy=strategy) for strategy in ("first", RICES)]


def _parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m bench.fewshot", description=__doc__)
    add_model(made, "default")
    made.add_argument("--shots", type=int, default=32, help="examples of the support set (default: 32)")
    made.add_argument("--k", type=int, nargs="+", default=[8, 32], help="shots of a request, rows each")
    made.add_argument("--cold", type=int, default=1, help="rounds with sets that are not warm (default: 1)")
    return made


if __name__ == "__main__":
    sys.exit(main())
