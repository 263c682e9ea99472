"""Prometheus metrics, in a separate registry; names are vLLM's with the prefix `flamboyance:`, as its dashboards expect.

The API process measures requests from the view of clients; the worker's counters arrive with its heartbeats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import accumulate
from typing import Any, get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from server.schemas.fewshot import Method
from server.telemetry.measures import ENGINE_HISTOGRAMS, ENGINE_METRICS, Measures

PREFIX = "flamboyance:"
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 20.0, 40.0, 80.0, 160.0, 320.0)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1.0, 2.5, 10.0)
_COUNTS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000)
_MEDIA_COUNTS = (0, 1, 2, 4, 8, 16, 32, 64, 128)

# metrics that are also exposed under vLLM's names, if the setting `vllm_metrics` is on, and those names
VLLM_PREFIX = "vllm:"
SAME_IN_VLLM = (
    "num_requests_running",
    "num_requests_waiting",
    "kv_cache_usage_perc",
    "cache_config_info",
    "prompt_tokens",
    "generation_tokens",
    "request_success",
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "num_preemptions",
    "spec_decode_num_draft_tokens",
    "spec_decode_num_accepted_tokens",
)
VLLM_NAMES = (
    *((name, name) for name in SAME_IN_VLLM),
    ("iteration_tokens", "iteration_tokens_total"),
    ("prompt_tokens", "prefix_cache_queries"),
    ("prompt_tokens_cached", "prefix_cache_hits"),
    ("media_queries", "mm_cache_queries"),
    ("media_cached", "mm_cache_hits"),
)
# the labels of `cache_config_info`, with vLLM's names where it has them, and the engine's names of the sizes
CACHE_CONFIG = {"block_size": "block_size", "num_gpu_blocks": "num_blocks", "num_media_slots": "num_media_slots"}

FINISHED_REASONS = ("stop", "length", "abort", "error")

# of this process: each counter and histogram would have a second metric, the time of its creation
disable_created_metrics()


class EngineCollector(Collector):
    """Exposes the counters of the worker's last heartbeat, which `server/telemetry/measures.py` lists.

    Waiting and running requests are not among them: the API process counts these from acceptance on.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self.info: Mapping[str, Any] = {}  # what the worker reported when it was ready
        self.values: dict[str, float] = {}
        self.histograms = Measures().snapshot()

    def collect(self) -> Iterator[Metric]:
        yield from self._values()
        config = {label: str(self.info.get(name, "")) for label, name in CACHE_CONFIG.items()}
        info = GaugeMetricFamily(
            PREFIX + "cache_config_info", "1; the labels are sizes", labels=["model_name", *config]
        )
        info.add_metric([self._model_name, *config.values()], 1.0)
        yield info
        for name, histogram in ENGINE_HISTOGRAMS.items():
            metric = HistogramMetricFamily(
                PREFIX + name, histogram.help, labels=["model_name", *filter(None, [histogram.label])]
            )
            for value, (*counts, total) in self.histograms[name].items():
                bounds = [*map(str, map(float, histogram.bounds)), "+Inf"]
                buckets = list(zip(bounds, accumulate(counts), strict=True))
                metric.add_metric([self._model_name, *filter(None, [value])], buckets, total)
            yield metric

    def _values(self) -> Iterator[Metric]:
        for name, (help_text, is_counter) in ENGINE_METRICS.items():
            family = CounterMetricFamily if is_counter else GaugeMetricFamily
            metric = family(PREFIX + name, help_text, labels=["model_name"])
            metric.add_metric([self._model_name], self.values.get(name, 0.0))
            yield metric


