"""Every setting of the server, once: a flag, a FLAMBOYANCE_* variable and a key of the YAML file given by --config.

A flag wins over the environment, the environment over the file. An unknown name raises. Nothing else reads the
environment.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from server.logs import LogFormat

PREFIX = "FLAMBOYANCE_"


class SettingsError(ValueError):
    """A setting that is unknown or has an impossible value; the message names it and where it came from."""


class Settings(BaseModel):
    """Few-shot inference server for Flamingo-family vision-language models."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # fmt: off
    config: Path | None = Field(default=None, description="YAML file of settings")
    model: str | None = Field(default=None, description="model folder; none: the default model")
    served_model_name: str | None = Field(default=None, description="name that clients use; none: config.json's")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(default="auto", description="number format of weights")
    cache_dir: Path | None = Field(default=None, description="folder of the default model; none: ~/.cache/flamboyance")
    data_dir: Path | None = Field(
        default=None, description="folder of what clients store; none: ~/.local/share/flamboyance"
    )
    media_store: str | None = Field(
        default=None, description="folder or fsspec URL of uploaded media; none: media in data_dir"
    )
    database: SecretStr | None = Field(
        default=None, description="URL of the database, sqlite: or postgresql:; none: flamboyance.db in data_dir"
    )
    max_set_examples: int = Field(default=10_000, ge=1, le=1_000_000, description="examples in one support set")
    evaluation_queries: int = Field(default=2, ge=1, le=64, description="queries of evaluations that run at once")
    sweep_interval: float = Field(
        default=60.0, gt=0, le=3600, description="seconds between two sweeps of what has expired"
    )
    num_threads: int | None = Field(default=None, ge=1, description="threads of the model on a CPU; none: torch's choice")
    kernels: Literal["auto", "triton", "reference"] = Field(
        default="auto",
        description="what runs the operators; auto: Triton on a GPU, Numba on a CPU. What cannot run ends the start",
    )
    weight_format: Literal["auto", "native", "int8", "int4"] = Field(
        default="auto", description="CPU: format of the decoder's weights; auto keeps a model's own four bits, else native"
    )
    vision_format: Literal["auto", "native", "bfloat16"] = Field(
        default="auto",
        description="CPU: products of a vision transformer; auto: bfloat16 where faster, unless dtype is given",
    )
    max_model_len: int | None = Field(default=None, ge=2, description="tokens of prompt and answer; none: as trained")
    max_num_seqs: int = Field(default=64, ge=1, le=4096, description="sequences that run at once")
    max_num_batched_tokens: int = Field(default=512, ge=16, description="tokens of one step")
    block_size: int | None = Field(
        default=None, ge=1, le=1024, description="tokens of a block of the text cache; none: 16, 4 on a CPU"
    )
    kv_cache_mb: int = Field(default=1024, ge=1, description="keys and values of text, in MiB")
    media_cache_mb: int = Field(default=1024, ge=1, description="keys and values of media, in MiB")
    host_media_mb: int = Field(default=256, ge=0, description="visual tokens kept in host memory, in MiB")

    host: str = Field(default="127.0.0.1", description="address to listen at")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen at; 0 picks a free one")
    api_key: SecretStr | None = Field(default=None, min_length=8, description="bearer key of every request; none: open")
    shutdown_timeout: float = Field(default=30.0, ge=0, le=3600, description="seconds that requests get after SIGTERM")
    max_num_queued: int = Field(default=256, ge=1, description="requests that may wait; one more is refused with 503")
    max_body_mb: float = Field(default=64.0, gt=0, le=4096, description="largest request body, in MiB")
    body_timeout: float = Field(default=60.0, gt=0, description="seconds in which a request body must arrive")
    keep_alive: float = Field(default=15.0, gt=0, description="seconds between comment lines in a stream that waits")

    max_media_per_request: int = Field(default=64, ge=0, description="images and videos in one prompt")
    max_media_mb: float = Field(default=16.0, gt=0, le=1024, description="largest encoded image or video, in MiB")
    max_media_pixels: int = Field(default=64_000_000, ge=1, description="most pixels of one frame before resizing")
    media_url_hosts: str | None = Field(
        default=None, description="hosts that media are fetched from, with commas; `.a.org`: all below it; none: no URLs"
    )
    media_url_ports: str = Field(default="443", description="ports of such URLs, with commas")
    media_url_http: bool = Field(default=False, description="http:// too, not https:// alone")
    media_url_networks: str | None = Field(
        default=None, description="networks that are fetched from though not public, as 10.1.0.0/16, with commas"
    )
    media_url_redirects: int = Field(default=0, ge=0, le=3, description="redirects followed, each one checked again")
    media_url_idle_timeout: float = Field(default=5.0, gt=0, description="seconds to connect, and between bytes")
    media_url_timeout: float = Field(default=20.0, gt=0, description="seconds that fetching one media may take")
    media_url_concurrency: int = Field(default=16, ge=1, le=1024, description="media fetched at once")

    max_video_frames: int = Field(default=64, ge=1, le=1024, description="most frames taken from one video")
    max_video_seconds: float = Field(default=120.0, gt=0, le=3600, description="longest video, in seconds")
    video_fps: float = Field(default=1.0, gt=0, le=60, description="frames taken from a second of video")
    decode_processes: int = Field(default=2, ge=1, le=64, description="processes that decode media")
    decode_memory_mb: int = Field(default=2048, ge=256, description="address space of each decode process, in MiB")
    decode_timeout: float = Field(default=20.0, gt=0, description="seconds that decoding one media may take")

    stall_timeout: float = Field(default=120.0, gt=0, description="seconds with work but no step until ready says 503")
    max_restart_delay: float = Field(default=30.0, gt=0, description="longest pause before a restart, in seconds")

    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="least level logged")
    log_format: LogFormat = Field(default="text", description="form of a log line")
    # fmt: on

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)

    @property
    def max_media_bytes(self) -> int:
        return int(self.max_media_mb * 2**20)

    @property
    def data_folder(self) -> Path:
        return self.data_dir or Path.home() / ".local" / "share" / "flamboyance"

    @property
    def media_store_url(self) -> str:
        return self.media_store or str(self.data_folder / "media")

    @property
    def database_url(self) -> str:
        own = f"sqlite:///{self.data_folder / 'flamboyance.db'}"
        return own if self.database is None else self.database.get_secret_value()

    def to_worker(self) -> str:
        """JSON for the worker: everything but the secrets, which it has no use for."""
        return self.model_dump_json(exclude={"api_key", "database", "config"})


