"""The scripts of docs/examples run with a tiny model; they and the README's Python answer right with the default model."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from model.folder import save_folder
from model.zoo.default import prepare
from tests.server.conftest import data_url as png_url
from tests.server.conftest import png
from tests.server.test_docs import API, section
from tests.server.test_main import ROOT, Server, running
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

CONFIG = CONFIGS["openflamingo"]
EXAMPLES = ROOT / "docs" / "examples"
WORDS = {"elephant": "dax", "bicycle": "wug", "banana": "blicket"}
TEXTURES = ("brick", "grass", "gravel")
ANSWER = re.compile(r'(\S.*): expected "(.*)", answered "(.*?)"(?: \(confidence ([\d.]+)\))?')
MIN_CONFIDENCE = 0.8
MAX_BYTES = 30_000
SECONDS = 120
# the sections of docs/api.md with an example whose answer has a usage, and their routes
ROUTES = {
    "Completions": "/v1/completions",
    "Chat": "/v1/chat/completions",
    "Few-shot completions": "/v1/fewshot/completions",
    "Classification": "/v1/classify",
    "Decisions": "/v1/decisions",
}
# the set of these examples, with the texts of the written prompt
PETS = {"a1": ("A sleeping cat.", "cat"), "a4": ("Two cats.", "cat"), "a7": ("A dog on a lawn.", "dog")}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    with running(folder, tmp_path_factory.mktemp("log") / "log", "-m", "server") as server:
        yield server


@pytest.fixture(scope="module")
def default_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with running(prepare(), tmp_path_factory.mktemp("log") / "log", "-m", "server") as server:
        yield server


def run(script: str, server: Server, *arguments: str) -> list[str]:
    """Return the lines of the script's output."""
    done = start(script, server, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


def start(script: str, server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(EXAMPLES / script), str(server.http.base_url).rstrip("/"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)


def answers(lines: list[str]) -> list[tuple[str, str, str, float]]:
    """Return file, expected word, answered word and confidence (0 if the script prints none) of each answer."""
    matches = [ANSWER.fullmatch(line) for line in lines]
    return [(m[1], m[2], m[3], float(m[4] or 0)) for m in matches if m]


def data_url(file: Path) -> str:
    return f"data:image/png;base64,{base64.b64encode(file.read_bytes()).decode()}"


def latest(server: Server, path: str) -> dict[str, Any]:
    """Return the newest item of a list, as its own route shows it."""
    newest = server.http.get(f"{path}/{server.http.get(path).json()['last_id']}")
    item: dict[str, Any] = newest.json()
    return item


@pytest.mark.parametrize("file", [*EXAMPLES.rglob("*.png"), *EXAMPLES.rglob("*.jpg")], ids=lambda file: file.name)
def test_an_example_image_is_small(file: Path) -> None:
    assert file.stat().st_size < MAX_BYTES


def test_the_few_shot_script_prints_each_answer_next_to_the_expected_word(server: Server) -> None:
    lines = run("fewshot.sh", server)
    assert [(file, word) for file, word, *_ in answers(lines[::2])] == [
        (f"fluent-{name}.png", word) for name, word in WORDS.items()
    ]
    assert [len(json.loads(line)["choices"]) for line in lines[1::2]] == [1, 1, 1]


def test_the_default_model_names_each_drawing_with_its_made_up_word(default_server: Server) -> None:
    lines = run("fewshot.sh", default_server)
    assert [answer for _, _, answer, _ in answers(lines)] == list(WORDS.values())
    usage = [json.loads(line)["usage"]["fewshot_details"] for line in lines[1::2]]
    assert [details["media_encoded"] for details in usage] == [4, 1, 1]


def test_the_default_model_is_sure_of_the_drawings(default_server: Server) -> None:
    """The template writes the script's own prompts."""
    shots = [{"image": data_url(EXAMPLES / f"noto-{name}.png"), "label": word} for name, word in WORDS.items()]
    for name, word in WORDS.items():
        fields = {
            "shots": shots,
            "query": {"image": data_url(EXAMPLES / f"fluent-{name}.png")},
            "template": {"shot": "{media}This is a {label}."},
        }
        answer = default_server.http.post("/v1/classify", json=fields).json()
        assert (answer["label"], answer["confidence"] > MIN_CONFIDENCE) == (word, True), answer


def test_the_support_set_script_evaluates_and_classifies_the_textures(server: Server) -> None:
    counts, reason, *lines = run("support_set.sh", server)
    assert json.loads(counts) == dict.fromkeys(TEXTURES, 2)
    assert "on 6 left-out examples" in json.loads(reason)
    assert [(file, label) for file, label, *_ in answers(lines)] == [(f"{name}/3.jpg", name) for name in TEXTURES]
    assert {answer for _, _, answer, _ in answers(lines)} <= set(TEXTURES)
    assert latest(server, "/v1/support_sets")["status"] == "ready"
    evaluation = latest(server, "/v1/evaluations")
    assert (evaluation["status"], evaluation["request"]["k"]) == ("completed", [4])


def test_the_support_set_script_reads_labels_with_commas(server: Server, tmp_path: Path) -> None:
    for name in TEXTURES:
        shutil.copytree(EXAMPLES / "textures" / "shots" / name, tmp_path / f"rough, {name}")
    _, _, *lines = run("support_set.sh", server, str(tmp_path), str(tmp_path))
    expected = {f"rough, {name}" for name in TEXTURES}
    assert {label for _, label, *_ in answers(lines)} == expected
    assert {answer for _, _, answer, _ in answers(lines)} <= expected


def test_the_default_model_classifies_the_textures(default_server: Server) -> None:
    _, reason, *lines = run("support_set.sh", default_server)
    # several methods are right each time; the one with the least surprise is named
    assert re.match(r"(nearest_mean|knn|linear) has an accuracy of 1\.000 on 6 left-out ", json.loads(reason))
    assert [answer for _, _, answer, _ in answers(lines)] == list(TEXTURES)
    assert min(confidence for *_, confidence in answers(lines)) > MIN_CONFIDENCE


def test_the_readmes_python_classifies_a_texture_and_runs_twice(
    default_server: Server, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    monkeypatch.chdir(ROOT)
    for _ in range(2):
        exec(compile(code.replace("http://127.0.0.1:8000", str(default_server.http.base_url)), "README.md", "exec"), {})
        label, confidence = capsys.readouterr().out.split()
        assert (label, float(confidence) > MIN_CONFIDENCE) == ("gravel", True)
    assert latest(default_server, "/v1/support_sets")["version"] == 1


def test_the_tutorials_python_prints_what_the_tutorial_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    page = (ROOT / "docs" / "teach.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```(?:\n\n```text\n(.*?)```)?", page, flags=re.DOTALL)
    assert len(blocks) == 5
    assert all(output for _, output in blocks)
    monkeypatch.chdir(ROOT)
    names: dict[str, Any] = {}
    with running(prepare(), tmp_path / "log", "-m", "server") as server:
        for code, output in blocks:
            code = code.replace("http://127.0.0.1:8000", str(server.http.base_url))
            exec(compile(code, "teach.md", "exec"), names)
            assert capsys.readouterr().out == output


@pytest.fixture(scope="module")
def server_with_pets(default_server: Server) -> Server:
    """The default model with the set `pets`, whose media are encoded."""
    examples = [
        {"id": name, "image": png_url(png(f"hsl({index}, 100%, 40%)")), "text": text, "label": label}
        for index, (name, (text, label)) in enumerate(PETS.items())
    ]
    default_server.http.post("/v1/support_sets", json={"name": "pets", "examples": examples})
    warm = default_server.http.post("/v1/support_sets/pets/warm", json={"wait": True}).json()
    assert warm["status"] == "ready", warm
    return default_server


@pytest.mark.parametrize("title", ROUTES)
def test_the_usage_of_an_example_in_the_reference_is_that_of_the_default_model(
    title: str, server_with_pets: Server
) -> None:
    """Each request has images of its own, and the documented answer may have another length than this one."""
    request, response = (documented(title, language) for language in ("sh", "json"))
    urls = (png_url(png(f"hsl({60 * list(ROUTES).index(title) + index}, 100%, 60%)")) for index in (20, 40))
    body = json.loads(re.sub(r"data:image/[a-z]+;base64,…", lambda _: next(urls), request.partition(" -d '")[2][:-1]))
    answer = server_with_pets.http.post(ROUTES[title], json=body)
    assert answer.is_success, answer.text
    assert counts(answer.json()["usage"]) == counts(json.loads(response)["usage"])


@pytest.mark.parametrize("title", ["Completions", "Chat", "Few-shot completions"])
def test_the_tokens_of_a_documented_answer_are_those_of_its_text_and_its_end(
    title: str, default_server: Server
) -> None:
    response = json.loads(documented(title, "json"))
    (choice,), usage = response["choices"], response["usage"]
    text = " " + (choice.get("text") or choice["message"]["content"]).strip()
    tokens = default_server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert usage["completion_tokens"] == len(tokens) + 1
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def documented(title: str, language: str) -> str:
    """Return the first block of code of a language in a section of the reference."""
    return re.findall(rf"^```{language}\n(.*?)\n```", section(API, title), flags=re.DOTALL | re.MULTILINE)[0]


def counts(usage: dict[str, Any]) -> dict[str, Any]:
    """Return the numbers that do not depend on the length of the answer, and no id or version of the set."""
    left_out = {"completion_tokens", "total_tokens", "support_set", "version"}
    return {
        name: counts(value) if isinstance(value, dict) else value
        for name, value in usage.items()
        if name not in left_out
    }


def test_a_support_set_of_a_folder_by_label(server: Server, tmp_path: Path) -> None:
    shots, queries = tmp_path / "its images", tmp_path / "queries"
    for index, colour in enumerate(("red", "green", "blue", "white")):
        file = shots / ("warm" if colour == "red" else "not so warm") / f"{colour} one.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(colour, (20, 10 + index)))
    query = queries / "not so warm" / "purple one.jpg"
    query.parent.mkdir(parents=True)
    query.write_bytes(png("purple"))
    counts, _, *lines = run("support_set.sh", server, str(shots), str(queries))
    assert json.loads(counts) == {"warm": 1, "not so warm": 3}
    ((name, expected, answer, _),) = answers(lines)
    assert (name, expected) == ("not so warm/purple one.jpg", "not so warm")
    assert answer in ("warm", "not so warm")


@pytest.mark.parametrize("script", ["fewshot.sh", "support_set.sh"])
def test_a_script_waits_until_the_model_is_loaded(script: str) -> None:
    statuses = [503, 503, 200]

    class Loading(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(statuses.pop(0) if self.path == "/health/ready" else 500)
            self.end_headers()

        def do_POST(self) -> None:
            self.send_response(418)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    # bound, but not listening: connections are refused, as while the first start downloads the model
    with HTTPServer(("127.0.0.1", 0), Loading, bind_and_activate=False) as loading:
        loading.server_bind()
        url = f"http://127.0.0.1:{loading.server_port}"
        command = ["bash", str(EXAMPLES / script), url]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            first = process.stderr.readline()
            loading.server_activate()
            threading.Thread(target=loading.serve_forever, daemon=True).start()
            _, errors = process.communicate(timeout=SECONDS)
        loading.shutdown()
    assert first == f"waiting until {url} is ready\n"
    assert statuses == []
    assert "503" not in errors  # one line for the wait, not one per attempt
    assert "418" in errors


@pytest.mark.parametrize("script", ["fewshot.sh", "support_set.sh"])
def test_a_script_that_waits_in_vain_says_what_it_knows(script: str) -> None:
    with HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler, bind_and_activate=False) as absent:
        absent.server_bind()
        url = f"http://127.0.0.1:{absent.server_port}"
        done = subprocess.run(
            ["bash", str(EXAMPLES / script), url],
            env={**os.environ, "WAIT_SECONDS": "2"},
            capture_output=True,
            text=True,
            timeout=SECONDS,
            check=False,
        )
    advice = r"See the server's log, and run this script again\."
    assert done.returncode == 1
    first, last = done.stderr.splitlines()
    assert first == f"waiting until {url} is ready"
    assert re.fullmatch(rf"{url} is not ready after \d s \(last status: 000\)\. {advice}", last)


def test_an_error_response_ends_the_script_and_is_printed(server: Server, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b.jpg").write_bytes(b"no image")
    done = start("support_set.sh", server, str(tmp_path), str(tmp_path))
    assert done.returncode == 1
    assert "invalid_media" in done.stderr


@pytest.mark.parametrize("script", ["fewshot.sh", "support_set.sh"])
def test_a_script_sends_the_key_of_its_environment(script: str, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = []

    class Guarded(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()

        def do_POST(self) -> None:
            keys.append(self.headers["Authorization"])
            self.send_response(418)
            self.end_headers()

        def log_message(self, *arguments: object) -> None:
            pass

    monkeypatch.setenv("FLAMBOYANCE_API_KEY", "secret")
    with HTTPServer(("127.0.0.1", 0), Guarded) as guarded:
        threading.Thread(target=guarded.serve_forever, daemon=True).start()
        command = ["bash", str(EXAMPLES / script), f"http://127.0.0.1:{guarded.server_port}"]
        subprocess.run(command, capture_output=True, timeout=SECONDS, check=False)
        guarded.shutdown()
    assert keys == ["Bearer secret"]
