"""Limits, power, swap tests and intervals on data whose answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from sjd_vllm.core import MartingaleSum, martingale_sums, martingale_z_scores
from sjd_vllm.evaluation.accuracy import paired_interval
from sjd_vllm.evaluation.lossless import limit_for
from sjd_vllm.evaluation.two_sample import histogram_swap_test, picture_statistics, swap_test
from sjd_vllm.models.grammar import grid_grammar


def test_sums_of_parts_are_the_sum_of_the_whole() -> None:
    probs = torch.rand(50, 7, generator=torch.Generator().manual_seed(0)).softmax(-1)
    tokens = torch.multinomial(probs, 1, generator=torch.Generator().manual_seed(1))[:, 0]
    groups = torch.arange(50) // 25
    whole = martingale_z_scores(probs, tokens, groups)
    parts = [martingale_sums(probs[rows], tokens[rows]) for rows in (slice(0, 25), slice(25, 50))]
    assert {name: (parts[0][name] + parts[1][name]).z_score for name in whole} == pytest.approx(whole)


def test_the_visible_bias_is_seen_as_often_as_it_says() -> None:
    """A coin of p + b, tested against p: the share of alarms at the b that is claimed for 90 %."""
    rng, num_tokens, limit = np.random.default_rng(0), 4000, 3.0
    p = 0.3
    claimed = MartingaleSum(0, num_tokens * p * (1 - p), num_tokens).smallest_visible_bias(limit, 1.2816)
    heads = rng.binomial(num_tokens, p + claimed, 20_000)
    z = (heads - num_tokens * p) / (num_tokens * p * (1 - p)) ** 0.5
    assert (abs(z) > limit).mean() == pytest.approx(0.9, abs=0.02)


def test_the_limit_grows_with_the_number_of_tests() -> None:
    assert limit_for(1) == pytest.approx(3.2905, abs=1e-3)
    assert limit_for(25) == pytest.approx(4.1075, abs=1e-3)


def test_swaps_of_equal_laws_give_even_p_values() -> None:
    rng = np.random.default_rng(0)
    p = np.array([swap_test(rng.normal(size=20), seed) for seed in range(300)])
    assert abs(p.mean() - 0.5) < 0.06
    assert (p < 0.05).mean() < 0.1
    assert swap_test(rng.normal(1.0, 1, size=30)) < 0.002
    assert swap_test(np.zeros(10)) == 1


def test_swaps_of_histograms_see_another_law() -> None:
    rng = np.random.default_rng(0)
    even = rng.multinomial(50, [0.25] * 4, size=(2, 40)).astype(float)
    lopsided = rng.multinomial(50, [0.4, 0.2, 0.2, 0.2], size=40).astype(float)
    assert histogram_swap_test(even[0], even[1]) > 0.01
    assert histogram_swap_test(even[0], lopsided) < 0.001
    assert histogram_swap_test(even[0], even[0]) == 1


def test_statistics_of_a_picture() -> None:
    grammar = grid_grammar(code_ids=range(10, 14), rows=2, columns=3, end_of_row=[1], end_of_image=[2])
    found = picture_statistics(grammar, [10, 10, 11, 1, 10, 12, 11, 1, 2])
    assert found["same_as_left"] == pytest.approx(1 / 4)
    assert found["same_as_above"] == pytest.approx(2 / 3)
    assert found["distinct"] == pytest.approx(3 / 6)
    assert found["entropy"] == pytest.approx(
        -(3 / 6 * np.log2(3 / 6) + 2 / 6 * np.log2(2 / 6) + 1 / 6 * np.log2(1 / 6))
    )


def test_a_paired_interval_covers_the_truth() -> None:
    assert paired_interval(0, 0, 50)[0] == 0
    rng = np.random.default_rng(0)
    covered = []
    for _ in range(2000):
        won, lost, _ = rng.multinomial(60, [0.12, 0.05, 0.83])
        _, low, high = paired_interval(won, lost, 60)
        covered.append(low < 0.07 < high)
    assert 0.93 < np.mean(covered) < 0.985
