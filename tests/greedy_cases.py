"""Prompts and guidance settings whose greedy continuations are compared with Transformers."""

from __future__ import annotations

from typing import Any

from engine_harness import Engine, guided, sampling, scaled

PROMPTS = [[1, 2, 3], [5], [7, 8, 9, 10, 11, 12, 13] * 9, [3] * 120]
GUIDANCE: list[dict[str, Any] | None] = [None, guided(3.0, [1, 9]), guided(0.5, [4, 6] * 60)]
NUM_TOKENS = scaled(220, 40)


def check_mixed_batch(running: Engine, expected: dict[tuple[int, int], list[int]], windows: list[int]) -> None:
    """All prompts, guided and not, with different windows, in one batch."""
    keys = list(expected)
    params = [
        sampling(
            NUM_TOKENS,
            temperature=0,
            sjd={**(GUIDANCE[j] or {}), "num_speculative_tokens": windows[n % len(windows)]},
        )
        for n, (_, j) in enumerate(keys)
    ]
    outputs = running.generate([PROMPTS[i] for i, _ in keys], params)
    for key, (tokens,) in zip(keys, outputs, strict=True):
        assert tokens == expected[key], f"prompt {key[0]}, guidance {GUIDANCE[key[1]]}"
    running.assert_nothing_left()
