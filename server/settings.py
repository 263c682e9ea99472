"""All settings of the server: each is a flag, a FLAMBOYANCE_* variable and a key of the YAML file named by --config.

Flags precede variables, and variables precede the file. An unknown name raises. No other module reads the environment.
"""

from __future__ import annotations

import os
from argparse import ArgumentParser
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, ValidationInfo, field_validator
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from model.cache import cache_folder
from server.environment import checked_proxies, may_be_secret
from server.schemas.sentences import in_words
from server.setting_values import AbsolutePath, Collector, DataFolder, Hosts, Key, Model, Origins, without_password
from server.settings_file import read_file
from server.spelling import advice
from server.telemetry.logs import LogFormat

PREFIX = "FLAMBOYANCE_"
# variables of the client's command line, which may have the same environment
CLIENT_VARIABLES = {"FLAMBOYANCE_URL"}
# the variable that uvicorn reads
PROXIES = "FORWARDED_ALLOW_IPS"
PROGRAM = "python -m server"
# where Python finds the modules of the processes that the server starts
ROOT = Path(__file__).resolve().parents[1]


class SettingsError(ValueError):
    """A setting that is unknown or has an invalid value; the message names it."""


class Settings(BaseModel):
    """Few-shot inference server for Flamingo-family vision-language models."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    config: AbsolutePath | None = Field(None, description="YAML file with settings")
    model: Model | None = Field(
        None,
        description="model folder, or OWNER/NAME or OWNER/NAME@REVISION on the Hugging Face Hub; none: the default model",
    )
    served_model_name: str | None = Field(None, description="model name for clients; none: the name in config.json")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="device of the model")
    tensor_parallel: int = Field(
        1, ge=1, le=64, description="number of GPUs (on a CPU: processes) between which the model is divided by heads"
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field("auto", description="number format of weights")
    cache_dir: AbsolutePath | None = Field(
        None, description="folder for imported models and measured weight formats; none: ~/.cache/flamboyance"
    )
    data_dir: DataFolder | None = Field(
        None, description="folder for data that clients store; none: ~/.local/share/flamboyance"
    )
    media_store: str | None = Field(
        None, description="folder or fsspec URL for uploaded media; none: media in data_dir"
    )
    database: SecretStr | None = Field(
        None, description="URL of the database, sqlite: or postgresql:; none: flamboyance.db in data_dir"
    )
    max_set_examples: int = Field(10_000, ge=1, le=1_000_000, description="maximum examples in a support set")
    evaluation_queries: int = Field(
        2, ge=1, le=64, description="concurrent queries of an evaluation while clients have no requests"
    )
    sweep_interval: float = Field(60.0, gt=0, le=3600, description="seconds between two sweeps of expired data")
    num_threads: int | None = Field(
        None, ge=1, le=1024, description="threads of the model on a CPU; none: torch's default"
    )
    kernels: Literal["auto", "triton", "reference"] = Field(
        "auto",
        description="kernel backend; auto: Triton on a GPU, Numba on a CPU. "
        "Startup fails if the requested backend cannot run",
    )
    kernel_launches: AbsolutePath | None = Field(
        None,
        description="GPU: file of kernel launch parameters that the kernel benchmark measured on this kind of GPU; none: "
        "the file that the server has for this GPU, if there is one",
    )
    weight_format: Literal["auto", "native", "fp8", "int8", "int4"] = Field(
        "auto",
        description="format of decoder weights; auto: on a CPU four bits if the model has them, else native; fp8: GPU only",
    )
    vision_format: Literal["auto", "native", "bfloat16"] = Field(
        "auto",
        description="CPU: format of products in a vision transformer; auto: bfloat16 if the processor has it, it is "
        "faster, and dtype is not set",
    )
    max_model_len: int | None = Field(
        None, ge=2, description="maximum tokens of prompt and answer; none: the model's limit"
    )
    max_num_seqs: int | None = Field(
        None, ge=1, le=4096, description="maximum sequences that run concurrently; none: 64, on a GPU 256"
    )
    max_num_batched_tokens: int | None = Field(
        None, ge=16, description="maximum tokens per step; none: 512, on a GPU 2048"
    )
    step_time_target: float = Field(
        0.03,
        gt=0,
        le=60,
        description="seconds that a step of the engine should take at most while requests run concurrently",
    )
    speculative_tokens: int = Field(
        0,
        ge=0,
        le=16,
        description="maximum tokens that speculative decoding proposes per step for a greedy answer; 0: none",
    )
    allow_negative_priority: bool = Field(
        False, description="accept requests with a negative priority, which run before all others"
    )
    block_size: int | None = Field(
        None, ge=1, le=1024, description="tokens per block of the text cache; none: 16, on a CPU 4"
    )
    memory_fraction: float = Field(
        0.9, gt=0, le=1, description="GPU: fraction of its memory for weights, steps and both caches"
    )
    kv_cache_mb: int | None = Field(
        None,
        ge=1,
        description="memory for keys and values of text, in MiB; none: 1024, on a GPU what memory_fraction leaves",
    )
    media_cache_mb: int | None = Field(
        None,
        ge=1,
        description="memory for keys and values of media, in MiB; none: 1024, on a GPU a quarter of what memory_fraction "
        "leaves",
    )
    host_media_mb: int = Field(256, ge=0, description="host memory for visual tokens, in MiB")

    host: str = Field("127.0.0.1", description="address to listen on")
    port: int = Field(8000, ge=0, le=65535, description="port to listen on; 0: any free port")
    playground: bool = Field(True, description="serve the playground, a web page for trying the server, at /")
    vllm_metrics: bool = Field(
        False, description="also expose metrics under vLLM's names, for its dashboards and routers"
    )
    api_key: Key | None = Field(
        None,
        description="bearer key with the role admin; none: no key is required until `flamboyance keys create` makes one",
    )
    share_caches: bool = Field(
        False,
        description="let tenants share the engine's caches: faster if they send the same prompts and pictures, but the "
        "time of an answer reveals to a tenant what others have sent",
    )
    require_key: bool = Field(False, description="refuse requests without a key even while the database has no key")
    allowed_hosts: Hosts | None = Field(
        None,
        description="names that the header Host may have, comma-separated; none: any name, or only localhost if the server "
        "listens on a loopback address and has no api_key",
    )
    cors_origins: Origins | None = Field(
        None,
        description="origins whose web pages may send requests, comma-separated (https://app.example.org); none: no page",
    )
    guard_metrics: bool = Field(False, description="also require a key for /metrics")
    shutdown_timeout: float = Field(
        30.0, ge=0, le=3600, description="seconds for running requests to finish after SIGTERM"
    )
    max_num_queued: int = Field(
        256, ge=1, description="maximum waiting requests; further requests are refused with 503"
    )
    max_connections: int = Field(
        1024,
        ge=1,
        description="maximum open connections; a new one beyond it replaces the one whose client has been silent longest",
    )
    header_timeout: float = Field(10.0, gt=0, description="seconds in which the head of a request must arrive")
    max_body_mb: float = Field(64.0, gt=0, le=4096, description="maximum size of a request body, in MiB")
    max_import_mb: float = Field(
        1024.0, gt=0, le=65536, description="maximum size of the archive of a support set, in MiB"
    )
    max_bodies_mb: int = Field(
        512,
        ge=1,
        description="memory for the bodies of requests that arrive, wait or run, and of unread responses, in MiB",
    )
    max_client_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description="maximum share of one client in the queue, the memory for bodies, and unfinished evaluations and "
        "warmings; 1: no limit",
    )
    request_timeout: float | None = Field(
        None,
        gt=0,
        description="maximum seconds that a request may take; a request can set a shorter time; none: no limit",
    )
    body_timeout: float = Field(60.0, gt=0, description="seconds in which a request body must arrive")
    keep_alive: float = Field(15.0, gt=0, description="seconds between keep-alive comments in a silent stream")

    max_media_per_request: int = Field(64, ge=0, description="maximum images and videos in one request")
    max_media_mb: float = Field(16.0, gt=0, le=1024, description="maximum size of an image or video file, in MiB")
    named_media_mb: int = Field(64, ge=0, description="memory for media that clients have named by `uuid`, in MiB")
    max_media_pixels: int = Field(64_000_000, ge=1, description="maximum pixels of one frame before resizing")
    max_request_pixels: int = Field(
        1_000_000_000, ge=1, description="maximum pixels that are decoded for one request, over all frames"
    )
    max_request_frames_mb: float = Field(
        512.0, gt=0, description="maximum memory of the decoded and resized frames of one request, in MiB"
    )
    max_open_frames_mb: float = Field(
        1024.0,
        gt=0,
        description="memory for decoded frames of all open requests, in MiB; above it, only the longest open request gets "
        "more",
    )
    media_url_hosts: str | None = Field(
        None,
        description="hosts from which media may be fetched, comma-separated; `.a.org`: its subdomains; none: no URLs",
    )
    media_url_ports: str = Field("443", description="permitted ports of media URLs, comma-separated")
    media_url_http: bool = Field(False, description="permit http:// in addition to https://")
    media_url_networks: str | None = Field(
        None,
        description="non-public networks that media may be fetched from, such as 10.1.0.0/16, comma-separated",
    )
    media_url_redirects: int = Field(0, ge=0, le=3, description="maximum redirects, each checked like the first URL")
    media_url_idle_timeout: float = Field(5.0, gt=0, description="seconds to connect, and between received bytes")
    media_url_timeout: float = Field(20.0, gt=0, description="seconds to fetch one media item")
    media_url_concurrency: int = Field(16, ge=1, le=1024, description="maximum concurrent fetches")

    max_video_frames: int = Field(64, ge=1, le=1024, description="maximum frames sampled from one video")
    max_video_seconds: float = Field(120.0, gt=0, le=3600, description="maximum length of a video, in seconds")
    video_fps: float = Field(1.0, gt=0, le=60, description="frames sampled per second of video")
    decode_processes: int = Field(2, ge=1, le=64, description="processes that decode media")
    decode_memory_mb: int = Field(2048, ge=256, description="address space of each decode process, in MiB")
    decode_timeout: float = Field(20.0, gt=0, description="seconds of processor time to decode one media item")

    stall_timeout: float = Field(
        120.0,
        gt=0,
        description="seconds without a finished step, while there is work, until the worker is replaced; must exceed the "
        "longest step",
    )
    max_restart_delay: float = Field(30.0, gt=0, description="maximum delay before the worker is restarted, in seconds")
    spare_worker: bool = Field(
        True,
        description="keep a spare process that has imported the engine's code and replaces a dead worker",
    )

    otlp_endpoint: Collector | None = Field(
        None, description="URL of an OpenTelemetry collector, which gets a trace of each request; none: no traces"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="minimum log level")
    log_format: LogFormat = Field("text", description="format of log lines")

    @field_validator("*", mode="before")
    @classmethod
    def _is_not_boolean(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse true where a number belongs: pydantic takes it as 1, and YAML reads it from yes and on."""
        if isinstance(value, bool) and cls.model_fields[str(info.field_name)].annotation is not bool:
            raise ValueError("may not be true or false")
        return value

    @property
    def max_body_bytes(self) -> int:
        return int(self.max_body_mb * 2**20)

    @property
    def max_import_bytes(self) -> int:
        return int(self.max_import_mb * 2**20)

    @property
    def max_media_bytes(self) -> int:
        return int(self.max_media_mb * 2**20)

    @property
    def max_request_frames_bytes(self) -> int:
        return int(self.max_request_frames_mb * 2**20)

    @property
    def max_open_frames_bytes(self) -> int:
        return int(self.max_open_frames_mb * 2**20)

    @property
    def cache_folder(self) -> Path:
        return cache_folder(self.cache_dir)

    @property
    def data_folder(self) -> Path:
        return self.data_dir or Path.home() / ".local" / "share" / "flamboyance"

    @property
    def media_store_url(self) -> str:
        return self.media_store or str(self.data_folder / "media")

    @property
    def database_url(self) -> str:
        default = f"sqlite:///{self.data_folder / 'flamboyance.db'}"
        return default if self.database is None else self.database.get_secret_value()

    @property
    def database_setting(self) -> str:
        """The name of the setting that determines `database_url`."""
        return "data_dir" if self.database is None else "database"

    def to_worker(self) -> str:
        """Return JSON for the worker, without the secrets, which it does not need."""
        endpoint = None if self.otlp_endpoint is None else without_password(self.otlp_endpoint)
        settings = self.model_copy(update={"otlp_endpoint": endpoint})
        return settings.model_dump_json(exclude={"api_key", "database", "media_store", "config"})


