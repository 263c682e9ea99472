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
    config: Path | None = Field(None, description="YAML file of settings")
    model: str | None = Field(None, description="model folder; none: the default model")
    served_model_name: str | None = Field(None, description="the name clients use; none: the one in config.json")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="where the model runs")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="number format of the weights")
    max_model_len: int | None = Field(None, ge=2, description="longest prompt with answer, in tokens; none: as trained")
    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences that run at once")
    max_num_batched_tokens: int = Field(512, ge=16, description="tokens of one step")
    block_size: int = Field(16, ge=1, le=1024, description="tokens of a block of the text cache")
    kv_cache_mb: int = Field(1024, ge=1, description="keys and values of text, in MiB")
    media_cache_mb: int = Field(1024, ge=1, description="keys and values of media, in MiB")
    host_media_mb: int = Field(256, ge=0, description="visual tokens kept in host memory, in MiB")

    host: str = Field("127.0.0.1", description="address to listen at")
    port: int = Field(8000, ge=0, le=65535, description="port to listen at; 0 picks a free one")
    api_key: SecretStr | None = Field(None, min_length=8, description="bearer key that requests must carry; none: open")
    shutdown_timeout: float = Field(30.0, ge=0, le=3600, description="seconds that running requests get after SIGTERM")
    max_num_queued: int = Field(256, ge=1, description="requests that may wait; one more is refused with 503")
    max_body_mb: float = Field(64.0, gt=0, le=4096, description="largest request body, in MiB")
    body_timeout: float = Field(60.0, gt=0, description="seconds in which a request body must arrive")
    keep_alive: float = Field(15.0, gt=0, description="seconds between comment lines in a stream that waits")

    max_media_per_request: int = Field(64, ge=0, description="images and videos in one prompt")
    max_media_mb: float = Field(16.0, gt=0, le=1024, description="largest encoded image or video, in MiB")
    max_media_pixels: int = Field(64_000_000, ge=1, description="most pixels of one frame before resizing")
    decode_processes: int = Field(2, ge=1, le=64, description="processes that decode media")
    decode_memory_mb: int = Field(2048, ge=256, description="address space of each decode process, in MiB")
    decode_timeout: float = Field(20.0, gt=0, description="seconds that decoding one media may take")

    stall_timeout: float = Field(120.0, gt=0, description="seconds with work but no step until ready says 503")
    max_restart_delay: float = Field(30.0, gt=0, description="longest pause in seconds before a dead worker restarts")

    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level that is logged")
    log_format: LogFormat = Field("text", description="form of a log line")
    # fmt: on

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)

    @property
    def max_media_bytes(self) -> int:
        return int(self.max_media_mb * 2**20)

    def to_worker(self) -> str:
        """JSON for the worker: everything but the key, which it has no use for."""
        return self.model_dump_json(exclude={"api_key", "config"})


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
    """The environment that a child process is given: this process's own, with some values set."""
    return {**os.environ, **values}
