"""A real Prometheus scrapes a real server under load: every panel of the dashboard has an answer, every alert a case.

`make test-deploy` runs this, with Prometheus from Debian's package.
"""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from PIL import Image

from deploy import pictures
from deploy.dashboard import QUERIES, Query, sections
from deploy.scraping import ALERTS as ALERTS_FILE
from deploy.scraping import Prometheus, scraping
from model.folder import save_folder
from server.telemetry.metrics import Metrics
from tests.server.conftest import data_url, png
from tests.server.test_main import running
from tests.tiny_models import CONFIGS, byte_tokenizer, tiny_model

DEPLOY = Path(__file__).resolve().parents[1]
ALERTS = yaml.safe_load(ALERTS_FILE.read_text(encoding="utf-8"))
CONFIG = CONFIGS["openflamingo"]
SCRAPE_SECONDS = 1
# the load has no media by URL, and nothing that could not be decoded
WITHOUT_DATA = {"fetch"}


@pytest.fixture(scope="module")
def prometheus(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    folder = tmp_path_factory.mktemp("prometheus")
    save_folder(folder / "model", CONFIG, tiny_model(CONFIG).state_dict().items(), byte_tokenizer().to_str())
    with running(folder / "model", folder / "log", "-m", "server") as server:
        address = server.http.base_url.netloc.decode()
        with scraping(address, folder, SCRAPE_SECONDS) as prometheus:
            for number in range(4):  # so that counters rise between scrapes
                load(server.http, number)
                time.sleep(1.5 * SCRAPE_SECONDS)
            yield prometheus


def load(server: httpx.Client, number: int) -> None:
    """Send a few requests of each kind."""
    image = data_url(png("red", (20, 10 + number)))
    examples = [
        {"id": f"{label}-{width}", "image": data_url(png(label, (width, 10))), "label": label}
        for label in ("red", "blue")
        for width in (20, 30)
    ]
    shots = {"shots": [{"image": image, "label": "red"}], "query": {"image": image}, "max_tokens": 4}
    stored = {"name": f"colours-{number}", "examples": examples}
    selected = {
        "examples": {"support_set": stored["name"], "k": 2, "strategy": "rices_image"},
        "query": {"image": image},
    }
    assert server.post("/v1/fewshot/completions", json=shots).is_success
    assert server.post("/v1/support_sets", json=stored).is_success
    assert server.post("/v1/classify", json=selected | {"method": "in_context"}).is_success
    assert server.post(
        "/v1/classify", json={**selected, "examples": {"support_set": stored["name"]}, "method": "knn"}
    ).is_success
    evaluation = {"methods": ["nearest_mean"]}
    assert server.post(f"/v1/support_sets/{stored['name']}/evaluate", json=evaluation).status_code == 202
    assert server.post("/v1/images", content=b"no image", headers={"Content-Type": "image/png"}).status_code == 400
    assert (
        server.post(
            "/v1/completions", json={"prompt": [{"type": "image_url", "image_url": {"url": data_url(png()[:50])}}]}
        ).status_code
        == 400
    )


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: f"{query.panel}: {query.legend}")
def test_every_line_of_the_dashboard_has_an_answer(prometheus: Prometheus, query: Query) -> None:
    assert prometheus.query(query.with_variables("1m")) or query.legend in WITHOUT_DATA


def test_the_panels_are_drawn(prometheus: Prometheus, tmp_path: Path) -> None:
    end = time.time()
    files = pictures.draw(prometheus, end - 30, end, tmp_path)
    assert len(files) == len(list(sections()))
    for file in files:
        with Image.open(file) as image:
            assert len(image.convert("RGB").getcolors(2**20) or ()) > 8  # lines, and not only text


def test_the_pictures_of_the_documentation_are_small_and_those_of_this_dashboard() -> None:
    names = {pictures.file_name(title) for title, _ in sections()}
    files = list(pictures.FOLDER.glob("dashboard-*.png"))
    assert {file.name for file in files} == names
    assert sum(file.stat().st_size for file in files) < 300_000


def test_every_metric_is_on_a_panel() -> None:
    names = {name for query in QUERIES for name in re.findall(r"flamboyance:\w+", query.expression)}
    metrics = {
        family.name + ("_total" if family.type == "counter" else "") for family in Metrics("m").registry.collect()
    }
    assert {re.sub(r"_(bucket|sum|count)$", "", name) for name in names} == metrics


@pytest.mark.parametrize("rule", ALERTS["groups"][0]["rules"], ids=lambda rule: rule["alert"])
def test_an_alert_reads_metrics_that_exist_and_does_not_fire_on_a_healthy_server(
    prometheus: Prometheus, rule: dict[str, Any]
) -> None:
    exposed = {series["metric"]["__name__"] for series in prometheus.query('{job="flamboyance"}')}
    assert set(re.findall(r"flamboyance:\w+", rule["expr"])) <= exposed
    if rule["alert"] != "FlamboyanceSupportSetNotWarm":  # a tiny set may be warming
        assert prometheus.query(rule["expr"]) == []


def test_the_cases_of_the_alerts_pass() -> None:
    done = subprocess.run(
        ["promtool", "test", "rules", str(DEPLOY / "tests" / "alerts.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_alert_has_a_case_where_it_fires() -> None:
    cases = yaml.safe_load((DEPLOY / "tests" / "alerts.yml").read_text(encoding="utf-8"))["tests"]
    firing = {check["alertname"] for case in cases for check in case["alert_rule_test"] if check["exp_alerts"]}
    assert firing == {rule["alert"] for group in ALERTS["groups"] for rule in group["rules"]}
