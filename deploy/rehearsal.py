"""Rehearses the Dockerfile without a container engine: `python -m deploy.rehearsal [--build-arg NAME=VALUE ...]`.

Debian, from apt's mirror, replaces the base image, and a chroot replaces the container. The steps of the real Dockerfile
run in it, with this machine's pip configuration. Then the image's command runs as its user, on a file system where only the
volumes and /tmp are writable, until it is healthy and has completed a prompt. This needs root, debootstrap, and twice the
disk space of the image. `make rehearse-image` does it.
"""

from __future__ import annotations

import argparse
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from ast import literal_eval
from collections.abc import Sequence
from pathlib import Path

import httpx
import psutil

from bench.serving import HOST, free_port
from deploy.image import Builder, Outside, Stage, run

ROOT = Path(__file__).resolve().parents[1]
# packages of the base image besides Debian's essential packages and Python's own libraries
PACKAGES = ("ca-certificates", "netbase", "tzdata")
START_SECONDS = 600.0


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.rehearsal", description=__doc__)
    parser.add_argument("--target", default="cpu", help="stage to build and run (default: cpu)")
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE", help="as of `docker build`")
    parser.add_argument("--folder", type=Path, help="folder of the stages, which is kept (default: a temporary one)")
    options = parser.parse_args(arguments)
    build_arguments = dict(argument.split("=", 1) for argument in options.build_arg)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o755)  # the image's user must be able to enter it
        stage = Builder(ROOT / "Dockerfile", folder, outside(), create_base, build_arguments).build(options.target)
        megabytes = int(subprocess.check_output(["du", "-sm", str(stage.root)]).split()[0])
        print(f"the image has {megabytes} MB")
        serve(stage)
    return 0


def create_base(image: str, root: Path) -> None:
    """Fill a folder with this machine's release of Debian, and with the Python of this process at /usr/local.

    An image such as `python:3.11-slim` has the same contents for the current release.
    """
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    if image != f"python:{version}-slim" or sys.base_prefix == "/usr":
        raise SystemExit(f"{image}: run this command with that version of Python, and not with Debian's own")
    began = time.monotonic()
    release = platform.freedesktop_os_release()["VERSION_CODENAME"]
    packages = ",".join([*PACKAGES, *packages_of(Path(sys.base_prefix))])
    bootstrap = ["debootstrap", "--variant=minbase", f"--include={packages}", release, str(root), mirror()]
    # in a namespace of its own, so that its mounts end with it
    subprocess.run(["unshare", "--mount", *bootstrap], check=True, stdout=subprocess.DEVNULL)
    without = shutil.ignore_patterns("site-packages", "test", "__pycache__")
    shutil.copytree(sys.base_prefix, root / "usr/local", ignore=without, symlinks=True, dirs_exist_ok=True)
    subprocess.run(["ldconfig", "-r", str(root)], check=True)
    print(f"{time.monotonic() - began:7.1f} s  Debian {release} in place of {image}", flush=True)


def packages_of(prefix: Path) -> list[str]:
    """Return the packages of Debian with the libraries that a Python is linked with."""
    # the image of a server has no windows
    modules = [str(path) for path in prefix.rglob("lib-dynload/*.so") if not path.name.startswith("_tkinter")]
    linked = subprocess.check_output(["ldd", f"{prefix}/bin/python3", *modules], text=True)
    libraries = {Path(path).resolve() for path in re.findall(r"=> (/\S+)", linked)}
    libraries = {library for library in libraries if not library.is_relative_to(prefix)}
    owners = subprocess.check_output(["dpkg", "--search", *map(str, libraries)], text=True)
    return sorted({line.partition(":")[0] for line in owners.splitlines()})


def mirror() -> str:
    """Return the URL of the mirror from which apt gets Debian on this machine."""
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI)", "Created-By: Packages", "Label: Debian"]
    return subprocess.check_output(targets, text=True).split()[0]


def outside() -> Outside:
    """Return pip's configuration on this machine, as variables and the paths that they name, and the build's context."""
    listed = subprocess.check_output([sys.executable, "-m", "pip", "config", "list"], text=True)
    settings = dict(line.split("=", 1) for line in listed.splitlines())
    values = {
        re.sub(r".*\.", "", name).replace("-", "_").upper(): literal_eval(text) for name, text in settings.items()
    }
    paths = [Path(word) for value in values.values() for word in value.split() if word.startswith("/")]
    existing = [path for path in dict.fromkeys(paths) if path.exists()]
    return Outside(ROOT, {f"PIP_{name}": value for name, value in values.items()}, existing)


def serve(stage: Stage) -> None:
    """Start the command of an image, and stop it once it is healthy and has completed a prompt."""
    port = free_port()
    environment = {"FLAMBOYANCE_PORT": str(port)}
    began = time.monotonic()
    process = run(stage, [*stage.entrypoint, *stage.command], environment, is_read_only=True)
    try:
        with httpx.Client(base_url=f"http://{HOST}:{port}", timeout=60) as http:
            wait_until_ready(http, process)
            print(f"{time.monotonic() - began:7.1f} s  {shlex.join(stage.entrypoint)}: ready", flush=True)
            check = run(stage, stage.health, environment, is_read_only=True)
            assert check.wait() == 0, "the health check of the image fails"
            completion = http.post(
                "/v1/completions", json={"prompt": "A flamingo is", "max_tokens": 8, "temperature": 0}
            )
            completion.raise_for_status()
            print(f"A flamingo is{completion.json()['choices'][0]['text']}")
            print(f"user {user_of(process)}, health {http.get('/health').json()['status']}")
        server(process).send_signal(signal.SIGTERM)
        status = process.wait(60)
        assert status == 0, f"the server ended with status {status} after SIGTERM"
    finally:
        process.kill()
        process.wait()


def server(process: subprocess.Popen[bytes]) -> psutil.Process:
    """Return the process 1 of the namespace."""
    return psutil.Process(process.pid).children()[0]


def user_of(process: subprocess.Popen[bytes]) -> int:
    return server(process).uids().effective


def wait_until_ready(http: httpx.Client, process: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, f"the server ended with status {process.returncode}"
        try:
            if http.get("/health/ready").is_success:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.5)
    raise TimeoutError(f"the server is not ready after {START_SECONDS:g} seconds")


if __name__ == "__main__":
    raise SystemExit(main())
