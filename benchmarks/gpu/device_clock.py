"""Milliseconds of the device by part of a step, from CUDA events on its stream; on a CPU, of the wall clock."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.anatomy import PARTS, Stopwatch


class _HostEvent:
    """An event where the host is the device."""

    def record(self) -> None:
        self._at = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return 1000 * (end._at - self._at)


class DeviceStopwatch(Stopwatch):
    """The same parts on two clocks: `seconds` as they pass on the host, and `device_seconds` on the device.

    An event is recorded before and after each part; what other parts take within it is taken out. On the host a part
    is over when its kernels are launched, unless it waits for them; on the device it lasts from the moment at which the
    stream gets to the first event to that at which it gets to the second, idle time between kernels included.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._is_cuda = device.type == "cuda"
        # part, its events, and those of the parts inside it
        self._spans: list[tuple[str, Any, Any, list[tuple[Any, Any]]]] = []
        self._open: list[list[tuple[Any, Any]]] = []
        self.step_starts: list[float] = []  # by the host's clock, of every forward's `inputs`

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        on_host = super().timed(part, function)

        @functools.wraps(function)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if part == "inputs":
                self.step_starts.append(time.perf_counter())
            start, end = self._event(), self._event()
            inner: list[tuple[Any, Any]] = []
            self._open.append(inner)
            start.record()
            try:
                return on_host(*args, **kwargs)
            finally:
                end.record()
                self._open.pop()
                if self._open:
                    self._open[-1].append((start, end))
                self._spans.append((part, start, end, inner))

        return wrapper

    def _event(self) -> Any:
        return torch.cuda.Event(enable_timing=True) if self._is_cuda else _HostEvent()

    def device_seconds(self) -> dict[str, float]:
        """By part, over all calls; waits for the device."""
        if self._is_cuda:
            torch.cuda.synchronize()
        seconds = dict.fromkeys(PARTS, 0.0)
        for part, start, end, inner in self._spans:
            own = start.elapsed_time(end) - sum(a.elapsed_time(b) for a, b in inner)
            seconds[part] += own / 1000
        return seconds
