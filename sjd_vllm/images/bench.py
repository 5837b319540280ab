"""Plain vLLM against speculative Jacobi decoding: one engine, the same prompts and seeds, taken in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sjd_vllm.images.picture import GenerationResult, Picture
from sjd_vllm.images.pipeline import ImagePipeline
from sjd_vllm.images.request import ImageRequest
from sjd_vllm.images.rows import rounded

_METHODS = ("none", "sjd")  # plain vLLM first, as the tables have it
# Pictures of one method before the other has its turn, in multiples of the concurrency: long enough that the batch
# is full most of the time, short enough that both methods see the same machine.
_TURN = 2


@dataclass
class Measurement:
    """One method at one concurrency.

    Attributes:
        method: "none", which is plain vLLM, or "sjd".
        concurrency: pictures in the engine at once.
        pictures: everything that was decoded, in the order of the prompts.
        seconds: wall time of all turns together.
    """

    method: str
    concurrency: int
    pictures: list[Picture] = field(default_factory=list)
    seconds: float = 0.0

    def add(self, result: GenerationResult) -> None:
        """Take in the result of one turn."""
        self.pictures.extend(result.pictures)
        self.seconds += result.seconds

    @property
    def latency_p50(self) -> float:
        """Median seconds of a picture, from entering the engine to its last token."""
        return statistics.median(picture.seconds for picture in self.pictures)

    @property
    def pictures_per_minute(self) -> float:
        """Throughput over all turns."""
        return 60 * len(self.pictures) / self.seconds

    @property
    def tokens_per_forward(self) -> float:
        """Tokens a picture gets per forward; 1 for plain decoding."""
        return sum(p.request.num_new_tokens for p in self.pictures) / sum(p.num_steps for p in self.pictures)

    def row(self) -> dict[str, Any]:
        """The figures as plain types; latencies in seconds."""
        forwards = [picture.num_steps for picture in self.pictures]
        mean, standard_error = mean_and_error(forwards)
        latencies = [picture.seconds for picture in self.pictures]
        return {
            "method": self.method,
            "concurrency": self.concurrency,
            "num_pictures": len(self.pictures),
            "forwards_mean": rounded(mean),
            "forwards_se": rounded(standard_error, 2),
            "tokens_per_forward": rounded(self.tokens_per_forward),
            **{f"latency_{name}": rounded(value) for name, value in percentiles(latencies).items()},
            "pictures_per_minute": rounded(self.pictures_per_minute),
        }


@dataclass
class BenchReport:
    """All measurements of one run and the ratios between the methods."""

    measurements: list[Measurement]

    def step_compression(self) -> float:
        """Tokens per forward of SJD at the first concurrency."""
        return self._at(self.concurrencies()[0], "sjd").tokens_per_forward

    def latency_ratio(self) -> float:
        """Median latency at concurrency 1, plain over SJD."""
        return self._at(1, "none").latency_p50 / self._at(1, "sjd").latency_p50

    def throughput_ratio(self) -> dict[int, float]:
        """Pictures per minute, SJD over plain, by concurrency."""
        return {
            concurrency: self._at(concurrency, "sjd").pictures_per_minute
            / self._at(concurrency, "none").pictures_per_minute
            for concurrency in self.concurrencies()
        }

    def concurrencies(self) -> list[int]:
        """Ascending."""
        return sorted({measurement.concurrency for measurement in self.measurements})

    def _at(self, concurrency: int, method: str) -> Measurement:
        return next(m for m in self.measurements if (m.concurrency, m.method) == (concurrency, method))


def run_bench(
    pipeline: ImagePipeline,
    requests: Sequence[ImageRequest],
    concurrencies: Sequence[int],
    on_turn: Callable[[int, int], None] | None = None,
) -> BenchReport:
    """Decode every request with both methods at each concurrency.

    Args:
        pipeline: its batch must hold the largest concurrency.
        requests: of one picture each; their method is replaced.
        concurrencies: pictures in the engine at once.
        on_turn: called after each turn with pictures decoded so far and in all.
    """
    planned = {method: pipeline.plan([replace(request, method=method) for request in requests]) for method in _METHODS}
    for method in _METHODS:  # the first forwards of a process are slow
        pipeline.decode(planned[method][:1])
    num_done, num_all = 0, len(_METHODS) * len(requests) * len(concurrencies)
    measurements: list[Measurement] = []
    for concurrency in concurrencies:
        by_method = {method: Measurement(method, concurrency) for method in _METHODS}
        for turn, start in enumerate(range(0, len(requests), _TURN * concurrency)):
            # Each method goes first as often as the other.
            for method in reversed(_METHODS) if turn % 2 else _METHODS:
                batch = planned[method][start : start + _TURN * concurrency]
                by_method[method].add(pipeline.decode(batch, batch_size=concurrency))
                num_done += len(batch)
                if on_turn is not None:
                    on_turn(num_done, num_all)
        measurements.extend(by_method.values())
    return BenchReport(measurements)


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """p20, p50 and p80, interpolated.

    >>> percentiles([0, 1, 2, 3, 4, 5])
    {'p20': 1.0, 'p50': 2.5, 'p80': 4.0}
    """
    if len(values) == 1:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    cuts = statistics.quantiles(values, n=10, method="inclusive")
    return {"p20": cuts[1], "p50": cuts[4], "p80": cuts[7]}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error (nan for a single value)."""
    if len(values) == 1:
        return values[0], float("nan")
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5