class _Sources(BaseSettings, Settings):
    model_config = SettingsConfigDict(
        env_prefix=PREFIX, cli_kebab_case=True, cli_prog_name="python -m server", cli_hide_none_type=True
    )

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return env_settings, init_settings


def read_settings(arguments: Sequence[str]) -> Settings:
    """Settings from flags, the environment and the YAML file, in this order of precedence."""
    _refuse_unknown_variables(os.environ)
    file = _config_file(arguments)
    try:
        values: dict[str, Any] = {**_read_yaml(file), "_cli_parse_args": list(arguments)}
        sources = _Sources(**values)
    except ValidationError as error:
        first = error.errors()[0]
        raise SettingsError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    return Settings.model_construct(**dict(sources))


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields}
    if unknown := sorted(name for name in environment if name.startswith(PREFIX) and name not in known):
        raise SettingsError(f"unknown environment variable {', '.join(unknown)}")


def _config_file(arguments: Sequence[str]) -> str | None:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config", default=os.environ.get(f"{PREFIX}CONFIG"))
    file: str | None = parser.parse_known_args(arguments)[0].config
    return file


def _read_yaml(file: str | None) -> dict[str, Any]:
    if file is None:
        return {}
    try:
        values = yaml.safe_load(Path(file).read_text(encoding="utf-8")) or {}
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"config {file}: {error}") from None
    if not isinstance(values, dict):
        raise SettingsError(f"config {file} holds a {type(values).__name__}, not a mapping of settings")
    if unknown := sorted(set(map(str, values)) - Settings.model_fields.keys()):
        raise SettingsError(f"config {file}: unknown key {', '.join(unknown)}")
    return values


def child_environment(**values: str) -> dict[str, str]:
    """The environment that a child process is given: this process's own without secrets, with some values set."""
    secrets = {f"{PREFIX}API_KEY", f"{PREFIX}DATABASE"}
    own = {name: value for name, value in os.environ.items() if name.upper() not in secrets}
    return {**own, **values}
