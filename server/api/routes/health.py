"""Health checks: live (the process responds), ready (it would serve a request now), progress (the engine makes steps).

An idle engine is ready; a busy engine that has made no step for `stall_timeout` is not.
"""

from __future__ import annotations

from fastapi import APIRouter
from starlette.responses import Response

from server.api.openapi import describe
from server.api.responses import JSONResponse
from server.api.services import GivenServices, Services
from server.schemas.responses.models import EngineProgress, Health, Live, Ready, ServerVersion
from server.telemetry.metrics import CONTENT_TYPE
from server.version import VERSION

router = APIRouter()


@router.get("/health/live", **describe("Health", response=Live))
async def live() -> Response:
    """Report that the process is alive."""
    return JSONResponse({"status": "live"})


@router.get("/health/ready", **describe("Health", response=Ready, statuses=(200, 503)))
async def ready(services: GivenServices) -> Response:
    """Report whether the server accepts requests now."""
    status = readiness(services)
    return JSONResponse({"status": status}, 200 if status == "ready" else 503)


@router.get("/health/progress", **describe("Health", response=EngineProgress, statuses=(200, 503)))
async def progress(services: GivenServices) -> Response:
    """Report whether the engine makes progress.

    The status is 503 if the engine has work, and its last step is longer ago than the setting `stall_timeout`.
    """
    body = {
        "status": "stalled" if _is_stalled(services) else "ok",
        "last_step_age_seconds": round(services.engine.step_age, 3),
        "requests_waiting": services.admission.num_waiting,
        "requests_running": services.admission.num_running,
    }
    return JSONResponse(body, 503 if _is_stalled(services) else 200)


@router.get("/health", **describe("Health", response=Health, statuses=(200, 503)))
async def health(services: GivenServices) -> Response:
    """Report readiness, the model, and the engine's device, number formats and kernels."""
    status = readiness(services)
    body = {"status": status, "model": services.model.name, "engine": services.engine.info}
    return JSONResponse(body, 200 if status == "ready" else 503)


@router.get("/version", **describe("Health", response=ServerVersion))
async def version(services: GivenServices) -> Response:
    """Report the versions of the server and its packages, the engine's device, and the digests of the weights."""
    weights = services.weights.describe()
    return JSONResponse({"version": VERSION, "engine": services.engine.info, "weights": weights})


@router.get("/metrics", **describe("Health", response={"text/plain": str}))
async def metrics(services: GivenServices) -> Response:
    """Return the metrics in the text format of Prometheus."""
    return Response(await services.expose_metrics(), media_type=CONTENT_TYPE)


def readiness(services: Services) -> str:
    """Return "ready", or the first reason why the server is not."""
    if services.admission.is_closed:
        return "shutting_down"
    if services.engine.state != "ready":
        return services.engine.state
    if _is_stalled(services):
        return "stalled"
    return "overloaded" if services.admission.queue.is_full else "ready"


def _is_stalled(services: Services) -> bool:
    return services.engine.step_age > services.settings.stall_timeout
