"""The flags of a fleet, and of an update: what it replaces, and when it is refused."""

from __future__ import annotations

import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

from deploy.ray.fleet import Fleet, read_fleet
from model.folder import save_folder
from server.settings import Settings, SettingsError
from server.signals import ending_signals
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

with warnings.catch_warnings():  # of Ray's own modules
    warnings.simplefilter("ignore")
    import ray
    from ray import serve

    from deploy.ray import __main__ as program

CONFIG = CONFIGS["openflamingo"]
DATABASE = "postgresql://flamboyance@db.internal/flamboyance"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fleet") / "model"
    save_folder(folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    return folder


def fleet(folder: Path, *flags: str) -> Fleet:
    return read_fleet(["--database", DATABASE, "--model", str(folder), *flags])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], []),
        (["--replicas", "3"], []),
        (["--routing", "random"], []),
        (["--max-body-mb", "8"], ["gateways"]),
        (["--max-client-share", "1"], ["gateways"]),
        (["--request-timeout", "8"], ["gateways"]),
        (["--share-caches", "true"], ["gateways"]),
        (["--cors-origins", "https://app.example.org"], ["gateways", "replicas"]),
        (["--api-key", "another-key"], ["gateways", "replicas"]),
        (["--database", f"{DATABASE}_2"], ["gateways", "replicas"]),
        (["--generation", "2"], ["gateways", "replicas"]),
    ],
    ids=str,
)
def test_what_an_update_replaces(folder: Path, flags: list[str], expected: list[str]) -> None:
    old, new = fleet(folder), fleet(folder, *flags)
    versions = {
        "gateways": (old.gateway_version, new.gateway_version),
        "replicas": (old.version, new.version),
    }
    assert [name for name, (before, after) in versions.items() if before != after] == expected


def test_a_larger_fleet_lets_more_requests_wait_in_its_running_gateways(folder: Path) -> None:
    small, large = [fleet(folder, "--replicas", number, "--max-num-queued", "8") for number in ("2", "2-6")]
    assert (small.gateway_config["max_waiting"], large.gateway_config["max_waiting"]) == (16, 48)


@pytest.mark.parametrize(
    "flags",
    [
        ["--gateways", "0"],
        ["--max-requests", "-3"],
        ["--models-per-replica", "1.5"],
        ["--target-requests", "nan"],
        ["--cpus", "-1"],
        ["--gpus", "inf"],
    ],
    ids=str,
)
def test_a_number_that_makes_no_fleet_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fleet(folder, *flags)
    assert ended.value.code == 2
    assert f"argument {flags[0]}: {flags[1]!r} is not a" in capsys.readouterr().err


@pytest.mark.parametrize("replicas", ["2-", "-2", "0", "3-2", "two"])
def test_a_wrong_number_of_replicas_is_refused(folder: Path, replicas: str) -> None:
    with pytest.raises(SettingsError, match="--replicas: "):
        fleet(folder, f"--replicas={replicas}")


