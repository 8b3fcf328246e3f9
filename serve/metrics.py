"""Metrics in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric

from .engine import Engine

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
"""Upper bounds of the histograms' buckets."""


class Metrics:
    """Counts of a server, and those of its engine, which are read when they are asked for.

    Args:
        engine: the engine.
    """

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "vlmamba_requests", "Responses by path and status.", ["path", "status"], registry=self.registry
        )
        self.first_token = Histogram(
            "vlmamba_time_to_first_token_seconds",
            "Time from a request to its first token.",
            buckets=SECONDS,
            registry=self.registry,
        )
        self.duration = Histogram(
            "vlmamba_request_seconds", "Time from a request to its last token.", buckets=SECONDS, registry=self.registry
        )
        self.registry.register(_EngineCollector(engine))

    def text(self) -> bytes:
        """Return all metrics."""
        return generate_latest(self.registry)


class _EngineCollector:
    def __init__(self, engine: Engine):
        self.engine = engine

    def collect(self) -> Iterator[Metric]:
        """Yield the engine's metrics."""
        engine, stats, cache = self.engine, self.engine.stats, self.engine.cache
        gauges = {
            "vlmamba_running": ("Requests that have a slot.", engine.n_active),
            "vlmamba_waiting": ("Requests that wait for a slot.", len(engine.waiting)),
            "vlmamba_slots": ("Most requests that run at once.", engine.config.slots),
            "vlmamba_cache_bytes": ("Memory of the state cache in use.", cache.n_bytes),
            "vlmamba_cache_states": ("States in the cache.", len(cache)),
            "vlmamba_feature_cache_bytes": ("Memory of the image features in use.", engine.features.n_bytes),
        }
        counters = {
            "vlmamba_prompt_tokens": ("Prompt tokens that were run.", stats.prompt_tokens),
            "vlmamba_cached_prompt_tokens": ("Prompt tokens whose state was in the cache.", cache.tokens),
            "vlmamba_new_tokens": ("Generated tokens.", stats.new_tokens),
            "vlmamba_prefill_passes": ("Forward passes of prompts.", stats.prefill_passes),
            "vlmamba_decode_steps": ("Decoding steps.", stats.decode_steps),
            "vlmamba_finished": ("Answers that came to their end.", stats.finished),
            "vlmamba_cancelled": ("Requests whose client left.", stats.cancelled),
            "vlmamba_failed": ("Requests that an error ended.", stats.failed),
            "vlmamba_cache_hits": ("Requests that went on from a state of the cache.", cache.hits),
            "vlmamba_cache_misses": ("Requests that did not.", cache.misses),
            "vlmamba_cache_evictions": ("States that left the cache.", cache.evictions),
            "vlmamba_feature_cache_hits": ("Images whose features were in the cache.", engine.features.hits),
            "vlmamba_feature_cache_misses": ("Images that were encoded.", engine.features.misses),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(name, text, value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(name, text, value)
