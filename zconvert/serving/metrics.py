"""What the server tells Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from zconvert.serving.worker import State

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000)


class Metrics:
    """Counts what happens to requests, and tells the engine's own counts along."""

    def __init__(self, state: Callable[[], State]) -> None:
        """Counts from zero.

        Args:
            state: gives the worker's.
        """
        registry = self._registry = CollectorRegistry()
        self.requests = Counter(
            "zconvert_requests",
            "Requests answered, by status (499: the client left)",
            ["path", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "zconvert_request_seconds", "From a request to the end of its answer", buckets=_SECONDS, registry=registry
        )
        self.first_text_seconds = Histogram(
            "zconvert_first_text_seconds", "From a request to its first text", buckets=_SECONDS, registry=registry
        )
        self.prompt_tokens = Counter("zconvert_prompt_tokens", "Tokens of prompts", registry=registry)
        registry.register(_Engine(state))

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    def __init__(self, state: Callable[[], State]) -> None:
        self._state = state

    def collect(self) -> Iterator[Metric]:
        state = self._state()
        counters = state.counters
        yield GaugeMetricFamily("zconvert_texts_running", "Texts in the batch", value=state.running)
        yield GaugeMetricFamily("zconvert_texts_waiting", "Texts that wait for a place in it", value=state.waiting)
        yield CounterMetricFamily("zconvert_texts", "Texts ended, cancelled ones too", value=counters.requests)
        yield CounterMetricFamily("zconvert_tokens", "New tokens", value=counters.tokens)
        yield CounterMetricFamily("zconvert_forwards", "Forwards that decoded", value=counters.forwards)
        yield CounterMetricFamily("zconvert_prefills", "Forwards that read prompts", value=counters.prefills)
        accepted = CounterMetricFamily(
            "zconvert_accepted", "How often a forward gave a text so many tokens", labels=["tokens"]
        )
        for count, times in sorted(counters.accepted.items()):
            accepted.add_metric([str(count)], times)
        yield accepted
