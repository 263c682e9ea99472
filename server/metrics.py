"""What the server counts, in a registry of its own: vLLM's base names under `flamboyance:`, so dashboards carry over.

The API process measures what clients feel; the worker's gauges arrive with its beat and are shown as they are.
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


# what the engine says of itself in its beat, and whether it only ever grows; how many requests wait and run is counted
# here, from acceptance on, not in the engine
ENGINE_METRICS = {
    "kv_cache_usage_perc": ("Share of the text cache's blocks in use, 1 is all", False),
    "media_slots_in_use": ("Media pages that running requests read", False),
    "media_host_bytes": ("Visual tokens kept in host memory", False),
    "media_slots_pinned": ("Media pages that are kept whoever else needs room", False),
    "media_evictions": ("Media pages given to another media", True),
    "num_preemptions": ("Sequences that gave their blocks back and waited again", True),
}


class EngineCollector(Collector):
    """The worker's last beat; of what it names, what stands in the table."""

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
    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.engine = EngineCollector(model_name)
        self.registry.register(self.engine)

        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From acceptance to the first token", _SECONDS
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of a request", _TOKEN_SECONDS
        )
        self.e2e_request_latency = self._histogram(
            "e2e_request_latency_seconds", "From acceptance to the last token", _SECONDS
        )
        self.request_queue_time = self._histogram(
            "request_queue_time_seconds", "From acceptance to the first step of the prompt", _SECONDS
        )
        self.request_prompt_tokens = self._histogram("request_prompt_tokens", "Prompt tokens of a request", _COUNTS)
        self.request_generation_tokens = self._histogram(
            "request_generation_tokens", "Tokens generated for a request", _COUNTS
        )
        self.request_media = self._histogram("request_media", "Images and videos of a request", _MEDIA_COUNTS)
        self.request_shots = self._histogram("request_shots", "Shots of a few-shot request", _MEDIA_COUNTS)
        self.retrieval = self._histogram(
            "retrieval_seconds", "Finding the examples most like a query, embedding included", _SECONDS
        )
        self.media_decode = self._histogram("media_decode_seconds", "Decoding and resizing one media", _SECONDS)
        self.media_fetch = self._histogram("media_fetch_seconds", "Fetching one media from its URL", _SECONDS)

        self.prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of admitted requests")
        self.prompt_tokens_cached = self._counter(
            "prompt_tokens_cached_total", "Prompt tokens found in the prefix cache"
        )
        self.generation_tokens = self._counter("generation_tokens_total", "Tokens generated")
        self.media_encoded = self._counter("media_encoded_total", "Media that went through the vision encoder")
        self.media_cached = self._counter("media_cached_total", "Media whose pages were found in the media cache")
        self.media_decode_failures = self._counter("media_decode_failures_total", "Media that could not be decoded")
        self.media_stored = self._counter("media_stored_total", "Uploaded media that were new to the store")
        self.engine_restarts = self._counter("engine_restarts_total", "Times the worker was started again")
        self._request_success = self._reasoned("request_success", "Finished requests", "finished_reason")
        self._request_refused = self._reasoned(
            "request_refused", "Requests answered with an error, by its code", "code"
        )
        for reason in FINISHED_REASONS:
            self._request_success.labels(model_name, reason)

        self.num_requests_waiting = self._gauge("num_requests_waiting", "Accepted, their first step not begun")
        self.num_requests_running = self._gauge("num_requests_running", "Past their first step, not finished")
        self.support_set_media_bytes = self._gauge(
            "support_set_media_bytes", "Encoded media that support sets refer to"
        )
        self._support_sets = Gauge(
            PREFIX + "support_sets",
            "Support sets, by how warm their latest version is",
            ["model_name", "status"],
            registry=self.registry,
        )
        self.engine_ready = self._gauge("engine_ready", "1 while the worker serves, 0 while it loads or restarts")
        self.last_step_age = self._gauge("last_step_age_seconds", "Age of the last finished step while work is present")

    def finished(self, reason: str) -> None:
        self._request_success.labels(self._model_name, reason).inc()

    def refused(self, code: str) -> None:
        self._request_refused.labels(self._model_name, code).inc()

    def count_support_sets(self, by_status: Mapping[str, int]) -> None:
        for status, number in by_status.items():
            self._support_sets.labels(self._model_name, status).set(number)

    def expose(self) -> bytes:
        return generate_latest(self.registry)

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...]) -> Histogram:
        metric = Histogram(PREFIX + name, help_text, ["model_name"], buckets=buckets, registry=self.registry)
        return metric.labels(self._model_name)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _reasoned(self, name: str, help_text: str, label: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model_name", label], registry=self.registry)
