"""The recorded traces, and decoding at their pace, without an engine."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from benchmarks.gpu.replay import Replay
from benchmarks.gpu.traces import WINDOWS, Traces

FORWARDS = Path(__file__).parents[2] / "benchmarks" / "results" / "forwards.csv"
# two pictures of ten tokens
TRACES = Traces(10, {2: [[1, 3, 2, 1, 3], [1, 1, 3, 3, 2]], 4: [[1, 5, 4], [1, 3, 5, 1]]})


def followed(replay: Replay, seed: int, window: int, num_tokens: int) -> list[int]:
    """Tokens of each forward of a request that has `window` drafts in each but the first."""
    steps: list[int] = []
    while sum(steps) < num_tokens:
        rows = min(1 + (window if steps else 0), num_tokens - sum(steps))
        steps.append(int(replay.num_final(*(torch.tensor([value]) for value in (seed, sum(steps), rows)))))
    return steps


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("seed", [0, 1, 7])
def test_a_picture_follows_its_trace(window: int, seed: int) -> None:
    assert followed(Replay(TRACES, 10, window), seed, window, 10) == TRACES.steps[window][seed % 2]


def test_a_longer_picture_follows_several() -> None:
    first, second = TRACES.steps[4]
    assert followed(Replay(TRACES, 25, 4), 1, 4, 25) == [*second, *first, 1, 3, 1]


def test_a_window_that_was_not_recorded_takes_the_next_shorter_one() -> None:
    expected = {0: [1] * 10, 1: [1] * 10, 3: TRACES.steps[2][0], 90: TRACES.steps[4][0]}
    assert {window: followed(Replay(TRACES, 10, window), 0, window, 10) for window in expected} == expected


def test_a_step_within_a_piece_takes_what_is_left_of_it() -> None:
    """Picture 0 at window 4 is 1 + 5 + 4 tokens, so its second piece is positions 1 to 5."""
    seeds, positions, rows = torch.tensor([0, 0, 0]), torch.tensor([1, 3, 3]), torch.tensor([5, 5, 2])
    # the last has one draft, which is less than any recorded window
    assert Replay(TRACES, 10, 4).num_final(seeds, positions, rows).tolist() == [5, 3, 1]


def test_counts_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="none of 4 tokens"):
        Traces(4, {2: [[1, 4]]})
    with pytest.raises(ValueError, match="none of 5 tokens"):
        Traces(5, {2: [[1, 4]]})
    with pytest.raises(ValueError, match="window 4 has 2"):
        Traces(4, {2: [[1, 3]], 4: [[4], [4]]})


def test_the_recorded_traces_are_those_of_the_demo() -> None:
    """Their mean forwards are those that were measured before, captions and seeds being the same."""
    traces = Traces.load()
    assert traces.windows == WINDOWS
    with FORWARDS.open(newline="") as file:
        rows = [
            row
            for row in csv.DictReader(file)
            if (row["redraft"], row["guidance_scale"], row["top_k"]) == ("gumbel", "3.0", "100")
        ]
    measured = {int(row["window"]): row for row in rows}
    assert len(measured) >= 6
    for window in measured.keys() & set(traces.windows):
        forwards = traces.num_tokens / traces.tokens_per_forward(window)
        row = measured[window]
        assert forwards == pytest.approx(float(row["forwards_mean"]), abs=3 * float(row["forwards_se"])), window
