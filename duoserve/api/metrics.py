"""What the server counts, for Prometheus. Knows names and figures; labels have few values, whatever callers send.

Figures of the engine are read when they are asked for; a registry of its own, so that two servers in one process differ.
"""

from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from duoserve.api.host import Host

if TYPE_CHECKING:
    from duoserve.service import End

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
REASONS = (
    "client",
    "queue",
    "shutting_down",
    "loading",
    "too_long",
    "invalid",
    "unauthorized",
    "forbidden",
    "too_large",
)
FINISHES = ("stop", "length", "cancelled", "error")


class Metrics:
    """One server's registry."""

    def __init__(self, host: Host):
        self.registry = CollectorRegistry()
        self.requests = self._counter("requests", "HTTP requests answered", "route", "status")
        self.rejected = self._counter("rejected", "Requests turned away before they ran", "reason")
        self.finished = self._counter("generations", "Generations by how they ended", "finish")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts that were read")
        self.new_tokens = self._counter("generated_tokens", "Tokens that were made")
        self.first = self._histogram("time_to_first_token_seconds", "From the request to its first token")
        self.between = self._histogram("inter_token_seconds", "Between two pieces of an answer")
        self.queued = self._histogram("queue_wait_seconds", "From the request to its place among the active")
        for reason in REASONS:
            self.rejected.labels(reason)
        for finish in FINISHES:
            self.finished.labels(finish)
        self.registry.register(_Engine(host))

    def ended(self, end: End) -> None:
        self.finished.labels(end.finish).inc()
        self.queued.observe(end.queue_s)
        if end.first_s is not None:
            self.first.observe(end.first_s)
            self.prompt_tokens.inc(end.prompt_tokens)
            self.new_tokens.inc(end.new_tokens)

    def reject(self, code: str | None) -> None:
        known = {"context_length_exceeded": "too_long", "too_many_requests": "client", "overloaded": "queue"}
        reason = known.get(code or "", code or "")
        self.rejected.labels(reason if reason in REASONS else "invalid").inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)

    def _counter(self, name: str, what: str, *labels: str) -> Counter:
        return Counter(f"duoserve_{name}", what, labels, registry=self.registry)

    def _histogram(self, name: str, what: str) -> Histogram:
        return Histogram(f"duoserve_{name}", what, registry=self.registry, buckets=SECONDS)


class _Engine(Collector):
    """Reads the service and the engine when it is scraped."""

    def __init__(self, host: Host):
        self._host = host

    def describe(self) -> list[Metric]:
        return []

    def collect(self) -> Iterator[Metric]:
        yield _gauge(
            "ready", "1 once the model answers", int(self._host.loaded is not None and not self._host.draining)
        )
        yield _gauge("resident_memory_bytes", "Memory of the process", _resident())
        model = self._host.loaded
        if model is None:
            return
        yield _gauge("running", "Generations that are active", model.service.active)
        yield _gauge("queued", "Requests that wait", model.service.queued)
        yield from _figures(model.engine.stats())


def _figures(stats: dict[str, Any]) -> Iterator[Metric]:
    tier = CounterMetricFamily("duoserve_experts", "Experts that were needed, by where they were", labels=["found"])
    for found in ("hits", "in_flight", "misses"):
        tier.add_metric([found], stats[found])
    yield tier
    guesses = CounterMetricFamily("duoserve_guesses", "Guessed experts, by what became of them", labels=["became"])
    for became in ("ready", "late", "wrong"):
        guesses.add_metric([became], stats[f"guesses_{became}"])
    yield guesses
    yield CounterMetricFamily(
        "duoserve_expert_bytes", "Bytes of experts brought into slots", value=stats["bytes_moved"]
    )
    yield CounterMetricFamily("duoserve_link_busy_seconds", "Time the link was busy", value=stats["link_busy_s"])
    yield CounterMetricFamily("duoserve_evictions", "Experts that gave up their slot", value=stats["evictions"])
    yield CounterMetricFamily("duoserve_passes", "Passes of the model", value=stats["steps"])
    if "stall_s" in stats:
        stalls = CounterMetricFamily("duoserve_stall_seconds", "Time the model waited, by cause", labels=["cause"])
        for cause, seconds in stats["stall_s"].items():
            stalls.add_metric([cause], seconds)
        yield stalls
    memory = GaugeMetricFamily(
        "duoserve_memory_bytes", "Memory by part, as planned and as used", labels=["part", "kind"]
    )
    for kind in ("planned", "used"):
        for part, n_bytes in stats[kind].items():
            memory.add_metric([part.removesuffix("_bytes"), kind], n_bytes)
    yield memory
    prediction = stats["prediction"]
    using = prediction is not None and prediction["error"] is None and prediction["decision"] == "guessing"
    yield _gauge("predictor_in_use", "1 while experts are guessed ahead", int(using))


def _gauge(name: str, what: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"duoserve_{name}", what, value=value)


def _resident() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    except OSError:  # no /proc: the peak is the nearest that is known
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Counted:
    """Pure ASGI: counts answers by route and status; what is no route of ours counts as "other"."""

    def __init__(self, app: ASGIApp, metrics: Metrics, routes: frozenset[str]):
        self._app, self._metrics, self._routes = app, metrics, routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        status = 499  # nobody was there to be answered

        async def noting(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noting)
        finally:
            route = scope["path"] if scope["path"] in self._routes else "other"
            self._metrics.requests.labels(route, str(status)).inc()
