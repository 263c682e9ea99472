"""Flags take precedence over the environment, and the environment over the file; errors name invalid settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from model.zoo.default import DEFAULT
from server.settings import Settings, SettingsError, child_environment, read_settings
from server.start import main, with_model


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FLAMBOYANCE_CONFIG", raising=False)


def yaml_file(tmp_path: Path, text: str) -> str:
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    return str(file)


def test_flags_take_precedence_over_the_environment_and_it_over_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = yaml_file(tmp_path, "port: 1\nhost: file\nmax_num_queued: 1\ndtype: float16")
    monkeypatch.setenv("FLAMBOYANCE_PORT", "2")
    monkeypatch.setenv("FLAMBOYANCE_HOST", "environment")
    settings = read_settings(["--config", file, "--port", "3"])
    assert (settings.port, settings.host, settings.max_num_queued, settings.dtype) == (3, "environment", 1, "float16")


def test_the_environment_may_name_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_CONFIG", yaml_file(tmp_path, "port: 5"))
    assert read_settings([]).port == 5
    assert read_settings(["--config", yaml_file(tmp_path, "port: 6")]).port == 6


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot: 1", "unknown key prot; did you mean port?"),
        ("- 1", "contains a list"),
        ("port: x", "^port: must be an integer$"),
        ("max_client_share: 2", "^max_client_share: must be at most 1$"),
        ("port: yes", "^port: may not be true or false$"),
        ("data_dir: 1", "^data_dir: must be a path$"),
        ("a: [", "settings.yaml"),
        ("shutdown_timeout: .nan", "shutdown_timeout: "),
        ("port: 1\nhost: a\nport: 2", "settings.yaml: the key port occurs twice in line 3"),
        ("config: other.yaml", "settings.yaml: the key config is not permitted"),
        ("host: 2026-13-45", "settings.yaml: it has a value that cannot be read: month must be in 1..12"),
        ("port: !!int ''", "settings.yaml: it has a value that cannot be read"),
        ("a: " + "[" * 3000, "settings.yaml: it is nested too deeply"),
    ],
)
def test_an_error_names_the_invalid_key_of_a_file(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        read_settings(["--config", yaml_file(tmp_path, text)])


@pytest.mark.parametrize("encoding", ["latin-1", "utf-16"])
def test_a_file_that_is_not_utf_8_is_named(tmp_path: Path, encoding: str) -> None:
    file = tmp_path / "settings.yaml"
    file.write_text("host: café", encoding=encoding)
    with pytest.raises(SettingsError, match=r"^config: .*settings\.yaml: it is not UTF-8$"):
        read_settings(["--config", str(file)])


def test_an_error_names_a_missing_file_once() -> None:
    with pytest.raises(SettingsError, match=r"^config: nothing\.yaml: No such file or directory$"):
        read_settings(["--config", "nothing.yaml"])


def test_an_error_names_an_unknown_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_PROT", "1")
    with pytest.raises(SettingsError, match=r"FLAMBOYANCE_PROT; did you mean FLAMBOYANCE_PORT\?$"):
        read_settings([])


def test_variables_count_in_any_case_of_letters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("flamboyance_config", yaml_file(tmp_path, "port: 5\nhost: file"))
    monkeypatch.setenv("flamboyance_host", "environment")
    settings = read_settings([])
    assert (settings.port, settings.host) == (5, "environment")
    monkeypatch.setenv("flamboyance_max_num_queud", "3")
    with pytest.raises(SettingsError, match=r"flamboyance_max_num_queud; did you mean FLAMBOYANCE_MAX_NUM_QUEUED\?$"):
        read_settings([])


def test_variables_of_a_kubernetes_service_are_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("FLAMBOYANCE_PORT", "tcp://10.0.0.1:80")
    with pytest.raises(SettingsError, match="enableServiceLinks: false"):
        read_settings([])


def test_a_variable_of_the_client_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_URL", "http://127.0.0.1:1")
    read_settings([])


def test_an_unknown_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--prot", "1"])
    assert "--prot" in capsys.readouterr().err


def test_an_abbreviated_flag_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--por", "1"])
    assert "--por" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["a", "--port", "3"], ["--port", "3", "a"], ["--port=3", "--model", "a"]])
def test_the_model_is_an_argument_or_a_flag_and_takes_precedence(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLAMBOYANCE_MODEL", "of the environment")
    settings = read_settings(arguments)
    assert (settings.model, settings.port) == ("a", 3)


def test_a_second_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="model: it is set twice: a and --model b"):
        read_settings(["a", "--model", "b"])
    with pytest.raises(SystemExit):
        read_settings(["a", "b"])
    assert "unrecognized arguments: b" in capsys.readouterr().err


def test_a_misspelled_flag_names_the_setting(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--prot", "3"])
    assert "unrecognized arguments: --prot; did you mean --port?" in capsys.readouterr().err


def test_help_names_the_program(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        read_settings(["--help"], prog="flamboyance serve")
    assert capsys.readouterr().out.startswith("usage: flamboyance serve [-h] [MODEL] [--SETTING VALUE ...]\n")


def test_paths_of_the_worker_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker has another working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "config.json").write_text(DEFAULT.to_json(), encoding="utf-8")
    settings = with_model(read_settings(["tiny", "--cache-dir", "cache", "--data-dir", "data"]))
    assert settings.model == str(tmp_path / "tiny")
    assert settings.cache_folder == tmp_path / "cache"
    assert settings.data_folder == tmp_path / "data"


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert read_settings(["--data-dir=~/data"]).data_folder == tmp_path / "data"
    assert read_settings(["--config", yaml_file(tmp_path, "cache_dir: ~/x")]).cache_folder == tmp_path / "x"
    settings = read_settings(["--config=~/settings.yaml", "--model=~/model"])
    assert (settings.config, settings.model) == (tmp_path / "settings.yaml", str(tmp_path / "model"))
    assert settings.cache_folder == tmp_path / "x"
    with pytest.raises(SettingsError, match=r"^config: ~no-such-user/x: ~no-such-user is the folder of no"):
        read_settings(["--config=~no-such-user/x"])
    with pytest.raises(SettingsError, match=r"^data_dir: .*~no-such-user is the folder of no user"):
        read_settings(["--data-dir=~no-such-user/data"])


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--data-dir=/tmp/a?b", "^data_dir: .*/tmp/a.b contains '?'"),
        ("--data-dir=c::d", "^data_dir: /.*/c::d contains '::'"),
        ("--cors-origins=nonsense,*", "^cors_origins: 'nonsense' is not an origin"),
        ("--cors-origins=https://a.org/", "^cors_origins: .*'https://a.org/' is not an origin"),
        ("--data-dir=", "^data_dir: must be a path, and is empty$"),
        ("--config=", "^config: must be a path, and is empty$"),
        ("--allowed-hosts=http://a.org", "^allowed_hosts: 'http://a.org' is not the name of a host"),
        ("--allowed-hosts=a.org, b.org:80", "^allowed_hosts: 'b.org:80' is not the name of a host"),
        ("--allowed-hosts=*", "^allowed_hosts: '[*]' is not the name of a host"),
        ("--allowed-hosts=,", "^allowed_hosts: names no host"),
        ("--otlp-endpoint=http://a:65536", "^otlp_endpoint: 'http://a:65536' is not a URL"),
        ("--otlp-endpoint=me:word@a:4318", "^otlp_endpoint: 'a:4318' is not a URL"),
        ("--otlp-endpoint=http://me:w/rd@a:b", "^otlp_endpoint: 'http://a:b' is not a URL"),
        ("--otlp-endpoint=http://", "^otlp_endpoint: 'http://' is not a URL such as http://collector:4318$"),
        ("--otlp-endpoint=http://a:b", "^otlp_endpoint: 'http://a:b' is not a URL"),
        ("--otlp-endpoint=http://a/x?y=1", "^otlp_endpoint: 'http://a/x?y=1' is not a URL"),
        ("--otlp-endpoint=http://a:4318/v1/traces", "^otlp_endpoint: .* ends with /v1/traces, which the server adds$"),
    ],
)
def test_a_value_that_would_not_do_what_it_says_is_refused(flag: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message.replace("?", "[?]")):
        read_settings([flag])


@pytest.mark.parametrize(
    "flag",
    [
        "--allowed-hosts=localhost, 10.0.0.1,[::1],A_b.org.",
        *(
            "--otlp-endpoint=http://[::1]:4318",
            "--otlp-endpoint=https://me:word@a.org/otlp/",
            "--otlp-endpoint=http://a",
        ),
    ],
)
def test_names_of_hosts_and_urls_of_collectors_are_accepted(flag: str) -> None:
    assert read_settings([flag]).model_fields_set


@pytest.mark.parametrize(
    "origins", ["", "*", "https://a.org, http://[::1]:3000", "app://obsidian.md,chrome-extension://abc,null"]
)
def test_origins_are_those_that_browsers_send(origins: str) -> None:
    assert read_settings([f"--cors-origins={origins}"]).cors_origins == origins


def test_the_program_exits_if_a_value_is_invalid(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--port", "70000"]) == 2
    assert "port: " in capsys.readouterr().err


def test_the_program_exits_if_the_model_folder_is_invalid(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(tmp_path)]) == 2
    assert "is not a model folder" in capsys.readouterr().err


def test_the_key_is_neither_printed_nor_sent_to_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_API_KEY", "very secret")
    settings = read_settings([])
    assert settings.api_key is not None
    assert settings.api_key.get_secret_value() == "very secret"
    assert "secret" not in repr(settings)
    assert "secret" not in settings.to_worker()
    assert Settings.model_validate_json(settings.to_worker()) == settings.model_copy(update={"api_key": None})


def test_the_environment_of_child_processes_has_no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLAMBOYANCE_API_KEY", "very secret")
    monkeypatch.setenv("FLAMBOYANCE_PORT", "1")
    environment = child_environment(OMP_NUM_THREADS="1")
    assert "very secret" not in environment.values()
    assert (environment["FLAMBOYANCE_PORT"], environment["OMP_NUM_THREADS"]) == ("1", "1")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("HF_TOKEN", "hf_secret"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("AWS_ACCESS_KEY_ID", "secret"),
        ("PGPASSWORD", "secret"),
        ("HTTPS_PROXY", "http://me:secret@proxy:3128"),
        ("HTTPS_PROXY", "me:secret@proxy:3128"),
        ("OPENAI_API_KEY2", "secret"),
        ("API_KEYS", "secret"),
        ("DB_PASS", "secret"),
        ("MYSQL_PWD", "secret"),
        ("AZURE_STORAGE_CONNECTION_STRING", "AccountKey=secret"),
        ("FLAMBOYANCE_MEDIA_STORE", "s3://me:secret@bucket/media"),
        ("flamboyance_database", "postgresql://host/secret"),
    ],
)
def test_the_environment_of_child_processes_has_no_secret(
    name: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decode process reads files of clients, and none of these processes sends requests."""
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "false")
    monkeypatch.setenv("HTTP_PROXY", "http://proxy:3128")
    monkeypatch.setenv("PATH", "/bin:/opt/python@3.11/bin")
    environment = child_environment()
    assert name not in environment
    assert {"TOKENIZERS_PARALLELISM", "HTTP_PROXY", "PATH"} <= environment.keys()
    assert "secret" not in Settings(media_store=value).to_worker()


