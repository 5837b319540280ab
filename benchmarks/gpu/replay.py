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

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.traces import Traces


class Replay:
    """Where the steps of each request end.

    Args:
        traces: as recorded.
        num_tokens: T, of a finished picture of the model that is run.
    """

    def __init__(self, traces: Traces, num_tokens: int, device: torch.device | str = "cpu") -> None:
        self._num_pictures = traces.num_pictures
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
        window = torch.bucketize(num_rows - 1, self._windows, right=True) - 1
        end = self._ends[window, seeds % self._num_pictures, positions.clamp_max(self._ends.shape[-1] - 1)]
        return torch.minimum(end - positions, num_rows).clamp_min(1)


def _ends(pictures: list[list[int]], first: int, num_tokens: int) -> Tensor:
    ends: list[int] = []
    picture = first
    while len(ends) < num_tokens:
        for count in pictures[picture % len(pictures)]:
            ends += [len(ends) + count] * count
        picture += 1
    return torch.tensor(ends[:num_tokens]).clamp_max(num_tokens)


@contextmanager
def replay_on(runner: Any, replay: Replay) -> Iterator[None]:
    """Let the engine of a live model runner in this process decode at the replay's pace, strategy `gumbel`.

    Raises TypeError for a runner without a seam: the one place where it decides how many tokens are final.
    """
    from sjd_vllm.engine.v1_runner import SJDRunnerMixin

    if not isinstance(runner, SJDRunnerMixin):
        raise TypeError(f"there is no seam for the replay in {type(runner).__qualname__}; see benchmarks/gpu/replay.py")
    with _in_fixed_noise_pool(replay):
        yield


@contextmanager
def _in_fixed_noise_pool(replay: Replay) -> Iterator[None]:
    """The V1 runner's seam: `sweep` counts, in `FixedNoisePool.step`, which knows whose rows they are."""
    from sjd_vllm.engine import fixed_noise_pool

    pool = fixed_noise_pool.FixedNoisePool
    engine_step, engine_sweep = pool.step, fixed_noise_pool.sweep
    stepped: list[Tensor] = []

    def step(self: Any, pictures: Any, *args: Any) -> Any:
        stepped[:] = torch.from_numpy(self.slots.seed[pictures.slots]), torch.from_numpy(pictures.positions)
        return engine_step(self, pictures, *args)

    def sweep(drafts: Tensor, rows: Tensor, positions: Tensor, choices: Tensor, starts: Tensor) -> Tensor:
        engine_sweep(drafts, rows, positions, choices, starts)
        return replay.num_final(*stepped, torch.diff(starts, append=starts.new_tensor([len(rows)])))

    pool.step, fixed_noise_pool.sweep = step, sweep  # type: ignore[method-assign]
    try:
        yield
    finally:
        pool.step, fixed_noise_pool.sweep = engine_step, engine_sweep  # type: ignore[method-assign]
