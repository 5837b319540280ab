"""Temperature 0 equals plain greedy decoding token for token, whatever the scheduler does to the request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_harness import Engine, engine, sampling, scaled, strategies
from greedy_cases import GUIDANCE, NUM_TOKENS, PROMPTS, check_mixed_batch


@pytest.fixture(scope="module")
def roomy(tiny_llama: Path) -> Iterator[Engine]:
    with engine(tiny_llama, window=100) as running:
        yield running


@pytest.mark.parametrize("window", scaled([0, 1, 7, 32, 100], [7]))
def test_equals_plain_greedy_decoding(roomy: Engine, expected: dict[tuple[int, int], list[int]], window: int) -> None:
    check_mixed_batch(roomy, expected, [window])


def test_windows_differ_within_a_batch(roomy: Engine, expected: dict[tuple[int, int], list[int]]) -> None:
    check_mixed_batch(roomy, expected, [0, 1, 3, 20, 100])


@pytest.mark.parametrize("redraft", strategies("coupled", "resample", "gumbel", "reuse"))
def test_every_strategy_equals_plain_greedy_decoding(
    roomy: Engine, expected: dict[tuple[int, int], list[int]], redraft: str
) -> None:
    params = [sampling(NUM_TOKENS, temperature=0, sjd={**(g or {}), "redraft": redraft}) for g in GUIDANCE]
    outputs = roomy.generate([PROMPTS[0]] * len(GUIDANCE), params)
    assert [tokens for (tokens,) in outputs] == [expected[0, j] for j in range(len(GUIDANCE))]


def test_drafts_are_accepted(roomy: Engine) -> None:
    """The identity above would hold if no draft were ever accepted. A chaotic model accepts few, but some."""
    num_tokens = 220
    before = roomy.scheduler._counters.read()
    roomy.generate([PROMPTS[0]], [sampling(num_tokens, temperature=0, sjd={"num_speculative_tokens": 32})])
    after = roomy.scheduler._counters.read()
    assert after["drafts_accepted_total"] - before["drafts_accepted_total"] >= 5
    assert after["steps_total"] - before["steps_total"] <= num_tokens - 5