class VllmCollector(Collector):
    """Exposes metrics of a registry under vLLM's names, for its dashboards, and for routers and load tools."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        metrics = {metric.name.removeprefix(PREFIX): metric for metric in self._registry.collect()}
        for name, vllm_name in VLLM_NAMES:
            metric = metrics[name]
            copy = Metric(VLLM_PREFIX + vllm_name, metric.documentation, metric.type)
            copy.samples = [
                sample._replace(name=VLLM_PREFIX + vllm_name + sample.name.removeprefix(metric.name))
                for sample in metric.samples
            ]
            yield copy


class Metrics:
    """All metrics of the server, with the label `model_name`."""

    def __init__(self, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self._model_name = model_name
        self.engine = EngineCollector(model_name)
        self.registry.register(self.engine)
        self._vllm = CollectorRegistry()
        self._vllm.register(VllmCollector(self.registry))
        self._add_histograms()
        self._add_counters()
        self._add_gauges()

    def _add_histograms(self) -> None:
        histogram = self._histogram
        self.time_to_first_token = histogram("time_to_first_token_seconds", "Time from acceptance to the first token")
        self.inter_token_latency = histogram(
            "inter_token_latency_seconds", "Time between two tokens of a request", _TOKEN_SECONDS
        )
        self.e2e_request_latency = histogram("e2e_request_latency_seconds", "Time from acceptance to the last token")
        self.request_queue_time = histogram(
            "request_queue_time_seconds", "Time from acceptance to the first step of the prompt"
        )
        self.request_prefill_time = histogram(
            "request_prefill_time_seconds", "Time from the first step of the prompt to the first token"
        )
        self.request_decode_time = histogram("request_decode_time_seconds", "Time from the first token to the last one")
        self.request_prompt_tokens = histogram("request_prompt_tokens", "Prompt tokens per request", _COUNTS)
        self.request_generation_tokens = histogram("request_generation_tokens", "Generated tokens per request", _COUNTS)
        self.request_media = histogram("request_media", "Images and videos per request", _MEDIA_COUNTS)
        self.request_shots = histogram("request_shots", "Shots per few-shot request", _MEDIA_COUNTS)
        self.retrieval = histogram(
            "retrieval_seconds", "Time to find the examples most similar to a query, after the query is embedded"
        )
        self.media_decode = histogram("media_decode_seconds", "Time to decode and resize one media item")
        self.media_fetch = histogram("media_fetch_seconds", "Time to fetch one media item from its URL")

    def _add_counters(self) -> None:
        counter = self._counter
        self.prompt_tokens = counter("prompt_tokens_total", "Prompt tokens of admitted requests")
        self.prompt_tokens_cached = counter("prompt_tokens_cached_total", "Prompt tokens that were in the prefix cache")
        self.generation_tokens = counter("generation_tokens_total", "Generated tokens")
        self.media_encoded = counter("media_encoded_total", "Media encoded by the vision encoder")
        self.media_queries = counter(
            "media_queries_total",
            "Media of prompts and of vectors that the engine computed, each once per prompt or request",
        )
        self.media_cached = counter("media_cached_total", "Media that needed no encoding, with those in host memory")
        self.media_decode_failures = counter("media_decode_failures_total", "Media that could not be decoded")
        self.media_stored = counter("media_stored_total", "Uploaded media that were not yet in the store")
        self.engine_restarts = counter("engine_restarts_total", "Restarts of the worker")
        self._request_success = self._labelled_counter("request_success", "Finished requests", "finished_reason")
        self._request_refused = self._labelled_counter(
            "request_refused", "Requests that failed, by error code and tenant", "code", "tenant"
        )
        self._classifications = self._labelled_counter(
            "classifications", "Classifications and questions of decisions, by the method that answered", "method"
        )
        self._selections = self._labelled_counter(
            "selections", "Requests with shots from a support set, by the strategy that selected them", "strategy"
        )
        self._evaluations = self._labelled_counter("evaluations", "Evaluations that ended, by how", "status")
        # exposed as 0 before the first event, so that its rate is known
        for method in get_args(Method):
            self._classifications.labels(self._model_name, method)
        for status in ("completed", "failed"):
            self._evaluations.labels(self._model_name, status)
        for reason in FINISHED_REASONS:
            self._request_success.labels(self._model_name, reason)

    def _add_gauges(self) -> None:
        gauge = self._gauge
        self.num_requests_waiting = gauge("num_requests_waiting", "Accepted requests before their first step")
        self.num_requests_running = gauge(
            "num_requests_running", "Requests after their first step and without a whole response"
        )
        self.support_set_media_bytes = gauge(
            "support_set_media_bytes", "Bytes of the encoded media that support sets refer to"
        )
        self._support_sets = self._gauge_by_status(
            "support_sets", "Support sets, by the warm status of their latest version"
        )
        self._unfinished_evaluations = self._gauge_by_status(
            "evaluations_unfinished", "Evaluations that are queued or run, on all servers that share the database"
        )
        self.engine_ready = gauge("engine_ready", "1 while the worker serves, 0 while it loads or restarts")
        self.last_step_age = gauge("last_step_age_seconds", "Time since the last finished step, while there is work")

    def count_media(self, num_encoded: int, num_cached: int) -> None:
        """Count the media of a prompt, or of a request for vectors, that the engine has computed."""
        self.media_encoded.inc(num_encoded)
        self.media_cached.inc(num_cached)
        self.media_queries.inc(num_encoded + num_cached)

    def count_finished(self, reason: str) -> None:
        self._request_success.labels(self._model_name, reason).inc()

    def count_refused(self, code: str, tenant: str) -> None:
        self._request_refused.labels(self._model_name, code, tenant).inc()

    def count_classification(self, method: str) -> None:
        self._classifications.labels(self._model_name, method).inc()

    def count_selection(self, strategy: str) -> None:
        self._selections.labels(self._model_name, strategy).inc()

    def count_evaluation(self, status: str) -> None:
        self._evaluations.labels(self._model_name, status).inc()

    def count_unfinished_evaluations(self, by_status: Mapping[str, int]) -> None:
        for status, number in by_status.items():
            self._unfinished_evaluations.labels(self._model_name, status).set(number)

    def count_support_sets(self, by_status: Mapping[str, int]) -> None:
        for status, number in by_status.items():
            self._support_sets.labels(self._model_name, status).set(number)

    def expose(self, *, with_vllm_names: bool = False) -> bytes:
        text = generate_latest(self.registry)
        return text + generate_latest(self._vllm) if with_vllm_names else text

    def _histogram(self, name: str, help_text: str, buckets: tuple[float, ...] = _SECONDS) -> Histogram:
        metric = Histogram(PREFIX + name, help_text, ["model_name"], buckets=buckets, registry=self.registry)
        return metric.labels(self._model_name)

    def _counter(self, name: str, help_text: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _gauge(self, name: str, help_text: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, ["model_name"], registry=self.registry).labels(self._model_name)

    def _gauge_by_status(self, name: str, help_text: str) -> Gauge:
        return Gauge(PREFIX + name, help_text, ["model_name", "status"], registry=self.registry)

    def _labelled_counter(self, name: str, help_text: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, help_text, ["model_name", *labels], registry=self.registry)
