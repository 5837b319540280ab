"""Decoding at the pace of recorded acceptance: a model with random weights accepts as the demo model did.

Latency under speculative decoding is forwards times the time of a step. A model without trained weights gives the time;
how many drafts it accepts says nothing. So the engine runs as it is, and one decision is taken from a trace:

    replaced: of the scored positions of a request, how many are final (1 + accepted drafts) in a step.
    kept:     everything else. The same prompts and drafts go through the same forward; logits are mixed, filtered and
              chosen from; choices take the drafts' places; KV slots, scheduler, guidance pairs, the window by load and
              the outputs do what they do. The engine's own count is still computed, and thrown away.

The tokens of such a run are meaningless: a token may be called final though its draft was refused. Nothing must be made
of them, pictures least of all.

A request with seed s follows picture s of the traces, then pictures s + 1, s + 2, ... until it has its tokens, so each
of them also brings a picture's slow beginning and end. The steps of a trace lie on the sequence as pieces; a step that
begins at position t ends with the piece that t lies in, or where the drafts end that were scored. With a window as
recorded these are the trace's steps; where the window follows the load, a step may begin within a piece, and takes what
is left of it. A window that was not recorded takes the next shorter one's trace.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.common import Run
from benchmarks.gpu.traces import Traces


class Replay:
    """Where the steps of each request end.

    Args:
        traces: as recorded.
        num_tokens: T, of a finished picture of the model that is run.
        longest: window of the requests, or the longest of those that follow the load.
    """

    def __init__(self, traces: Traces, num_tokens: int, longest: int, device: torch.device | str = "cpu") -> None:
        self._num_pictures = traces.num_pictures
        self._num_tokens = num_tokens
        self._longest = longest
        self._windows = torch.tensor([0, *traces.windows], device=device)
        plain = torch.arange(1, num_tokens + 1).expand(self._num_pictures, num_tokens)
        followed = [
            torch.stack([_ends(traces.steps[window], first, num_tokens) for first in range(self._num_pictures)])
            for window in traces.windows
        ]
        # int64 [windows, pictures, T]: the position behind the piece that a position lies in
        self._ends = torch.stack([plain, *followed]).to(device)

    def num_final(self, seeds: Tensor, positions: Tensor, num_rows: Tensor) -> Tensor:
        """How many tokens become final -> long [R], 1 to num_rows. Waits for no device.

        seeds, positions, num_rows: long [R], on the device of the replay; of each request, its seed, the position of
            the first row, and the rows scored: its drafts and one more.
        """
        # a window that reaches the end of the picture is as short as it is for that alone
        window = torch.where(positions + num_rows >= self._num_tokens, self._longest, num_rows - 1)
        index = torch.bucketize(window, self._windows, right=True) - 1
        end = self._ends[index, seeds % self._num_pictures, positions.clamp_max(self._ends.shape[-1] - 1)]
        return torch.minimum(end - positions, num_rows).clamp_min(1)


def _ends(pictures: list[list[int]], first: int, num_tokens: int) -> Tensor:
    ends: list[int] = []
    picture = first
    while len(ends) < num_tokens:
        for count in pictures[picture % len(pictures)]:
            ends += [len(ends) + count] * count
        picture += 1
    return torch.tensor(ends[:num_tokens]).clamp_max(num_tokens)


def replay_of(run: Run, runner: Any, longest: int) -> Replay:
    """The recorded traces for pictures of a run's shape, where the runner counts: V1 on the host, V2 on its device."""
    is_v1 = any(base.__name__ == "SJDRunnerMixin" for base in type(runner).__mro__)
    return Replay(Traces.load(), run.shape.num_tokens, longest, "cpu" if is_v1 else runner.device)


@contextmanager
def replay_on(runner: Any, replay: Replay) -> Iterator[None]:
    """Let the engine of a live model runner in this process decode at the replay's pace, strategy `gumbel`.

    Raises TypeError for a runner without a seam, which is the one place where it counts how many tokens are final.
    """
    seams = [_SEAMS[base.__name__] for base in type(runner).__mro__ if base.__name__ in _SEAMS]
    if not seams:
        raise TypeError(f"there is no seam for the replay in {type(runner).__qualname__}; see benchmarks/gpu/replay.py")
    with seams[0](runner, replay):
        yield


@contextmanager
def _in_fixed_noise_pool(runner: Any, replay: Replay) -> Iterator[None]:
    """V1: the count in `FixedNoisePool.step`; the pool that steps knows the seeds of its slots."""
    from sjd_vllm.engine import fixed_noise_pool

    pool = fixed_noise_pool.FixedNoisePool
    engine_step = pool.step
    stepping: list[Any] = []

    def step(self: Any, *args: Any) -> Any:
        stepping[:] = [self]
        return engine_step(self, *args)

    setattr(pool, "step", step)  # noqa: B010
    try:
        with _counted(fixed_noise_pool, "sweep_cpu", replay, lambda: stepping[0].slots.seed):
            yield
    finally:
        setattr(pool, "step", engine_step)  # noqa: B010


@contextmanager
def _in_device_states(runner: Any, replay: Replay) -> Iterator[None]:
    """V2: the count in `DeviceStates`, all on the device."""
    from sjd_vllm.engine import device_states

    with _counted(device_states, "sweep", replay, lambda: runner._sjd._seed):
        yield


@contextmanager
def _counted(module: Any, name: str, replay: Replay, seed_of_slot: Callable[[], Any]) -> Iterator[None]:
    """Replace the function `core.sweep`, or its compiled form, where a module looks it up by name.

    It still puts the choices in the drafts' places; its count is thrown away. A row of the drafts is a request's slot.
    """
    engine_sweep = getattr(module, name)

    def sweep(drafts: Any, rows: Any, positions: Any, choices: Any, starts: Any) -> Any:
        counted = engine_sweep(drafts, rows, positions, choices, starts)
        first = torch.as_tensor(starts)
        ends = torch.cat([first[1:], torch.full_like(first[:1], len(rows))])
        seeds = torch.as_tensor(seed_of_slot())[torch.as_tensor(rows)[first]]
        final = replay.num_final(seeds, torch.as_tensor(positions)[first], ends - first)
        return final if isinstance(counted, Tensor) else final.numpy()

    setattr(module, name, sweep)
    try:
        yield
    finally:
        setattr(module, name, engine_sweep)


# By the class that our runners of a kind have in common.
_SEAMS: dict[str, Callable[[Any, Replay], AbstractContextManager[None]]] = {
    "SJDRunnerMixin": _in_fixed_noise_pool,
    "SJDRunnerV2Mixin": _in_device_states,
}
