"""Greedy identity, the joint law and seeds when the scheduler chunks, cuts windows, queues halves and preempts."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_harness import (
    Engine,
    Reference,
    chi_square_p_value,
    engine,
    guided,
    record_preemptions,
    sampling,
    scaled,
    strategies,
)
from greedy_cases import check_mixed_batch

Expected = dict[tuple[int, int], list[int]]


def test_chunked_prefill_with_an_odd_number_of_slots(tiny_llama: Path, expected: Expected) -> None:
    """Chunks, cut windows and pairs whose second half waits for a slot."""
    with engine(tiny_llama, window=16, max_num_batched_tokens=64, max_num_seqs=5) as running:
        check_mixed_batch(running, expected, [0, 4, 16])


def test_preempted_pairs(tiny_llama: Path, expected: Expected, monkeypatch: pytest.MonkeyPatch) -> None:
    """With KV blocks for a few sequences only, pairs are preempted and resumed together."""
    with engine(
        tiny_llama,
        window=16,
        max_num_seqs=12,
        block_size=32,
        num_gpu_blocks_override=scaled(40, 22),
        max_model_len=scaled(512, 256),
    ) as running:
        preempted = record_preemptions(running, monkeypatch)
        check_mixed_batch(running, expected, [16, 5])
        assert any(running.scheduler.pairs.is_companion(i) for i in preempted)
        assert any(not running.scheduler.pairs.is_companion(i) for i in preempted)


def test_joint_law_under_chunked_prefill_and_preemption(
    tiny_llama: Path, reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten KV blocks for up to eight sequences of two blocks, and prompts that come in chunks."""
    prompt, allowed, num_tokens, num_samples = list(range(1, 30)), [5, 17, 18, 40], scaled(5, 3), scaled(3000, 600)
    guidance = guided(2.0, list(range(30, 60)))
    limits = {"block_size": 32, "num_gpu_blocks_override": 11, "max_num_batched_tokens": 96, "max_num_seqs": 8}
    with engine(tiny_llama, window=4, max_model_len=64, long_prefill_token_threshold=16, **limits) as running:
        preempted = record_preemptions(running, monkeypatch)
        params = [
            sampling(num_tokens, seed=seed, allowed_token_ids=allowed, sjd=guidance) for seed in range(num_samples)
        ]
        samples = [tokens for (tokens,) in running.generate([prompt] * num_samples, params)]
        assert chi_square_p_value(samples, reference.joint(prompt, guidance, allowed, num_tokens)) > 1e-4
        # the same samples would not pass if guidance were lost
        assert chi_square_p_value(samples, reference.joint(prompt, None, allowed, num_tokens)) < 1e-4
        assert len(preempted) > scaled(100, 20)
        running.assert_nothing_left()


@pytest.mark.parametrize("redraft", strategies("gumbel", "coupled"))
def test_same_seed_same_tokens_after_preemption(
    tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, redraft: str
) -> None:
    """A resumed request gets its window back: preemption costs a step, not the picture."""
    strategy = {"redraft": redraft}
    guidance = guided(3.0, [1, 9], **strategy)
    params = [
        sampling(scaled(100, 60), seed=seed, top_k=10, sjd=guidance if seed % 2 else strategy) for seed in range(6)
    ]

    def tokens(running: Engine) -> list[list[list[int]]]:
        return running.generate([[1, 2, 3, 4]] * len(params), params)

    with engine(tiny_llama, window=16, block_size=32) as roomy:
        expected = tokens(roomy)
    with engine(
        tiny_llama, window=16, block_size=32, num_gpu_blocks_override=scaled(26, 16), max_model_len=scaled(512, 256)
    ) as small:
        preempted = record_preemptions(small, monkeypatch)
        assert tokens(small) == expected
        assert preempted
        small.assert_nothing_left()
