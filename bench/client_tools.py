"""Runs unmodified third-party clients against this server: `python -m bench.client_tools [instructor] [litellm] …`.

Each client is installed into its own environment and runs one script of `bench/client_scripts`. The script tries a few
habits of the client's users, and a row has its report about one habit. The command exits with status 1 if any habit failed.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.driver import BenchFailed
from bench.load_tools import install
from bench.options import add_model, as_settings, model_folder, parse, server_settings
from bench.serving import HOST, serving
from bench.table import ROOT, Bar, Report, Row
from bench.workload import random_image
from model.cache import cache_folder
from server.settings import child_environment

SCRIPTS = ROOT / "bench" / "client_scripts"
# scripts may compare with the Python client, if their environment has its dependencies
PYTHON_CLIENT = ROOT / "clients" / "python" / "src"
SCRIPT_SECONDS = 600
MAX_DETAIL = 200


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonClient:
    """A client in a virtual environment, and the module that uses it. The first package is the client."""

    packages: Sequence[str]
    module: str

    def command(self, name: str, environments: Path) -> list[str]:
        """Return the command of the script, and install the client first if it is missing."""
        python = install(name, self.packages, environments).with_name("python")
        return [str(python), "-m", self.module]

    def version(self, name: str, environments: Path) -> str:
        code = f"from importlib.metadata import version; print(version({name!r}))"
        command = [str(environments / name / "bin" / "python"), "-c", code]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeClient:
    """A client in a folder of npm, and the file that uses it. The first package is the client; one may have a version."""

    packages: Sequence[str]
    script: str

    def command(self, name: str, environments: Path) -> list[str]:
        """Return the command of the script, and install the client first if it is missing."""
        node, npm = _program("node"), _program("npm")
        folder = environments / name
        if not all(_package_file(folder, package).exists() for package in self.packages):
            print(f"installing {name} into {folder}", file=sys.stderr)
            folder.mkdir(parents=True, exist_ok=True)
            subprocess.run([npm, "install", "--silent", "--prefix", folder, *self.packages], check=True)
        # Node looks for packages next to the script.
        return [node, str(shutil.copy(SCRIPTS / self.script, folder))]

    def version(self, name: str, environments: Path) -> str:
        return str(json.loads(_package_file(environments / name, self.packages[0]).read_text())["version"])


def _package_file(folder: Path, package: str) -> Path:
    name, _, _ = package.partition("@")
    return folder / "node_modules" / name / "package.json"


def _program(name: str) -> str:
    path = shutil.which(name)
    if path is None:
        raise BenchFailed(f"{name} is not installed")
    return path


Client = PythonClient | NodeClient
CLIENTS: dict[str, Client] = {
    "instructor": PythonClient(packages=["instructor"], module="bench.client_scripts.instructor"),
    "litellm": PythonClient(packages=["litellm"], module="bench.client_scripts.litellm"),
    "openai-node": NodeClient(packages=["openai", "zod"], script="openai_node.mjs"),
    "lm-eval": PythonClient(packages=["lm-eval[api]"], module="bench.client_scripts.lm_eval"),
    # lmms-eval 0.7.3 imports a module that filelock 4 does not have
    "lmms-eval": PythonClient(packages=["lmms-eval", "filelock<4"], module="bench.client_scripts.lmms_eval"),
    # 0.123 needs Node 22
    "promptfoo": NodeClient(packages=["promptfoo@0.121"], script="promptfoo.mjs"),
}


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(_parser(), arguments, {})
    folder = model_folder(options.model)
    model = json.loads((folder / "config.json").read_text())["name"]
    report = Report("Third-party clients, unmodified", as_settings(options))
    with serving(server_settings(options, folder)) as server:
        inputs = [f"http://{HOST}:{server.port}", model, _image_url()]
        for name in options.clients or CLIENTS:
            rows = run(name, CLIENTS[name], Path(options.environments), inputs)
            for row in rows:
                report.add(row)
            failed = sum(row["result"] == "failed" for row in rows)
            report.bars.append(Bar(name=f"{name}, failed habits", value=failed, at_most=0))
    report.print()
    return 0 if all(bar.is_met for bar in report.bars) else 1


def run(name: str, client: Client, environments: Path, inputs: Sequence[str]) -> list[Row]:
    """Run a client's script and return a row per habit, and a failed row if the script cannot run or fails."""
    try:
        command = client.command(name, environments)
        version = client.version(name, environments)
    except (BenchFailed, OSError, subprocess.CalledProcessError) as error:
        return [{"client": name, "version": None, **_result("installation", False, str(error))}]
    return [{"client": name, "version": version, **row} for row in habits([*command, *inputs])]


def habits(command: Sequence[str]) -> list[Row]:
    """Run a script and return a row per habit that it reports, and a failed row if the script fails or reports none."""
    environment = child_environment(PYTHONPATH=str(PYTHON_CLIENT))
    try:
        process = subprocess.run(
            command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SCRIPT_SECONDS
        )
    except subprocess.TimeoutExpired:
        return [_result("script", False, f"it ran for more than {SCRIPT_SECONDS} s")]
    lines = [json.loads(line) for line in process.stdout.splitlines() if line.startswith('{"habit"')]
    rows = [_result(line["habit"], line["ok"], line["detail"]) for line in lines]
    if process.returncode or not rows:
        last = process.stderr.strip().rpartition("\n")[2]
        rows.append(_result("script", False, f"it ended with status {process.returncode}: {last}"))
    if any(row["result"] == "failed" for row in rows):
        print(process.stderr, file=sys.stderr)
    return rows


def _result(habit: str, is_ok: bool, detail: str) -> Row:
    return {"habit": habit, "result": "ok" if is_ok else "failed", "detail": " ".join(detail.split())[:MAX_DETAIL]}


def _image_url() -> str:
    return f"data:image/jpeg;base64,{base64.b64encode(random_image(0).data).decode()}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.client_tools", description=__doc__)
    parser.add_argument("clients", nargs="*", choices=[*CLIENTS, []], help="the clients to run (default: all)")
    add_model(parser, "default")
    home = cache_folder() / "load-tools"
    parser.add_argument("--environments", default=str(home), help="folder into which the clients are installed")
    return parser


if __name__ == "__main__":
    sys.exit(main())
