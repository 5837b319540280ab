"""How many threads a forward on a CPU takes: more for large steps, as long as the cores are idle.

All threads of an operator wait for the slowest, so on shared cores one busy neighbour slows every operator down, and
fewer threads are faster; a small step has too little to share out. Which is the case is not known beforehand and may
change at any time, so both are measured while the engine works, by size of step. A trial of many threads on busy cores
can take a hundred times as long as the step, so there is none unless the cores for it are free.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil

_SMALLEST = 16  # tokens of a step below which the fewest threads are always taken
_NUM_FIRST = 3  # measurements of each number of threads before one is preferred
_MEMORY = 0.9  # weight of earlier measurements after each one
_FREE_SHARE = 0.7  # of the cores that more threads would take, that must be free for a trial
_FREE_SECONDS = 0.25  # over which free cores are counted, at least
_FIRST_PROBE, _LAST_PROBE = 16, 1024  # steps until the other number is tried again: doubled each time it is slower


@dataclass
class _Size:
    """What is known of steps of about one size: mean seconds and measurements by number of threads."""

    seconds: dict[int, float] = field(default_factory=dict)
    counts: dict[int, int] = field(default_factory=dict)
    steps_to_probe: int = _FIRST_PROBE
    probe_interval: int = _FIRST_PROBE


class FreeCores:
    """How many cores of the machine other processes left alone lately."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        self._before = self._times()
        self._cores = 0.0

    def __call__(self) -> float:
        """Mean over the last quarter of a second or more; 0 until one has passed."""
        if time.perf_counter() - self._before[0] >= _FREE_SECONDS:
            now = self._times()
            seconds, free = (after - before for after, before in zip(now, self._before, strict=True))
            self._cores, self._before = free / seconds, now
        return self._cores

    def _times(self) -> tuple[float, float]:
        """Seconds by the clock, and core seconds that were idle or ours."""
        own = self._process.cpu_times()
        return time.perf_counter(), psutil.cpu_times().idle + own.user + own.system


class ThreadControl:
    """Chooses between few and many threads for each step.

    Args:
        few, many: numbers of threads; the same if there is no choice.
        free_cores: how many cores this process has, or could have.
    """

    def __init__(self, few: int, many: int, free_cores: Callable[[], float] | None = None) -> None:
        self._few, self._many = few, many
        self._free_cores = free_cores or FreeCores()
        self._candidates = (few, many) if few < many else (few,)
        self._sizes: dict[int, _Size] = {}

    def choose(self, num_tokens: int) -> int:
        """The number of threads for a step of so many tokens."""
        if len(self._candidates) == 1 or num_tokens < _SMALLEST:
            return self._few
        size = self._sizes.setdefault(num_tokens.bit_length(), _Size())
        least = min(self._candidates, key=lambda threads: size.counts.get(threads, 0))
        if size.counts.get(least, 0) < _NUM_FIRST:
            return least if least == self._few or self._may_try_many() else self._few
        best = min(self._candidates, key=lambda threads: size.seconds[threads])
        size.steps_to_probe -= 1
        if size.steps_to_probe > 0 or (best == self._few and not self._may_try_many()):
            return best
        size.steps_to_probe = size.probe_interval
        return next(threads for threads in self._candidates if threads != best)

    def observe(self, num_tokens: int, num_threads: int, seconds: float) -> None:
        """A step of so many tokens took so long with so many threads."""
        size = self._sizes.get(num_tokens.bit_length())
        if size is None or num_tokens < _SMALLEST:
            return
        before = self._best(size)
        count = size.counts.get(num_threads, 0)
        # A plain mean at first; the very first measurement of a process would otherwise weigh too long.
        weight = max(1 - _MEMORY, 1 / (count + 1))
        size.seconds[num_threads] = (1 - weight) * size.seconds.get(num_threads, 0.0) + weight * seconds
        size.counts[num_threads] = count + 1
        if before is None:
            return
        if self._best(size) != before:
            size.probe_interval = _FIRST_PROBE
        elif num_threads != before:
            # One that was faster this time is tried again at once, until its mean is, or it is slower.
            is_faster = seconds < size.seconds[before]
            size.probe_interval = 1 if is_faster else min(max(_FIRST_PROBE, 2 * size.probe_interval), _LAST_PROBE)
            size.steps_to_probe = size.probe_interval

    def _may_try_many(self) -> bool:
        return self._free_cores() >= self._few + _FREE_SHARE * (self._many - self._few)

    def _best(self, size: _Size) -> int | None:
        if any(size.counts.get(threads, 0) < _NUM_FIRST for threads in self._candidates):
            return None
        return min(self._candidates, key=lambda threads: size.seconds[threads])
