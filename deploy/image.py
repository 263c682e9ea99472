"""Builds the stages of a Dockerfile as folders for `deploy.rehearsal`: each step runs in a chroot instead of a container.

Mounts are made in a separate namespace, so none is left when a step ends in any way. Needs root.
"""

from __future__ import annotations

import json
import shlex
import shutil
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

from dockerfile_parse import DockerfileParser
from dockerfile_parse.parser import image_from
from dockerfile_parse.util import WordSplitter, extract_key_values

# $1: root, $2: user, $3: folder; the environment, as words of `env`, and the command follow
ENTER = """
mount -t proc proc "$1/proc"
mount --rbind /dev "$1/dev"
mount --bind /etc/resolv.conf "$1/etc/resolv.conf"
root=$1 user=$2 folder=$3
shift 3
exec chroot --userspec="$user" "$root" /usr/bin/env --ignore-environment --chdir="$folder" "$@"
"""


class UnknownStep(ValueError):
    """A step of the Dockerfile that this module does not support."""


@dataclass(frozen=True, slots=True)
class Outside:
    """The build's context, and the machine's variables and paths that steps get; paths are mounted."""

    context: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    paths: Sequence[Path] = ()


@dataclass(frozen=True, slots=True)
class Stage:
    """The state of a stage: the folder with its files, and the configuration with which its containers would start."""

    root: Path
    arguments: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(
        default_factory=lambda: {"PATH": "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"}
    )
    folder: str = "/"
    user: str = "0:0"
    volumes: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    health: tuple[str, ...] = ()

    def path(self, name: str) -> Path:
        """Return the path, on this machine, of a path in the image; a relative one is in the stage's folder."""
        return self.root / str(PurePosixPath(self.folder, name)).lstrip("/")

    def words(self, text: str) -> list[str]:
        """Split the text of a step, with variables replaced."""
        return list(WordSplitter(text, args=self.arguments, envs=self.environment).split())


def run(
    stage: Stage,
    command: Sequence[str],
    environment: Mapping[str, str],
    *,
    paths: Sequence[Path] = (),
    is_read_only: bool = False,
) -> subprocess.Popen[bytes]:
    """Run a command in a stage, as process 1 of a namespace. If read-only, only the volumes and /tmp can be written."""
    root = str(stage.root)
    mounts = []
    for path in paths:
        target = stage.root / str(path).lstrip("/")
        _create_target(path, target)
        mounts.append(["mount", "--bind", str(path), str(target)])
    if is_read_only:
        mounts.append(["mount", "--bind", root, root])
        mounts += [["mount", "--bind", root + volume, root + volume] for volume in stage.volumes]
        mounts += [["mount", "-t", "tmpfs", "tmpfs", f"{root}/tmp"], ["mount", "-o", "remount,bind,ro", root]]
    script = "\n".join(["set -e", *map(shlex.join, mounts), ENTER])
    namespace = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script, "sh"]
    variables = [f"{name}={value}" for name, value in {**environment, **stage.environment}.items()]
    return subprocess.Popen([*namespace, root, stage.user, stage.folder, *variables, *command])


def _create_target(path: Path, target: Path) -> None:
    """Create a file or folder on which a path can be mounted."""
    if path.is_dir():
        target.mkdir(parents=True, exist_ok=True)
    else:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()


