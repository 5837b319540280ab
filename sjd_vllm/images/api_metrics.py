"""Prometheus metrics of the images server, beside vLLM's own on /metrics, and log lines of its requests."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from prometheus_client import REGISTRY, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from sjd_vllm.counters import ENGINE_COUNTERS, EngineCounters
from sjd_vllm.images.api_protocol import ApiError, as_api_error

CLIENT_GONE = 499  # nobody reads it; access logs of web servers know this status
_PREFIX = "sjd_vllm:"
_LOGGER = logging.getLogger("vllm.sjd_vllm")  # below vLLM's own logger, whose handler and level it shares
_REASONS = {400: "invalid_request", 413: "body_too_large", 415: "content_type", 500: "server_error"}
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)

REQUESTS = Counter(
    _PREFIX + "images_requests", "Answered images requests by HTTP status; 499: the client left.", ["status"]
)
REFUSALS = Counter(_PREFIX + "images_refusals", "Images requests that were refused or failed, by reason.", ["reason"])
PENDING = Gauge(_PREFIX + "images_pending_pictures", "Pictures accepted and not answered.")
PICTURE_STEPS = Histogram(
    _PREFIX + "picture_steps", "Forwards of a finished picture.", buckets=[2**power for power in range(3, 15)]
)
TOKENS_PER_STEP = Histogram(
    _PREFIX + "picture_tokens_per_step",
    "Tokens per forward of a finished picture.",
    buckets=(1, 1.5, 2, 2.5, 3, 3.5, 4, 5, 6, 8, 12, 16, 32),
)
DECODE_SECONDS = Histogram(
    _PREFIX + "picture_decode_seconds", "From entering the engine to the last token.", buckets=_SECONDS
)
PIXEL_SECONDS = Histogram(
    _PREFIX + "picture_pixel_seconds",
    "Decoding pixels and writing the file, of a partial picture too.",
    buckets=_SECONDS,
)
PARTIALS = Counter(_PREFIX + "partial_images", "Partial pictures that were sent.")


class EngineCollector(Collector):
    """The engine's counters, read when somebody asks for /metrics; nothing until the engine has made them."""

    def __init__(self, instance_id: str) -> None:
        self._instance_id = instance_id
        self._counters: EngineCounters | None = None

    def collect(self) -> Iterator[Metric]:
        """One metric a counter."""
        if self._counters is None:
            try:
                self._counters = EngineCounters(self._instance_id)
            except OSError:
                return
        for name, value in self._counters.read().items():
            if name.endswith("_total"):
                yield CounterMetricFamily(_PREFIX + name.removesuffix("_total"), ENGINE_COUNTERS[name], value=value)
            else:
                yield GaugeMetricFamily(_PREFIX + name, ENGINE_COUNTERS[name], value=value)


_shown: list[EngineCollector] = []


def show_engine_counters(instance_id: str) -> None:
    """Put the engine's counters on /metrics, in place of those of an earlier engine of this process."""
    while _shown:
        REGISTRY.unregister(_shown.pop())
    _shown.append(EngineCollector(instance_id))
    REGISTRY.register(_shown[0])


class RequestRecord:
    """One images request in log and metrics, from its arrival to its one end.

    Args:
        request_id: what the client gets as x-request-id.
    """

    def __init__(self, request_id: str) -> None:
        self._request_id = request_id
        self._started = time.perf_counter()
        self._has_ended = False

    def begin(self, num_pictures: int, size: str, *, is_stream: bool) -> None:
        """The request is well formed; its prompt is not logged."""
        kind = "stream" if is_stream else "answer"
        _LOGGER.info("%s: %d picture(s) of %s as %s", self._request_id, num_pictures, size, kind)

    def fail(self, error: BaseException) -> ApiError:
        """The request ends with an error: what its client is told, and what nobody foresaw goes into the log whole."""
        refusal = as_api_error(error)
        reason = refusal.code or _REASONS.get(refusal.status, "failed")
        self.end(refusal.status, reason=reason, error=None if refusal is error or refusal.status < 500 else error)
        return refusal

    def end(self, status: int, *, reason: str | None = None, error: BaseException | None = None) -> None:
        """The last word on the request; later calls are ignored.

        reason: why it was refused or failed.
        error: an exception whose traceback belongs into the log.
        """
        if self._has_ended:
            return
        self._has_ended = True
        REQUESTS.labels(status=str(status)).inc()
        if reason is not None:
            REFUSALS.labels(reason=reason).inc()
        seconds = time.perf_counter() - self._started
        _LOGGER.log(
            logging.ERROR if error is not None else logging.INFO,
            "%s: status %d%s after %.3f s",
            self._request_id,
            status,
            "" if reason is None else f" ({reason})",
            seconds,
            exc_info=error,
        )
