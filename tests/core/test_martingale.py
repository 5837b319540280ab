"""The martingale test passes exact samples and sees a bias in each direction."""

from __future__ import annotations

import math

import pytest
import torch
from core.strategies import KeepIfLikely
from torch import Tensor

from sjd_vllm.core import decode, get_redraft, martingale_z_scores

NUM_COLUMNS = 12
NUM_TOKENS = 60
NUM_SEQUENCES = 200
TABLE = 2 * torch.randn(NUM_COLUMNS, NUM_COLUMNS, NUM_COLUMNS, generator=torch.Generator().manual_seed(0))


def logits_after(prefixes: list[list[int]]) -> Tensor:
    last = torch.tensor([([0, 0, *prefix])[-2:] for prefix in prefixes])
    return TABLE[last[:, 0], last[:, 1]]


def z_scores_of(sequences: Tensor) -> dict[str, float]:
    """Teacher-force finished sequences [S, n], all at temperature 1."""
    padded = torch.nn.functional.pad(sequences, (2, 0))
    probs = TABLE[padded[:, :-2], padded[:, 1:-1]].softmax(-1)
    groups = torch.arange(len(sequences)).repeat_interleave(sequences.shape[1])
    return martingale_z_scores(probs.flatten(0, 1), sequences.flatten(), groups)


def sampled(**options: object) -> Tensor:
    return decode(logits_after, NUM_TOKENS, window=8, seed=5, num_sequences=NUM_SEQUENCES, **options).token_ids


@pytest.mark.parametrize(
    ("redraft", "first_guess"),
    [("gumbel", "uniform"), *((redraft, "left_probs") for redraft in ("coupled", "resample", "reuse"))],
)
def test_exact_samples_pass(redraft: str, first_guess: str) -> None:
    z_scores = z_scores_of(sampled(redraft=redraft, first_guess=first_guess))
    assert set(z_scores) == {"surprisal", "top1", "probability", "rank", "repeat"}
    assert max(map(abs, z_scores.values())) < 3.5, z_scores


def test_a_wrong_temperature_shows_with_the_right_sign() -> None:
    cold, hot = z_scores_of(sampled(temperature=0.9)), z_scores_of(sampled(temperature=1.1))
    assert cold["surprisal"] < -5 < 5 < hot["surprisal"]
    assert hot["top1"] < -5 < 5 < cold["top1"]
    assert hot["probability"] < -5 < 5 < cold["probability"]
    assert cold["rank"] < -5 < 5 < hot["rank"]


def test_biased_rules_show() -> None:
    assert max(map(abs, z_scores_of(sampled(redraft=KeepIfLikely())).values())) > 5
    with pytest.warns(UserWarning, match="does not sample"):
        redraft = get_redraft("reuse_biased", threshold=0.3)
    assert max(map(abs, z_scores_of(sampled(redraft=redraft)).values())) > 5


def test_variance_is_that_of_the_rows() -> None:
    """Two columns with known moments: z of every indicator-like score is the normalised count."""
    probs = torch.tensor([[0.7, 0.3]]).expand(100, 2)
    tokens = (torch.arange(100) >= 76).long()
    z_scores = martingale_z_scores(probs, tokens)
    expected = (76 - 70) / math.sqrt(100 * 0.21)
    assert z_scores["top1"] == pytest.approx(expected, rel=1e-5)
    assert z_scores["probability"] == pytest.approx(expected, rel=1e-5)
    assert z_scores["surprisal"] == pytest.approx(-expected, rel=1e-5)
    assert z_scores["rank"] == pytest.approx(-expected, rel=1e-5)


def test_equal_probabilities_share_a_rank() -> None:
    probs = torch.full((50, 4), 0.25)
    assert martingale_z_scores(probs, torch.zeros(50, dtype=torch.long))["rank"] == pytest.approx(0, abs=1e-9)


def test_repeats_are_counted_within_a_sequence_only() -> None:
    probs = torch.full((6, 2), 0.5)
    tokens, groups = torch.tensor([0, 1, 0, 1, 0, 1]), torch.tensor([0, 1, 0, 1, 0, 1])
    assert martingale_z_scores(probs, tokens, groups)["repeat"] == pytest.approx(2.0)  # 4 of 4
    assert martingale_z_scores(probs, tokens)["repeat"] == pytest.approx(-math.sqrt(5))  # 0 of 5


def test_an_impossible_token_is_infinitely_surprising() -> None:
    probs = torch.tensor([[0.5, 0.5, 0.0]]).expand(4, 3)
    assert martingale_z_scores(probs, torch.tensor([0, 1, 2, 0]))["surprisal"] == math.inf


def test_certain_rows_score_zero() -> None:
    probs = torch.tensor([[0.0, 1.0, 0.0]]).expand(4, 3)
    assert set(martingale_z_scores(probs, torch.ones(4, dtype=torch.long)).values()) == {0.0}


def test_wrong_shapes_are_explained() -> None:
    with pytest.raises(ValueError, match=r"target_probs \[N, V\] and tokens \[N\]"):
        martingale_z_scores(torch.ones(3, 2), torch.zeros(4, dtype=torch.long))
    with pytest.raises(ValueError, match="groups must be"):
        martingale_z_scores(torch.ones(3, 2), torch.zeros(3, dtype=torch.long), torch.zeros(2, dtype=torch.long))
