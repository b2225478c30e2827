"""What /metrics tells, in Prometheus' form."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import HistogramMetricFamily

from model.inference.cost import Prices
from model.inference.engine import Engine
from model.inference.scheduler import Request

SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)


class Depths:
    """A histogram of the recursions that generated tokens executed. Of a whole answer at once: one token after another
    would take longer than all else that is done for it."""

    def __init__(self, most: int):
        self.counts = np.zeros(most + 1, dtype=np.int64)

    def observe(self, depths: Sequence[int]) -> None:
        self.counts += np.bincount(depths, minlength=len(self.counts))

    def collect(self) -> Iterator[HistogramMetricFamily]:
        counts = self.counts.copy()
        below = [(f"{float(depth)}", float(count)) for depth, count in enumerate(counts.cumsum().tolist())]
        total = float((counts * np.arange(len(counts))).sum())
        text = "Recursions that generated tokens executed"
        yield HistogramMetricFamily("mor_token_depth", text, [*below, ("+Inf", float(counts.sum()))], total)


class Metrics:
    """Counters, gauges and histograms of one server."""

    def __init__(self, engine: Engine):
        self.registry = CollectorRegistry()
        make: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("mor_requests", "Requests by HTTP status", ["status"], **make)
        self.prompt_tokens = Counter("mor_prompt_tokens", "Prompt tokens taken in", **make)
        self.generated_tokens = Counter("mor_generated_tokens", "Tokens generated", **make)
        self.first_token = Histogram("mor_first_token_seconds", "Request to first token", buckets=SECONDS, **make)
        self.duration = Histogram("mor_request_seconds", "Request to last token", buckets=SECONDS, **make)
        self.depths, self.prices = Depths(engine.method.gates), Prices(engine.config)
        self.registry.register(self.depths)
        self.flops = Counter("mor_flops", "Forward FLOPs of prompts and answers, exact", **make)
        self.saved = Counter("mor_saved_flops", "FLOPs that all of the depth for every token would have added", **make)
        for name, text, function in (
            ("mor_running", "Requests that run", lambda: len(engine.scheduler.running)),
            ("mor_waiting", "Requests that wait", lambda: len(engine.scheduler.waiting)),
            ("mor_preemptions", "Requests sent back for want of pages", lambda: engine.statistics.preemptions),
            ("mor_kv_bytes", "Bytes of the pool of keys and values", engine.kv_bytes),
            ("mor_kv_free_share", "Free share of its pages", lambda: self._free_share(engine)),
        ):
            Gauge(name, text, **make).set_function(function)

    @staticmethod
    def _free_share(engine: Engine) -> float:
        pools = (engine.everyone, engine.recursed)
        return sum(pool.free_pages() for pool in pools) / max(1, sum(pool.pages for pool in pools))

    def answered(self, requests: Sequence[Request], usage: dict[str, int]) -> None:
        """Count what was done for the texts of one HTTP request."""
        self.prompt_tokens.inc(usage["prompt_tokens"])
        self.generated_tokens.inc(usage["completion_tokens"])
        for request in requests:
            took, whole = self.prices.of_request(request)
            self.flops.inc(took)
            self.saved.inc(max(0, whole - took))
            self.depths.observe(request.depths[len(request.prompt) :])
