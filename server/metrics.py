"""Prometheus metrics, in a registry of their own; names are vLLM's under `flamboyance:`, so that dashboards carry over.

The API process measures requests as clients see them; the worker's gauges arrive with its heartbeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

PREFIX = "flamboyance:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_MEDIA_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

FINISHED_REASONS = ("stop", "length", "abort", "error")

# gauges in the engine's heartbeat: the help text, and whether it is a counter. Waiting and running requests are counted
# by the API process, from acceptance on
ENGINE_METRICS = {
    "kv_cache_usage_perc": ("Used fraction of the blocks of the text cache, from 0 to 1", False),
    "media_slots_in_use": ("Media pages that running requests use or that are pinned", False),
    "media_host_bytes": ("Bytes of visual tokens in host memory", False),
    "media_slots_pinned": ("Media pages that are never evicted", False),
    "media_evictions": ("Media pages reused for another media item", True),
    "num_preemptions": ("Sequences that released their blocks and were queued again", True),
}


class EngineCollector(Collector):
    """Exposes those values of the worker's last heartbeat that `ENGINE_METRICS` lists."""

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.values: dict[str, float] = {}

    def collect(self) -> Iterator[Metric]:
        for name, (help_text, is_counter) in ENGINE_METRICS.items():
            family = CounterMetricFamily if is_counter else GaugeMetricFamily
            metric = family(PREFIX + name, help_text, labels=["model_name"])
            metric.add_metric([self._model_name], self.values.get(name, 0.0))
            yield metric


class Metrics:
    """All metrics of the server, with the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.engine = EngineCollector(model_name)
        self.registry.register(self.engine)

        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "Time from acceptance to the first token"
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Time between two tokens of a request", _TOKEN_SECONDS
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "Time from acceptance to the last token"
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "Time from acceptance to the first step of the prompt"
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens per request", _COUNTS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Generated tokens per request", _COUNTS
        )
        self.request_media = self._histogram("request_media", "Images and videos per request", _MEDIA_COUNTS)
        self.request_shots = self._histogram("request_shots", "Shots per few-shot request", _MEDIA_COUNTS)
        self.retrieval = self._histogram(
            "retrieval_seconds", "Time to find the examples most similar to a query, including its embedding"
        )
        self.media_decode = self._histogram("media_decode_seconds", "Time to decode and resize one media item")
        self.media_fetch = self._histogram("media_fetch_seconds", "Time to fetch one media item from its URL")

        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of admitted requests")
        self.prompt_tokens_cached = self._counter(
            "prompt_tokens_cached_total", "Prompt tokens that were in the prefix cache"
        )
        self.generation_tokens = self._counter("generation_tokens_total", "Generated tokens")
        self.media_encoded = self._counter("media_encoded_total", "Media encoded by the vision encoder")
        self.media_cached = self._counter("media_cached_total", "Media whose pages were in the media cache")
        self.media_decode_failures = self._counter("media_decode_failures_total", "Media that could not be decoded")
        self.media_stored = self._counter("media_stored_total", "Uploaded media that were not yet in the store")
        self.engine_restarts = self._counter("engine_restarts_total", "Restarts of the worker")
        self._request_success = self._labelled_counter("request_success", "Finished requests", "finished_reason")
        self._request_refused = self._labelled_counter("request_refused", "Requests that failed, by error code", "code")
        for reason in FINISHED_REASONS:
            self._request_success.labels(model_name, reason)

        self.num_requests_waiting = self._gauge("num_requests_waiting", "Accepted requests before their first step")
        self.num_requests_running = self._gauge(
            "num_requests_running", "Requests after their first step and not finished"
        )
        self.support_set_media_bytes = self._gauge(
            "support_set_media_bytes", "Bytes of the encoded media that support sets refer to"
        )
        self._support_sets = Gauge(
            PREFIX + "support_sets",
            "Support sets, by the warm status of their latest version",
            ["model_name", "status"],
            registry=self.registry,
        )
        self.engine_ready = self._gauge("engine_ready", "1 while the worker serves, 0 while it loads or restarts")
        self.last_step_age = self._gauge(
            "last_step_age_seconds", "Time since the last finished step, while there is work"
        )

    def count_finished(self, reason: str) -> None:
        self._request_success.labels(self._model_name, reason).inc()

    def count_refused(self, code: str) -> None:
        self._request_refused.labels(self._model_name, code).inc()

    def count_support_sets(self, by_status: Mapping[str, int]) -> None:
        for status, number in by_status.items():
            self._support_sets.labels(self._model_name, status).set(number)

    def expose(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        metric = Histogram(PREFIX + name, help_text, ["model_name"], buckets=buckets, registry=self.registry)
        return metric.labels(self._model_name)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _labelled_counter(self, name: str, help_text: str, label: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model_name", label], registry=self.registry)
