"""Responses about the state of the server."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from server.schemas.responses.base import ResponseSchema

EngineInfo = dict[str, Any]


class Live(ResponseSchema):
    status: Literal["live"]


class Ready(ResponseSchema):
    status: str = Field(description="`ready`, or the first reason against it, such as `starting` or `overloaded`.")


class EngineProgress(ResponseSchema):
    status: Literal["ok", "stalled"]
    last_step_age_seconds: float
    requests_waiting: int
    requests_running: int


class Health(Ready):
    model: str
    engine: EngineInfo = Field(description="Versions, device, number formats and kernels.")


class ServerVersion(ResponseSchema):
    version: str
    engine: EngineInfo
