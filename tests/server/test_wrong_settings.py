"""Startup fails for a setting that cannot work, with one line that names it."""

from __future__ import annotations

import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from model.folder import WEIGHTS
from model.likeness import LIKENESS
from model.zoo.default import DEFAULT
from server.engine.build import build, engine_config
from server.engine_client.spare import Spare
from server.served_model import ServedModel
from server.serving import serve
from server.settings import Settings, SettingsError, trusted_proxies
from server.start import main
from tests.tiny_models import CONFIGS

pytestmark = pytest.mark.anyio

ROOT = Path(__file__).resolve().parents[2]
CONFIG = CONFIGS["openflamingo"]
Change = Callable[[Path], object]


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model_folder, tmp_path / "model")


def a_file(tmp_path: Path) -> Path:
    (tmp_path / "file").write_text("")
    return tmp_path / "file"


def with_config(part: str, **values: object) -> Change:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        config[part] |= values
        (folder / "config.json").write_text(json.dumps(config))

    return change


def cut(name: str, num_bytes: int) -> Change:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:num_bytes])


def without(name: str) -> Change:
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("num_threads", "0", "num_threads: must be at least 1"),
        ("num_threads", "100000", "num_threads: must be at most 1024"),
        ("port", "70000", "port: must be at most 65535"),
        ("host", "nowhere.invalid", "host: 'nowhere.invalid' is not an address or name"),
        ("host", "203.0.113.7", "host: '203.0.113.7' is not an address of this machine; 0.0.0.0"),
        ("config", "/nowhere.yaml", "config: /nowhere.yaml: "),
    ],
)
def test_the_command_names_a_wrong_setting_in_one_line(
    name: str, value: str, message: str, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--model", str(model_folder), f"--{name.replace('_', '-')}", value]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line), line


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("proxy.internal", "'proxy.internal' does not appear to be an IPv4 or IPv6 address"),
        ("127.0.0.1, 10.0.0.1/8", "10.0.0.1/8 has host bits set"),
        ("*,127.0.0.1", "'*' does not appear to be an IPv4 or IPv6 address"),
    ],
)
def test_a_proxy_that_is_no_address_is_named_in_one_line(
    value: str, message: str, model_folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """No proxy has such an address: all its clients would count as one."""
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", value)
    assert main(["--model", str(model_folder), "--port", "0"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: FORWARDED_ALLOW_IPS: {message}; addresses and networks are separated by commas")


@pytest.mark.parametrize("value", ["", "*", "127.0.0.1", "10.0.0.0/8, ::1,fd00::/8,"])
def test_addresses_and_networks_of_proxies_are_accepted(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORWARDED_ALLOW_IPS", value)
    assert trusted_proxies() == value


def test_a_file_of_settings_that_is_not_yaml_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.yaml").write_text("port: 1\nhost: a: b\n")
    assert main(["--config", str(tmp_path / "bad.yaml")]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: config: {tmp_path}/bad.yaml: mapping values are not allowed here")
    assert "line 2, column 8" in line


@pytest.mark.parametrize("model", [[], ["--model", "me/model"]])
def test_a_cache_that_cannot_be_created_is_named(
    model: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = a_file(tmp_path) / "cache"
    assert main([*model, "--port", "0", "--cache-dir", str(cache)]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == f"error: cache_dir: the folder {cache} cannot be created: Not a directory"


def test_a_model_that_is_no_folder_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", "/nowhere", "--port", "0", "--cache-dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: model: /nowhere is no folder")


def test_a_port_in_use_is_named(model_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["--model", str(model_folder), "--port", str(port)]) == 2
    assert f"error: port: {port} is in use on 127.0.0.1; set another port" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_model_len": 100_000}, "max_model_len: 100000 is more than the 512 positions"),
        ({"data_dir": a_file}, "^data_dir: the folder .*file.* cannot be created"),
        ({"database": "sqlite:////proc/nothing/x.db"}, "^database: the folder /proc/nothing .* cannot be created"),
        ({"database": "mysql://host/name"}, "database: mysql is not supported"),
        ({"database": "postgresql://u:p@127.0.0.1:abc/x"}, "^database: expected a URL of the form"),
        ({"database": "postgresql://u:p@127.0.0.1:99999999/x"}, "^database: 99999999 is not a port"),
        ({"database": "postgresql://u:p@p@127.0.0.1/x"}, "^database: the URL has more than one @: write .* as %40$"),
        ({"database": "postgresql://u:p@127.0.0.1/x?foo=bar"}, r'^database: the URL has a wrong option: .*"foo"\Z'),
        ({"database": "sqlite:////nowhere/x.db?timeout=abc"}, "^database: the URL has a wrong option: .*'abc'"),
        ({"media_store": "nosuch://bucket"}, "media_store: 'nosuch://bucket' is not a folder or URL"),
        ({"media_store": "nosuch://me:word@host/a"}, "media_store: 'nosuch://host/a' is not a folder or URL"),
        ({"media_url_hosts": "http://a.org"}, "media_url_hosts: 'http://a.org' is not a host name"),
        ({"media_url_hosts": "*.a.org"}, r"media_url_hosts: '\*.a.org' is not a host name"),
        ({"media_url_ports": "all"}, "media_url_ports: 'all' is not a port"),
        ({"model": "/nowhere"}, "model: /nowhere is not a model folder"),
        ({"model": a_file}, "model: .*file is not a model folder"),
    ],
)
async def test_the_api_process_refuses_a_wrong_setting(
    values: dict[str, Any], message: str, model_folder: Path, tmp_path: Path
) -> None:
    resolved = {name: value(tmp_path) if callable(value) else value for name, value in values.items()}
    texts = {name: str(value) if isinstance(value, Path) else value for name, value in resolved.items()}
    settings = Settings.model_validate({"model": str(model_folder), "data_dir": tmp_path / "data", "port": 0, **texts})
    with pytest.raises(SettingsError, match=message):
        await serve(settings, Spare("no:worker", 1.0))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("config.json"), "it has no config.json"),
        (cut("config.json", 9), "config.json is not JSON"),
        (without("tokenizer.json"), "tokenizer.json cannot be read as a tokenizer"),
        (cut("tokenizer.json", 99), "tokenizer.json cannot be read as a tokenizer"),
        (without(WEIGHTS), "holds no weights"),
        (cut(WEIGHTS, 5000), "model.safetensors cannot be read as safetensors"),
        (cut(WEIGHTS, 4), "model.safetensors cannot be read as safetensors"),
        (with_config("language_model", num_layers=9), "missing"),
        (with_config("vision", architecture="resnet_of_dreams"), "'resnet_of_dreams'"),
        (with_config("vision", std=[0.0, 0.0, 0.0]), r"vision\.std is \[0\.0, 0\.0, 0\.0\], must be positive"),
        (lambda folder: (folder / LIKENESS).write_bytes(b"x" * 100), "likeness.safetensors cannot be read"),
    ],
)
def test_the_worker_refuses_a_broken_model(change: Change, message: str, folder: Path) -> None:
    change(folder)
    with pytest.raises(SettingsError, match=f"^model: .*{message}"):
        build(Settings(model=str(folder), cache_dir=folder.parent, device="cpu"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"device": "cuda"}, "device: torch finds no CUDA device here; cpu and auto"),
        ({"kernels": "triton"}, "kernels: backend 'triton' was requested, but torch sees no GPU"),
        ({"kernel_launches": "x.json"}, "kernel_launches: they are for the kernels of a GPU, and the device is cpu$"),
    ],
)
def test_the_worker_refuses_a_wrong_setting(
    values: dict[str, Any], message: str, model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("kernels.backend.INTERPRETING", False)
    with pytest.raises(SettingsError, match=f"^{message}"):
        build(Settings(model=str(model_folder), cache_dir=tmp_path, **values))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"kv_cache_mb": 100},
            "kv_cache_mb: 100 holds 568 blocks of 4 tokens, .*8192 needs 2048; raise kv_cache_mb or",
        ),
        ({"kv_cache_mb": 1, "block_size": 1024}, "kv_cache_mb: 1 is less than one entry"),
        ({"media_cache_mb": 1}, "media_cache_mb: 1 is less than one entry"),
    ],
)
def test_caches_that_hold_no_request_are_refused(values: dict[str, Any], message: str, model_folder: Path) -> None:
    served = replace(ServedModel.load(Settings(model=str(model_folder))), config=DEFAULT, max_model_len=8192)
    with pytest.raises(SettingsError, match=f"^{message}"):
        engine_config(served, Settings(device="cpu", **values), torch.float32)


def test_an_error_of_the_worker_ends_the_command_with_one_line(model_folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "server", "--model", str(model_folder), "--port", "0", "--kernels", "triton"]
    finished = subprocess.run(
        [*command, "--data-dir", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, timeout=120, check=False
    )
    assert finished.returncode == 2
    assert "Traceback" not in finished.stderr
    assert finished.stderr.splitlines()[-1].startswith("error: kernels: backend 'triton' was requested")
    assert " ERROR " not in finished.stderr
