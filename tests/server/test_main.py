"""The whole server as users start it: a `python -m server` process, tested over HTTP."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import torch

from bench.target import command_of
from model import reference
from model.media import MediaLimits, load_image, resize
from model.prompt import EndOfChunk, Media, Text, encode
from model.vision import normalise
from server.openapi import document
from server.wire import WORKER_MODULE
from tests.server.conftest import image_part, png
from tests.server.documented import check, check_unless_streamed
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
CONFIG = CONFIGS["openflamingo"]
TOKENIZER = prompt_tokenizer(CONFIG.prompt)
LONG = {"prompt": "abc", "max_tokens": 500, "stream": True, "ignore_eos": True, "temperature": 0}


# the first start of the default model in a clone compiles loops: half a minute on a quiet core, more on a busy one
FIRST_START_SECONDS = 240.0


def until(condition: Callable[[], object], seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"the condition is still false after {seconds} seconds"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    """Return whether a process runs; a killed one stays a zombie until its parent or init has waited for it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


class Server:
    """A running server process with an HTTP client; the constructor returns when the server is ready."""

    def __init__(self, process: subprocess.Popen[bytes], log: Path) -> None:
        self.process = process
        self.log = log
        until(lambda: self._port() or process.poll() is not None)
        assert process.poll() is None, log.read_text()
        hooks = {"response": [check_unless_streamed]}
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{self._port()}", timeout=60, event_hooks=hooks)
        until(lambda: self.readiness() == 200, FIRST_START_SECONDS)

    def _port(self) -> int | None:
        match = re.search(r"running on http://127\.0\.0\.1:(\d+)", self.log.read_text())
        return int(match[1]) if match else None

    def readiness(self) -> int:
        return self.http.get("/health/ready").status_code

    @property
    def worker(self) -> int:
        pid: int = self.http.get("/health").json()["engine"]["pid"]
        return pid

    def workers(self) -> list[int]:
        """Return the worker and the spare."""
        children = psutil.Process(self.process.pid).children()
        return [child.pid for child in children if WORKER_MODULE in command_of(child)]

    def metric(self, name: str) -> float:
        (line,) = (s for s in self.http.get("/metrics").text.splitlines() if s.startswith(f"flamboyance:{name}"))
        return float(line.split()[-1])

    def complete(self, **fields: object) -> dict[str, Any]:
        response = self.http.post("/v1/completions", json=fields)
        assert response.status_code == 200, response.text
        body: dict[str, Any] = response.json()
        return body

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)


@contextmanager
def running(folder: Path, log: Path, *command: str) -> Iterator[Server]:
    arguments = ["--model", str(folder), "--port", "0", "--log-format", "json", "--data-dir", str(log.parent / "data")]
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, *command, *arguments], cwd=ROOT, stderr=file)
    server = None
    try:
        server = Server(process, log)
        yield server
    finally:
        if server is not None:
            server.http.close()
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(model_folder, tmp_path_factory.mktemp("log") / "log", "-m", "server") as server:
        yield server


@pytest.fixture
def scripted(model_folder: Path, tmp_path: Path) -> Iterator[Server]:
    with running(model_folder, tmp_path / "log", "-m", "tests.server.scripted_server") as server:
        yield server


def shots() -> tuple[list[dict[str, object]], list[Text | Media | EndOfChunk], list[bytes]]:
    """Return two shots and a query, as parts and as segments; the query repeats the first image."""
    red, blue = png("red", (20, 10)), png("blue", (9, 16))
    parts: list[dict[str, object]] = [
        image_part(red),
        {"type": "text", "text": "Output: red"},
        {"type": "end_of_chunk"},
        image_part(blue),
        {"type": "text", "text": "Output: blue"},
        {"type": "end_of_chunk"},
        image_part(red),
        {"type": "text", "text": "Output:"},
    ]
    media = [Media(bytes([i])) for i in range(3)]
    first: list[Text | Media | EndOfChunk] = [media[0], Text("Output: red"), EndOfChunk()]
    return parts, [*first, media[1], Text("Output: blue"), EndOfChunk(), media[2], Text("Output:")], [red, blue, red]


def pixels(data: bytes) -> torch.Tensor:
    frame = torch.from_numpy(resize(load_image(data, MediaLimits()), CONFIG.vision).copy())
    return normalise(frame[None], CONFIG.vision)