def test_the_worker_knows_of_a_collector_without_its_password() -> None:
    settings = Settings(otlp_endpoint="http://me:secret@collector:4318")
    assert Settings.model_validate_json(settings.to_worker()).otlp_endpoint == "http://collector:4318"


@pytest.mark.parametrize("key", ["long enough", " long enough\n", "long enough\r\n"])
def test_a_key_is_what_a_header_can_carry(key: str) -> None:
    sent = Settings(api_key=key).api_key
    assert sent is not None
    assert sent.get_secret_value() == "long enough"


@pytest.mark.parametrize(
    "key", ["short", "       \n\n", "schlüssel-schlüssel", "with\x00nul-inside", "two\nlines of it"]
)
def test_a_key_that_no_header_can_carry_is_refused(key: str) -> None:
    with pytest.raises(SettingsError, match="printable ones of ASCII") as caught:
        read_settings([f"--api-key={key}"])
    assert key not in str(caught.value)


def test_the_default_model_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the name in /v1/models. A folder of this name in the working directory comes first."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("server.start.prepare", lambda folder: folder / "default")
    settings = with_model(read_settings([DEFAULT.name, "--cache-dir", "cache"]))
    assert settings.model == str(tmp_path / "cache" / "default")
    (tmp_path / DEFAULT.name).mkdir()
    (tmp_path / DEFAULT.name / "config.json").write_text(DEFAULT.to_json(), encoding="utf-8")
    assert with_model(read_settings([DEFAULT.name, "--cache-dir", "cache"])).model == str(tmp_path / DEFAULT.name)
