"""The fleet as an application of Ray Serve: gateways in front of replicas, and calls of all of one kind."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, cast

from ray import serve
from ray.serve.config import AutoscalingConfig, HTTPOptions
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.schema import LoggingConfig

from deploy.ray.fleet import Fleet
from deploy.ray.gateway import FLEET_SECONDS, Gateway
from deploy.ray.replica import replica_class
from server.wire import ENGINE_FACTORY

NAME, GATEWAYS, REPLICAS = "flamboyance", "Gateway", "Server"
ROUTER = "deploy.ray.router.AffinityRouter"
# seconds in addition to the time of the server's own shutdown
SHUTDOWN_MARGIN_SECONDS = 10.0
# Ray replaces an actor after three checks in a row without an answer in this time. Loading and computing do not delay the
# answer, which comes from another process than the engine's
HEALTH_CHECK = {"health_check_period_s": 5.0, "health_check_timeout_s": 10.0}
# a gateway only passes requests on and waits, so no processor is reserved for it
GATEWAY_REQUESTS = 1000
ROOT = Path(__file__).resolve().parents[2]
# uvloop cannot start processes in new process groups, which the server needs
ENVIRONMENT = {"PYTHONPATH": str(ROOT), "RAY_USE_UVLOOP": "0"}

logger = logging.getLogger(__name__)


def http_options(fleet: Fleet) -> HTTPOptions:
    return HTTPOptions(host=fleet.settings.host, port=fleet.settings.port)


def application(fleet: Fleet, factory: str = ENGINE_FACTORY) -> serve.Application:
    """Return the application; deploying it again updates the running one."""
    replicas = _deployment(replica_class(fleet.models_per_replica), REPLICAS).options(
        **_scale(fleet),
        max_ongoing_requests=fleet.max_requests,
        max_queued_requests=fleet.settings.max_num_queued,
        user_config=fleet.replica_config,
        request_router_config={"request_router_class": ROUTER},
        graceful_shutdown_timeout_s=fleet.settings.shutdown_timeout + SHUTDOWN_MARGIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        **HEALTH_CHECK,
        # a rolling update starts the next replica before it stops one
        max_surge_percent=1,
        ray_actor_options={
            "num_cpus": fleet.cpus,
            "num_gpus": fleet.gpus,
            "runtime_env": {"env_vars": ENVIRONMENT},
        },
        logging_config=_LOGGING,
        # `serve.run` would otherwise replace every replica each time
        version=fleet.version,
        _internal=True,
    )
    gateways = _deployment(serve.ingress()(Gateway), GATEWAYS).options(
        num_replicas=fleet.gateways,
        max_ongoing_requests=GATEWAY_REQUESTS,
        user_config=fleet.gateway_config,
        graceful_shutdown_timeout_s=fleet.settings.shutdown_timeout + SHUTDOWN_MARGIN_SECONDS,
        graceful_shutdown_wait_loop_s=0.5,
        **HEALTH_CHECK,
        max_surge_percent=1,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": ENVIRONMENT}},
        logging_config=_LOGGING,
        version=fleet.gateway_version,
        _internal=True,
    )
    return gateways.bind(replicas.bind(fleet.settings, factory), fleet.settings)


def call_all(deployment: str, method: str) -> list[Any]:
    """Call a method of all replicas of a deployment, and return their answers: an exception from one that fails."""
    try:
        response = serve.get_deployment_handle(deployment, NAME).broadcast(method)
        return response.results(timeout_s=FLEET_SECONDS, return_exceptions=True)
    except (TimeoutError, DeploymentUnavailableError) as error:
        logger.warning("a part of the fleet cannot be reached", extra={"deployment": deployment}, exc_info=error)
        return []


_LOGGING = LoggingConfig(enable_access_log=False)


def _deployment(kind: type, name: str) -> serve.Deployment:
    return cast(serve.Deployment, serve.deployment(kind, name=name))


def _scale(fleet: Fleet) -> dict[str, Any]:
    """Return the number of replicas, or how it depends on the running and waiting requests."""
    if not fleet.is_scaled:
        return {"num_replicas": fleet.min_replicas}
    scaling = AutoscalingConfig(
        min_replicas=fleet.min_replicas,
        max_replicas=fleet.max_replicas,
        target_ongoing_requests=fleet.target_requests,
    )
    return {"autoscaling_config": scaling}