def test_a_model_has_no_limits_of_gateways(folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "models.yaml"
    file.write_text(f"mine: {{model: {folder}, max_body_mb: 200, share_caches: true}}\n")
    with pytest.raises(
        SettingsError, match="mine: max_body_mb, share_caches cannot differ between models: the gateways"
    ):
        read_fleet(["--database", DATABASE, "--models", str(file)])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"a: {dtype: float32}\na: {}\n", "the key a occurs twice"),
        (b"a: {max_model_len: 64, max_model_len: 32}\n", "the key max_model_len occurs twice"),
        (b"1: {}\n'1': {}\n", "the key 1 occurs twice"),
        (b"a: {dtype: 2026-13-45}\n", "it has a value that cannot be read"),
        (b'a: {model: "\xff"}\n', "it is not UTF-8"),
        (b"[" * 3000, "it is nested too deeply"),
        (b"a: false\n", "a: False is not a mapping of settings"),
        (b"a: 0\n", "a: 0 is not a mapping of settings"),
    ],
)
def test_a_wrong_file_of_models_is_refused(folder: Path, tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "models.yaml"
    file.write_bytes(content)
    with pytest.raises(SettingsError, match=f"^--models: .*{message}"):
        fleet(folder, "--models", str(file))


def test_a_fleet_without_its_database_does_not_start(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(program, "connect", lambda address: pytest.fail("Ray was started"))
    database = f"postgresql://user:secret-word@/name?host={tmp_path}"
    assert program.main(["--database", database, "--model", str(folder), "--port", "0"]) == 2
    output = capsys.readouterr().err
    assert "error: database: the database does not respond" in output
    assert "Traceback" not in output
    assert "secret" not in output


@pytest.mark.parametrize("number", ending_signals())
def test_a_signal_ends_a_fleet_that_does_not_serve_yet(
    folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    calls: list[str] = []

    def interrupted(name: str) -> Callable[..., None]:
        def call(*_: object) -> None:
            signal.raise_signal(number)
            calls.append(name)

        return call

    monkeypatch.setattr(serve, "start", lambda **_: calls.append("start"))
    monkeypatch.setattr(serve, "shutdown", interrupted("shutdown"))
    monkeypatch.setattr(program, "deploy", interrupted("deploy"))
    before = {other: signal.getsignal(other) for other in ending_signals()}
    try:
        program.serve_until_signal(fleet(folder), "")
    finally:
        for other, handler in before.items():
            signal.signal(other, handler)
    assert calls == ["start", "shutdown"]


@pytest.fixture
def update(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Return a function that runs `update` on a Ray whose fleet is at port 8000, with flags; nothing is deployed."""

    async def check_database(settings: Settings) -> None:
        pass

    monkeypatch.setattr(program, "check_database", check_database)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={"flamboyance": _FAILED}))
    monkeypatch.setattr(program, "call_all", lambda *_: [RuntimeError("of another version"), ["127.0.0.1", 8000]])
    monkeypatch.setattr(serve, "run", lambda *_, **__: None)
    monkeypatch.setattr(program, "_log_ready", lambda fleet: None)
    flags = ["--database", "postgresql://user:word@host/name", "--model", str(folder)]
    return lambda *more: program.main(["update", *flags, *more])


_FAILED = SimpleNamespace(
    deployments={
        "Server": SimpleNamespace(status="UNHEALTHY", message="Six replicas failed:\n\nSettingsError: device: none\n"),
        "Gateway": SimpleNamespace(status="HEALTHY", message=""),
    }
)


def test_an_update_is_for_the_fleet_at_its_address(
    update: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The Ray of this machine may be that of another fleet, whose models would be replaced."""
    deployed: list[str] = []
    monkeypatch.setattr(program, "deploy", lambda fleet, factory: deployed.append(fleet.settings.host))
    assert update("--port", "8001") == 2
    assert update("--host", "0.0.0.0") == 2
    assert not deployed
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("error: the fleet on this Ray is at 127.0.0.1:8000, and not at 127.0.0.1:8001: repeat")
    assert len(errors) == 2
    assert update("--port", "8000") == 0
    assert deployed == ["127.0.0.1"]


def test_an_update_without_a_fleet_is_refused(
    update: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(serve, "status", lambda: SimpleNamespace(applications={}))
    assert update() == 2
    assert capsys.readouterr().err.startswith("error: no fleet runs on this Ray: ")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [([], "no Ray on this machine can be used: none"), (["--address=ray:1"], "no Ray at ray:1 can be used: none")],
)
def test_a_ray_that_cannot_be_reached_is_named(
    update: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    expected: str,
) -> None:
    def init(**_: object) -> None:
        raise ConnectionError("none\nsecond line")

    monkeypatch.setattr(ray, "init", init)
    assert update(*flags) == 2
    assert capsys.readouterr().err == f"error: --address: {expected}\n"


def test_a_fleet_that_cannot_be_deployed_is_one_line(
    update: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object, **__: object) -> None:
        raise RuntimeError("Deploying application flamboyance failed: Server.")

    monkeypatch.setattr(serve, "run", run)
    assert update() == 2
    assert capsys.readouterr().err == (
        "error: Deploying application flamboyance failed: Server. SettingsError: device: none\n"
    )


def test_the_help_has_the_flags_of_the_fleet_and_of_the_servers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        read_fleet(["--help"])
    output = capsys.readouterr().out
    assert ended.value.code == 0
    assert all(f"\n  {flag} " in output for flag in ("--address", "--replicas", "--gateways", "--max-body-mb"))