class _Sources(BaseSettings, Settings):
    model_config = SettingsConfigDict(env_prefix=PREFIX, cli_kebab_case=True, cli_hide_none_type=True)

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


def read_settings(arguments: Sequence[str], prog: str = PROGRAM) -> Settings:
    """Read flags, the environment and the YAML file, in this order of precedence. Raises `SettingsError`.

    The model may also be named by the argument without a flag; `prog` is the name of the program in its usage message.
    """
    _refuse_unknown_variables(os.environ)
    file = _config_file(arguments)
    try:
        sources = _Sources(**_read_file(file), _cli_settings_source=_read_flags(arguments, prog))
    except ValidationError as error:
        problem = error.errors()[0]
        raise SettingsError(f"{'.'.join(map(str, problem['loc']))}: {in_words(problem)}") from None
    return Settings.model_construct(**dict(sources))


def _read_flags(arguments: Sequence[str], prog: str) -> CliSettingsSource[Any]:
    parser = ArgumentParser(
        prog=prog, usage="%(prog)s [-h] [MODEL] [--SETTING VALUE ...]", description=Settings.__doc__, allow_abbrev=False
    )
    parser.add_argument("positional_model", nargs="?", metavar="MODEL", help="the same as --model")
    flags: CliSettingsSource[Any] = CliSettingsSource(_Sources, root_parser=parser)
    namespace, unknown = parser.parse_known_args(arguments)
    if unknown:
        hint = advice(unknown[0].partition("=")[0], [f"--{name.replace('_', '-')}" for name in Settings.model_fields])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    parsed = vars(namespace)
    if (model := parsed.pop("positional_model")) is not None:
        if "model" in parsed:
            raise SettingsError(f"model: it is set twice: {model} and --model {parsed['model']}")
        parsed["model"] = model
    return flags(parsed_args=parsed)