def test_greedy_tokens_and_log_probabilities_equal_the_references(server: Server) -> None:
    parts, segments, images = shots()
    encoded, model = encode(segments, TOKENIZER), tiny_model(CONFIG)
    frames = [pixels(data) for data in images]
    expected = reference.generate(
        model,
        encoded.token_ids,
        encoded.media_index,
        frames,
        max_tokens=12,
        eos_ids=TOKENIZER.eos_ids,
        suppressed_ids=TOKENIZER.suppressed_ids,
    )
    body = server.complete(
        prompt=parts, max_tokens=12, temperature=0, return_token_ids=True, echo=True, logprobs=0, seed=1
    )
    (choice,) = body["choices"]
    assert choice["prompt_token_ids"] == encoded.token_ids
    assert choice["token_ids"] == expected.token_ids
    scores = reference.log_probs(model, encoded.token_ids, encoded.media_index, reference.encode(model, frames))
    prompt = [float(row[token_id]) for row, token_id in zip(scores[:-1], encoded.token_ids[1:], strict=True)]
    assert choice["logprobs"]["token_logprobs"][0] is None
    assert choice["logprobs"]["token_logprobs"][1:] == pytest.approx([*prompt, *expected.logprobs], abs=2e-3)
    assert body["usage"]["fewshot_details"]["media_deduplicated"] == 1


def test_a_stream_has_the_same_text(server: Server) -> None:
    parts, _, _ = shots()
    fields = {"prompt": parts, "max_tokens": 12, "temperature": 0}
    whole = server.complete(**fields)["choices"][0]["text"]
    response = server.http.post("/v1/completions", json=fields | {"stream": True})
    check(response)
    lines = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "data: [DONE]"
    assert "".join(json.loads(line[6:])["choices"][0]["text"] for line in lines[:-1]) == whole


def test_the_version_has_the_digests_of_the_weights(server: Server, model_folder: Path) -> None:
    def weights() -> list[dict[str, Any]]:
        listed: list[dict[str, Any]] = server.http.get("/version").json()["weights"]
        return listed

    until(lambda: all(file["sha256"] for file in weights()))
    data = (model_folder / "model.safetensors").read_bytes()
    digest = hashlib.sha256(data).hexdigest()
    assert weights() == [{"file": "model.safetensors", "bytes": len(data), "sha256": digest}]