class Builder:
    """Builds the stages of a Dockerfile in a folder, each once and when it is needed.

    `create_base` fills a folder that replaces a base image such as `python:3.11-slim`. `arguments` replace values of ARG.
    """

    def __init__(
        self,
        dockerfile: Path,
        folder: Path,
        outside: Outside,
        create_base: Callable[[str, Path], None],
        arguments: Mapping[str, str],
    ) -> None:
        self._folder = folder
        self._outside = outside
        self._create_base = create_base
        self._arguments = arguments
        self._before: dict[str, str] = {}  # ARG before the first FROM
        self._steps: dict[str, list[tuple[str, str]]] = {}
        self._bases: dict[str, str] = {}
        self._built: dict[str, Stage] = {}
        self._read(dockerfile)

    def _read(self, dockerfile: Path) -> None:
        with dockerfile.open("rb") as file:
            structure = DockerfileParser(fileobj=file).structure
        name = ""
        for entry in structure:
            instruction, value = entry["instruction"], entry["value"]
            if instruction == "FROM":
                image, name = image_from(" ".join(WordSplitter(value, args=self._before, envs={}).split()))
                self._bases[name], self._steps[name] = image, []
            elif instruction == "ARG" and not name:
                self._before.update(self._argument(value))
            elif instruction != "COMMENT":
                self._steps[name].append((instruction, value))

    def build(self, name: str) -> Stage:
        """Return a stage, or a base image, after all of its steps. Raises `UnknownStep`."""
        if name not in self._built:
            self._built[name] = self._build(name)
        return self._built[name]

    def _build(self, name: str) -> Stage:
        root = self._folder / name.replace(":", "-")
        if name not in self._steps:
            if not root.exists():
                self._create_base(name, root)
            return Stage(root)
        base = self.build(self._bases[name])
        subprocess.run(["cp", "--archive", "--reflink=auto", str(base.root), str(root)], check=True)
        stage = replace(base, root=root)
        for instruction, value in self._steps[name]:
            began = time.monotonic()
            stage = self._do(stage, instruction, value)
            print(f"{time.monotonic() - began:7.1f} s  {name}: {instruction} {value[:90]}", flush=True)
        return stage

    def _argument(self, value: str) -> dict[str, str]:
        name, _, default = value.partition("=")
        return {name: self._arguments.get(name, default)}

    def _do(self, stage: Stage, instruction: str, value: str) -> Stage:
        match instruction:
            case "ARG":
                return replace(stage, arguments={**stage.arguments, **self._argument(value)})
            case "ENV":
                pairs = extract_key_values(True, stage.arguments, stage.environment, value)
                return replace(stage, environment={**stage.environment, **dict(pairs)})
            case "WORKDIR":
                stage.path(value).mkdir(parents=True, exist_ok=True)
                return replace(stage, folder=str(PurePosixPath(stage.folder, value)))
            case "USER":
                return replace(stage, user=value)
            case "VOLUME":
                return replace(stage, volumes=tuple(value.split()))
            case "ENTRYPOINT":
                return replace(stage, entrypoint=tuple(json.loads(value)))
            case "CMD":
                return replace(stage, command=tuple(json.loads(value)))
            case "HEALTHCHECK":
                return replace(stage, health=tuple(json.loads(value.partition("CMD ")[2])))
            case "EXPOSE":
                return stage
            case "RUN":
                self._run(stage, value)
                return stage
            case "COPY":
                self._copy(stage, stage.words(value))
                return stage
        raise UnknownStep(f"{instruction} {value}")

    def _run(self, stage: Stage, command: str) -> None:
        environment = {**self._outside.environment, **stage.arguments}
        process = run(stage, ["/bin/sh", "-c", command], environment, paths=self._outside.paths)
        if process.wait():
            raise subprocess.CalledProcessError(process.returncode, command)

    def _copy(self, stage: Stage, words: Sequence[str]) -> None:
        options = [word for word in words if word.startswith("--")]
        *sources, target = words[len(options) :]
        if not options:
            for source in sources:
                self._copy_from_context(self._outside.context / source, stage.path(target), target)
            return
        (option,) = options
        if not option.startswith("--from="):
            raise UnknownStep(f"COPY {option}")
        (source,) = sources
        origin = self.build(option.removeprefix("--from="))
        stage.path(target).parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "--archive", str(origin.path(source)), str(stage.path(target))], check=True)

    def _copy_from_context(self, source: Path, target: Path, name: str) -> None:
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
        else:
            shutil.copy(source, target / source.name if name.endswith("/") else target)