def _refuse_unknown_variables(environment: Mapping[str, str]) -> None:
    known = {f"{PREFIX}{name}".upper() for name in Settings.model_fields} | CLIENT_VARIABLES
    # in any case of letters, like the variables that are read
    if unknown := sorted(n for n in environment if n.upper().startswith(PREFIX) and n.upper() not in known):
        service = "; Kubernetes sets these for a Service of this name: set enableServiceLinks: false"
        hint = service if f"{PREFIX}SERVICE_HOST" in unknown else advice(unknown[0].upper(), known)
        raise SettingsError(f"unknown environment variable {', '.join(unknown)}{hint}")


def _config_file(arguments: Sequence[str]) -> str | None:
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    of_environment = (value for name, value in os.environ.items() if name.upper() == f"{PREFIX}CONFIG")
    parser.add_argument("--config", default=next(of_environment, None))
    return parser.parse_known_args(arguments)[0].config


def _read_file(file: str | None) -> dict[str, Any]:
    if file == "":
        raise SettingsError("config: must be a path, and is empty")
    try:
        return {} if file is None else read_file(file, Settings.model_fields)
    except ValueError as error:
        raise SettingsError(f"config: {file}: {error}") from None


def trusted_proxies() -> str:
    """Return the addresses whose `X-Forwarded-For` is believed, none by default. Raises `SettingsError` for other text."""
    try:
        return checked_proxies(os.environ.get(PROXIES, ""))
    except ValueError as error:
        raise SettingsError(f"{PROXIES}: {error}") from None


def child_environment(**values: str) -> dict[str, str]:
    """Return the environment for a child process: this process's without secrets, with these values added."""
    return {name: value for name, value in os.environ.items() if not may_be_secret(name, value)} | values


def opentelemetry_variables() -> dict[str, str]:
    """Return OpenTelemetry's variables of the environment, one of which may contain the key of a collector."""
    return {name: value for name, value in os.environ.items() if name.startswith("OTEL_")}