def test_the_server_conforms_to_its_document(server: Server) -> None:
    """The client checks every response; routes that no other test of this file calls follow here."""
    assert server.http.get("/openapi.json").json() == document()
    assert server.http.get("/docs").status_code == 200
    for path in (
        "/health",
        "/health/live",
        "/health/progress",
        "/version",
        "/metrics",
        "/v1/models",
        "/v1/support_sets",
    ):
        assert server.http.get(path).status_code == 200, path
    for path in (
        "/v1/chat/completions",
        "/v1/fewshot/completions",
        "/v1/classify",
        "/v1/decisions",
        "/v1/score",
        "/v1/embeddings",
    ):
        schema = document()["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        (example,) = document()["components"]["schemas"][schema["$ref"].rpartition("/")[2]]["examples"]
        assert server.http.post(path, json=example).status_code == 200, path
    assert server.http.post("/v1/inspect", json={"prompt": [image_part()]}).status_code == 200


def test_the_server_supports_n_answers_beam_search_and_structured_outputs(server: Server) -> None:
    prompt = [image_part(), {"type": "text", "text": "x"}]
    answers = server.complete(prompt=prompt, n=2, max_tokens=3, seed=5, ignore_eos=True, return_token_ids=True)[
        "choices"
    ]
    assert [(answer["index"], len(answer["token_ids"])) for answer in answers] == [(0, 3), (1, 3)]
    beams = server.complete(prompt=prompt, n=2, use_beam_search=True, max_tokens=3, return_token_ids=True)["choices"]
    assert len({tuple(answer["token_ids"]) for answer in beams}) == 2
    choice = {"choice": ["cat", "dog"]}
    assert server.complete(prompt=prompt, structured_outputs=choice)["choices"][0]["text"] in choice["choice"]


def test_tiny_numbers_leave_the_worker_running(server: Server) -> None:
    worker = server.worker
    for fields in (
        {"repetition_penalty": 1e-38},
        {"temperature": 1e-38, "top_p": 0.9},
        {"temperature": 1e-40, "top_k": 5, "n": 2},
    ):
        body = server.complete(prompt="a", max_tokens=4, ignore_eos=True, **fields)
        assert [choice["finish_reason"] for choice in body["choices"]] == ["length"] * len(body["choices"])
    assert server.worker == worker


@pytest.mark.parametrize("stream", [False, True])
def test_a_grammar_that_the_worker_refuses_is_the_clients_error(server: Server, stream: bool) -> None:
    fields = {"prompt": "a", "n": 2, "structured_outputs": {"regex": "a("}, "stream": stream}
    response = server.http.post("/v1/completions", json=fields)
    error = response.json()["error"]
    assert (response.status_code, error["code"], error["param"]) == (400, "invalid_value", "structured_outputs")
    assert "invalid regular expression" in error["message"]


def test_a_repeated_image_is_not_encoded_again(server: Server) -> None:
    prompt = [image_part(png("green", (31, 17))), {"type": "text", "text": "x"}]
    first, second = (server.complete(prompt=prompt, max_tokens=1)["usage"]["fewshot_details"] for _ in range(2))
    assert (first["media_encoded"], first["media_cached"]) == (1, 0)
    assert (second["media_encoded"], second["media_cached"]) == (0, 1)


def test_a_broken_image_fails_its_request_and_the_error_names_the_part(server: Server) -> None:
    prompt = [image_part(), image_part(png()[:50]), {"type": "text", "text": "x"}]
    error = server.http.post("/v1/completions", json={"prompt": prompt}).json()["error"]
    assert (error["code"], error["param"]) == ("invalid_media", "prompt[1].image_url.url")
    assert server.readiness() == 200


def test_a_client_that_disconnects_aborts_its_request(server: Server) -> None:
    aborted = server.metric('request_success_total{finished_reason="abort"')
    with server.http.stream("POST", "/v1/completions", json=LONG) as response:
        next(response.iter_lines())
    until(lambda: server.metric('request_success_total{finished_reason="abort"') == aborted + 1)
    until(lambda: server.metric("num_requests_running{") == 0)


def test_a_killed_worker_ends_its_streams_with_an_error_and_restarts(server: Server) -> None:
    pid = server.worker
    with server.http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(pid, signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data: ")]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_died"
    assert rest[-1] == "data: [DONE]"
    refused = server.http.post("/v1/completions", json={"prompt": "x"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "engine_not_ready")
    assert refused.headers["retry-after"]
    until(lambda: server.readiness() == 200)
    assert server.worker != pid
    assert server.complete(prompt="x", max_tokens=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_after_a_signal_a_running_request_finishes_and_new_ones_are_refused(scripted: Server, number: int) -> None:
    with scripted.http.stream("POST", "/v1/completions", json=LONG | {"max_tokens": 400}) as response:
        lines = response.iter_lines()
        next(lines)
        scripted.process.send_signal(number)
        until(lambda: scripted.readiness() == 503)
        refused = scripted.http.post("/v1/completions", json={"prompt": "x"})
        assert refused.json()["error"]["code"] == "shutting_down"
        rest = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    assert rest[-1]["choices"][0]["finish_reason"] == "length"
    assert scripted.process.wait(timeout=30) == 0


def test_a_second_signal_ends_running_requests_with_an_error(scripted: Server) -> None:
    worker = scripted.worker
    with scripted.http.stream("POST", "/v1/completions", json=LONG | {"ignore_eos": False}) as response:
        lines = response.iter_lines()
        next(lines)
        scripted.process.send_signal(signal.SIGTERM)
        until(lambda: scripted.readiness() == 503)
        scripted.process.send_signal(signal.SIGINT)
        rest = [line for line in lines if line.startswith("data: ")]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
    assert scripted.process.wait(timeout=30) == 0
    until(lambda: not is_alive(worker))


def test_a_worker_and_its_spare_do_not_outlive_their_server(scripted: Server) -> None:
    until(lambda: len(scripted.workers()) == 2)
    workers = scripted.workers()
    assert scripted.worker in workers
    scripted.process.kill()
    until(lambda: not any(map(is_alive, workers)))


# `main`, with the preparation of the model or the server replaced by something that never ends
STALLED = """
import asyncio, subprocess, sys, types
from server import start as program
def prepare_model(settings):
    subprocess.run([sys.executable, "-c", "import time; time.sleep(600)"])
async def serve(settings, spare):
    await asyncio.sleep(600)
if sys.argv.pop(1) == "model":
    program.with_model = prepare_model
else:
    sys.modules["server.serving"] = types.SimpleNamespace(serve=serve)
sys.exit(program.main(sys.argv[1:]))
"""


def has_started_a_program(pid: int) -> bool:
    parent = psutil.Process(pid)
    return any(command_of(child) not in ([], command_of(parent)) for child in parent.children())


@pytest.mark.parametrize("stalled", ["model", "server"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_during_startup_leaves_no_process_and_no_file(
    stalled: str, number: signal.Signals, model_folder: Path, tmp_path: Path
) -> None:
    command = [sys.executable, "-c", STALLED, stalled, "--model", str(model_folder), "--port", "0"]
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            until(lambda: has_started_a_program(process.pid))
            # A signal within `Popen` itself would leave the child: that is for Python to mend.
            time.sleep(0.5)
            children = [child.pid for child in psutil.Process(process.pid).children()]
            process.send_signal(number)
            _, errors = process.communicate(timeout=30)
        finally:
            process.kill()
    assert (process.returncode, errors) == (128 + number, "")
    until(lambda: not any(map(is_alive, children)))
    assert not list(tmp_path.iterdir())


def test_the_server_exits_with_an_error_if_weights_are_missing(model_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "tokenizer.json"):
        (tmp_path / name).write_bytes((model_folder / name).read_bytes())
    command = [sys.executable, "-m", "server", "--model", str(tmp_path), "--port", "0"]
    finished = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    last = finished.stderr.splitlines()[-1]
    assert last.startswith("error: model: ")
    assert "holds no weights" in last


def test_the_api_process_never_loads_torch() -> None:
    heavy = {"torch", "timm", "torchvision", "triton"}
    code = f"import sys, server.start, server.serving; print(sorted({heavy} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
