"""The manifests of each overlay are valid, and name what exists: settings, routes, folders, users and metrics."""

from __future__ import annotations

import re
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

from server.api.guard import OPEN_PATHS
from server.settings import PREFIX, Settings
from server.telemetry.metrics import Metrics

DEPLOY = Path(__file__).resolve().parents[1]
OVERLAYS = sorted(folder.name for folder in (DEPLOY / "kubernetes" / "overlays").iterdir())
DOCKERFILE = (DEPLOY.parent / "Dockerfile").read_text(encoding="utf-8")
README = (DEPLOY / "README.md").read_text(encoding="utf-8")
# the oldest and the newest version of Kubernetes that the manifests are checked with
VERSIONS = ("1.31", "1.37")
# in which nodes mostly learn that the address of a pod is gone, and in which a server exits after its last request
REMOVAL_SECONDS, EXIT_SECONDS = 5, 10
# of the Prometheus operator, whose schema is not among those of Kubernetes
CUSTOM_KINDS = {"ServiceMonitor"}

Manifest = dict[str, Any]


@cache
def manifests(overlay: str) -> list[Manifest]:
    """Return the manifests of an overlay as kustomize writes them."""
    folder = DEPLOY / "kubernetes" / "overlays" / overlay
    done = subprocess.run(["kustomize", "build", str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def only(overlay: str, kind: str) -> Manifest:
    (manifest,) = [manifest for manifest in manifests(overlay) if manifest["kind"] == kind]
    return manifest


def container(overlay: str) -> Manifest:
    (server,) = only(overlay, "Deployment")["spec"]["template"]["spec"]["containers"]
    return dict(server)


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_manifests_conform_to_the_schemas_of_kubernetes(overlay: str, version: str) -> None:
    for manifest in manifests(overlay):
        if manifest["kind"] not in CUSTOM_KINDS:
            kubernetes_validate.validate(manifest, version, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_everything_is_in_one_namespace_with_one_label(overlay: str) -> None:
    selector = {"app.kubernetes.io/name": "flamboyance"}
    for manifest in manifests(overlay):
        assert manifest["metadata"].get("namespace", "flamboyance") == "flamboyance"
    assert only(overlay, "Deployment")["spec"]["selector"]["matchLabels"] == selector
    assert only(overlay, "Deployment")["spec"]["template"]["metadata"]["labels"] == selector
    assert only(overlay, "Service")["spec"]["selector"] == selector
    for kind, field in (
        ("PodDisruptionBudget", "selector"),
        ("NetworkPolicy", "podSelector"),
        ("ServiceMonitor", "selector"),
    ):
        assert only(overlay, kind)["spec"][field]["matchLabels"] == selector


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_each_variable_is_a_setting_and_each_secret_is_documented(overlay: str) -> None:
    for variable in container(overlay)["env"]:
        assert variable["name"].removeprefix(PREFIX).lower() in Settings.model_fields
        if "valueFrom" in variable:
            secret = variable["valueFrom"]["secretKeyRef"]
            assert secret["name"] == "flamboyance"
            assert f"--from-literal={secret['key']}=" in README


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_no_variable_of_a_service_looks_like_a_setting(overlay: str) -> None:
    """Kubernetes gives a pod variables such as FLAMBOYANCE_PORT=tcp://… for each Service, unless the pod refuses them."""
    prefix = only(overlay, "Service")["metadata"]["name"].upper() + "_"
    assert prefix.startswith(PREFIX.upper())
    assert only(overlay, "Deployment")["spec"]["template"]["spec"]["enableServiceLinks"] is False


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_probes_need_no_key(overlay: str) -> None:
    server = container(overlay)
    paths = [server[probe]["httpGet"]["path"] for probe in ("livenessProbe", "readinessProbe", "startupProbe")]
    assert paths == ["/health/live", "/health/ready", "/health/ready"]
    assert OPEN_PATHS.issuperset([*paths, only(overlay, "ServiceMonitor")["spec"]["endpoints"][0]["path"]])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_serves_until_its_address_is_removed_and_outlives_the_shutdown(overlay: str) -> None:
    """Kubernetes removes the address while it ends the pod: without a pause before SIGTERM, new connections are refused."""
    program, seconds = container(overlay)["lifecycle"]["preStop"]["exec"]["command"]
    assert (program, int(seconds) >= REMOVAL_SECONDS) == ("sleep", True)
    assert "FROM python:${PYTHON}-slim AS runtime" in DOCKERFILE  # Debian, which has `sleep`
    grace = only(overlay, "Deployment")["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace >= int(seconds) + Settings().shutdown_timeout + EXIT_SECONDS


def test_a_service_of_compose_outlives_the_shutdown() -> None:
    compose = yaml.safe_load((DEPLOY / "compose.yaml").read_text(encoding="utf-8"))
    grace = float(compose["services"]["server"]["stop_grace_period"].removesuffix("s"))
    assert grace >= Settings().shutdown_timeout + EXIT_SECONDS


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_container_is_that_of_the_dockerfile(overlay: str) -> None:
    server, pod = container(overlay), only(overlay, "Deployment")["spec"]["template"]["spec"]
    assert f"USER {pod['securityContext']['runAsUser']}" in DOCKERFILE
    assert [port["containerPort"] for port in server["ports"]] == [Settings().port]
    name, tag = server["image"].split(":")
    assert (name, f"AS {tag}" in DOCKERFILE) == ("flamboyance", True)
    assert server["securityContext"]["readOnlyRootFilesystem"] is True
    mounts = {mount["mountPath"] for mount in server["volumeMounts"]}
    assert {"/home/flamboyance/.cache", "/home/flamboyance/data", "/tmp"} == mounts
    assert {mount["name"] for mount in server["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("overlay", ["cpu", "postgresql"])
def test_a_worker_has_the_threads_for_which_its_pod_requests_processors(overlay: str) -> None:
    """Otherwise it has one for each processor of its node, and the workers of a node bind theirs to the same ones."""
    server = container(overlay)
    threads = {each["name"]: each.get("value") for each in server["env"]}.get("FLAMBOYANCE_NUM_THREADS")
    assert threads == server["resources"]["requests"]["cpu"]


def test_several_replicas_share_their_disks_and_their_database() -> None:
    claims = [manifest for manifest in manifests("postgresql") if manifest["kind"] == "PersistentVolumeClaim"]
    assert [claim["spec"]["accessModes"] for claim in claims] == [["ReadWriteMany"]] * 2
    assert "FLAMBOYANCE_DATABASE" in {variable["name"] for variable in container("postgresql")["env"]}
    assert "replicas" not in only("postgresql", "Deployment")["spec"]  # the autoscaler's


def test_the_autoscaler_reads_a_metric_that_the_adapter_makes_of_ours() -> None:
    (metric,) = only("postgresql", "HorizontalPodAutoscaler")["spec"]["metrics"]
    folder = DEPLOY / "kubernetes" / "overlays" / "postgresql"
    (rule,) = yaml.safe_load((folder / "prometheus-adapter.yaml").read_text(encoding="utf-8"))["rules"]["custom"]
    assert metric["pods"]["metric"]["name"] == rule["name"]["as"]
    exposed = {family.name for family in Metrics("m").registry.collect()}
    assert set(re.findall(r"flamboyance:\w+", rule["seriesQuery"] + rule["metricsQuery"])) <= exposed
