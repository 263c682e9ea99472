"""The registry exposes all gauges of the engine's heartbeats and all finish reasons."""

from __future__ import annotations

import pytest

from model.inference import prepare_for_inference
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.metrics import ENGINE_METRICS, Metrics
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model

# counted in the API process, from acceptance on
COUNTED_OUTSIDE = {"num_requests_running", "num_requests_waiting"}


def test_every_gauge_of_the_engine_is_exposed() -> None:
    config = CONFIGS["openflamingo"]
    served = prepare_for_inference(tiny_model(config))
    engine = Engine(served, prompt_tokenizer(config.prompt), EngineConfig(max_model_len=64, num_blocks=8))
    assert engine.gauges().keys() == ENGINE_METRICS.keys() | COUNTED_OUTSIDE


def test_values_of_a_heartbeat_have_the_models_name() -> None:
    metrics = Metrics("org/model")
    metrics.engine.values = {"num_preemptions": 3.0, "media_host_bytes": 5.0, "num_requests_running": 9.0}
    text = metrics.expose().decode()
    assert 'flamboyance:num_preemptions_total{model_name="org/model"} 3.0' in text
    assert 'flamboyance:media_host_bytes{model_name="org/model"} 5.0' in text
    assert 'flamboyance:num_requests_running{model_name="org/model"} 0.0' in text


@pytest.mark.parametrize("reason", ["stop", "length", "abort", "error"])
def test_every_finish_reason_begins_at_zero(reason: str) -> None:
    line = f'flamboyance:request_success_total{{finished_reason="{reason}",model_name="m"}} 0.0'
    assert line in Metrics("m").expose().decode()
