"""The registry exposes all gauges of the engine's heartbeats and all finish reasons."""

from __future__ import annotations

import pytest
from prometheus_client.parser import text_string_to_metric_families

from model.inference import prepare_for_inference
from server.engine.config import EngineConfig
from server.engine.engine import Engine
from server.telemetry.measures import ENGINE_METRICS, Buckets, Measures, kind_of_step
from server.telemetry.metrics import Metrics
from tests.tiny_models import CONFIGS, prompt_tokenizer, tiny_model


def test_every_gauge_of_the_engine_is_exposed() -> None:
    config = CONFIGS["openflamingo"]
    served = prepare_for_inference(tiny_model(config))
    engine = Engine(served, prompt_tokenizer(config.prompt), EngineConfig(max_model_len=64, num_blocks=8))
    assert engine.gauges().keys() == ENGINE_METRICS.keys()


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


class TestHistogramsOfTheEngine:
    def test_a_step_is_counted_by_its_kind_and_its_tokens(self) -> None:
        measures, metrics = Measures(), Metrics("m")
        measures.note_step([1, 1], 0, 0, 0.004)
        measures.note_step([1, 100], 3, 2, 0.3)
        measures.note_step([], 0, 3, 0.3)
        measures.note_step([], 0, 0, 0.3)  # nothing ran
        metrics.engine.histograms |= measures.snapshot()
        text = metrics.expose().decode()
        assert 'flamboyance:step_seconds_count{kind="decode",model_name="m"} 1.0' in text
        assert 'flamboyance:step_seconds_bucket{kind="decode",le="0.0025",model_name="m"} 0.0' in text
        assert 'flamboyance:step_seconds_bucket{kind="decode",le="0.005",model_name="m"} 1.0' in text
        assert 'flamboyance:step_seconds_count{kind="mixed",model_name="m"} 1.0' in text
        assert 'flamboyance:step_seconds_count{kind="encode",model_name="m"} 1.0' in text
        assert 'flamboyance:step_seconds_count{kind="prompt",model_name="m"} 0.0' in text
        assert 'flamboyance:iteration_tokens_sum{model_name="m"} 106.0' in text
        assert 'flamboyance:encoder_batch_size_bucket{le="2.0",model_name="m"} 1.0' in text
        assert 'flamboyance:encoder_batch_size_count{model_name="m"} 2.0' in text

    def test_a_value_on_a_bound_belongs_to_its_bucket(self) -> None:
        buckets = Buckets((1.0, 2.0))
        for value in (1.0, 1.5, 2.0, 2.5):
            buckets.observe(value)
        assert buckets.counts == [1, 2, 1]
        assert buckets.total == 7.0

    @pytest.mark.parametrize(
        ("counts", "kind"), [([1], "decode"), ([5, 2], "prompt"), ([1, 2], "mixed"), ([], "encode")]
    )
    def test_kinds(self, counts: list[int], kind: str) -> None:
        assert kind_of_step(counts) == kind


class TestVllmNames:
    def test_a_scraper_of_vllm_finds_its_names(self) -> None:
        """The names and types that vLLM 0.33 exposes, of those that dashboards, AIPerf and inference gateways read."""
        metrics = Metrics("m")
        metrics.engine.values = {"kv_cache_usage_perc": 0.25}
        metrics.engine.info = {"block_size": 16, "num_blocks": 512}
        metrics.prompt_tokens.inc(7)
        metrics.count_finished("stop")
        metrics.time_to_first_token.observe(0.02)
        families = {
            family.name: family
            for family in text_string_to_metric_families(metrics.expose(with_vllm_names=True).decode())
        }
        expected = {
            "vllm:num_requests_running": "gauge",
            "vllm:num_requests_waiting": "gauge",
            "vllm:kv_cache_usage_perc": "gauge",
            "vllm:cache_config_info": "gauge",
            "vllm:prefix_cache_queries": "counter",
            "vllm:prefix_cache_hits": "counter",
            "vllm:mm_cache_queries": "counter",
            "vllm:mm_cache_hits": "counter",
            "vllm:num_preemptions": "counter",
            "vllm:spec_decode_num_draft_tokens": "counter",
            "vllm:spec_decode_num_accepted_tokens": "counter",
            "vllm:prompt_tokens": "counter",
            "vllm:generation_tokens": "counter",
            "vllm:request_success": "counter",
            "vllm:time_to_first_token_seconds": "histogram",
            "vllm:inter_token_latency_seconds": "histogram",
            "vllm:e2e_request_latency_seconds": "histogram",
            "vllm:request_queue_time_seconds": "histogram",
            "vllm:request_prefill_time_seconds": "histogram",
            "vllm:request_decode_time_seconds": "histogram",
            "vllm:request_prompt_tokens": "histogram",
            "vllm:request_generation_tokens": "histogram",
            "vllm:iteration_tokens_total": "histogram",
        }
        types = {name: family.type for name, family in families.items() if name.startswith("vllm:")}
        assert types == expected
        values = {(s.name, s.labels.get("finished_reason")): s.value for f in families.values() for s in f.samples}
        assert values["vllm:prompt_tokens_total", None] == values["vllm:prefix_cache_queries_total", None] == 7.0
        assert values["vllm:request_success_total", "stop"] == 1.0
        assert values["vllm:kv_cache_usage_perc", None] == 0.25
        assert values["vllm:time_to_first_token_seconds_count", None] == 1.0
        (config,) = families["vllm:cache_config_info"].samples
        assert config.labels == {"model_name": "m", "block_size": "16", "num_gpu_blocks": "512", "num_media_slots": ""}

    def test_they_are_not_exposed_by_default(self) -> None:
        assert b"vllm:" not in Metrics("m").expose()
