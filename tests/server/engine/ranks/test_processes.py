"""A server on a divided model: two processes answer as one model does, and live and die together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from bench.target import command_of
from model.presets.published import MODELS
from model.prompt import encode
from model.ranks import Rank
from model.reference import generate
from server.engine.build import _device, build
from server.engine.ranks.division import check_memory
from server.engine.ranks.group import MODULE
from server.settings import Settings, SettingsError
from tests.server.test_main import CONFIG, LONG, ROOT, TOKENIZER, Server, is_alive, pixels, running, shots, until
from tests.tiny_models import tiny_model


@pytest.fixture(scope="module")
def server(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    log = tmp_path_factory.mktemp("log") / "log"
    with running(model_folder, log, "-m", "server", "--tensor-parallel", "2") as server:
        yield server


def followers(server: Server) -> list[int]:
    children = psutil.Process(server.worker).children()
    return [child.pid for child in children if MODULE in command_of(child)]


def assert_answers(server: Server) -> None:
    """Check that the answer to a few-shot prompt is the reference's."""
    parts, segments, images = shots()
    encoded = encode(segments, TOKENIZER)
    expected = generate(
        tiny_model(CONFIG),
        encoded.token_ids,
        encoded.media_index,
        [pixels(data) for data in images],
        max_tokens=12,
        eos_ids=TOKENIZER.eos_ids,
        suppressed_ids=TOKENIZER.suppressed_ids,
    )
    body = server.complete(prompt=parts, max_tokens=12, temperature=0, return_token_ids=True, logprobs=0)
    (choice,) = body["choices"]
    assert choice["token_ids"] == expected.token_ids
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(expected.logprobs, abs=2e-3)


def test_two_processes_give_the_references_answer(server: Server) -> None:
    assert_answers(server)
    assert server.http.get("/health").json()["engine"]["tensor_parallel"] == 2
    assert len(followers(server)) == 1


def test_a_killed_rank_ends_the_others_and_all_are_restarted(server: Server) -> None:
    worker, (follower,) = server.worker, followers(server)
    with server.http.stream("POST", "/v1/completions", json=LONG) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(follower, signal.SIGKILL)
        rest = [line for line in lines if line.startswith("data: ")]
    assert json.loads(rest[-2].removeprefix("data: "))["error"]["code"] == "engine_died"
    until(lambda: not is_alive(worker))
    until(lambda: server.readiness() == 200)
    assert server.worker != worker
    assert follower not in followers(server)
    assert_answers(server)


def test_a_rank_that_dies_between_requests_ends_the_worker_at_once(server: Server) -> None:
    worker, (follower,) = server.worker, followers(server)
    os.kill(follower, signal.SIGKILL)
    until(lambda: not is_alive(worker))
    until(lambda: server.readiness() == 200)
    assert server.worker != worker


def test_a_rank_ends_with_its_input() -> None:
    command = [sys.executable, "-m", MODULE]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0


def test_a_killed_worker_leaves_no_rank_behind(server: Server) -> None:
    worker, (follower,) = server.worker, followers(server)
    os.kill(worker, signal.SIGKILL)
    until(lambda: not is_alive(follower))
    until(lambda: server.readiness() == 200)
    assert_answers(server)


def test_a_rank_that_hangs_is_replaced_with_the_others(model_folder: Path, tmp_path: Path) -> None:
    command = ("-m", "server", "--tensor-parallel", "2", "--stall-timeout", "2")
    with running(model_folder, tmp_path / "log", *command) as server:
        worker, (follower,) = server.worker, followers(server)
        os.kill(follower, signal.SIGSTOP)
        error = server.http.post("/v1/completions", json={"prompt": "x"}).json()["error"]
        assert error["code"] == "engine_stalled"
        until(lambda: not is_alive(worker) and not is_alive(follower))
        until(lambda: server.readiness() == 200)
        assert_answers(server)


def test_an_inspection_is_refused_by_name(server: Server) -> None:
    response = server.http.post("/v1/inspect", json={"prompt": shots()[0]})
    assert "attention cannot be inspected with tensor_parallel" in response.text
    assert (response.status_code, response.json()["error"]["code"]) == (422, "unsupported_parameter")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"tensor_parallel": 3},
            "tensor_parallel: tiny-openflamingo cannot be divided by 3: language_model.num_heads is 4; 1, 2 are accepted",
        ),
        ({"weight_format": "int8"}, "weight_format: int8 is not supported with tensor_parallel 2"),
        ({"vision_format": "bfloat16"}, "vision_format: bfloat16 is not supported with tensor_parallel 2"),
    ],
)
def test_what_a_divided_model_does_not_support_is_refused_before_a_process_is_started(
    values: dict[str, object], message: str, model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.engine.ranks.group._start", lambda: pytest.fail("a process was started"))
    settings = Settings.model_validate({"model": str(model_folder), "device": "cpu", "tensor_parallel": 2, **values})
    with pytest.raises(SettingsError, match=f"^{message}"):
        build(settings)


def test_more_ranks_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(SettingsError, match=r"^tensor_parallel: 2 needs as many CUDA devices, and torch finds 1 here"):
        _device(Settings(device="cuda", tensor_parallel=2), Rank(0, 2))


def test_a_model_that_exceeds_a_gpu_names_the_number_that_is_enough() -> None:
    config, size = MODELS["idefics-80b"], 80 * 2**30
    message = "then each device must hold 149.0 GiB of weights, and the first has 80.0 GiB; 4 are enough"
    with pytest.raises(SettingsError, match=f"^tensor_parallel: 1, but {message}$"):
        check_memory(config, torch.bfloat16, 1, size, None)
    check_memory(config, torch.bfloat16, 4, size, None)
