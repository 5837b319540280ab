"""`decode` as a user meets it: samples against the known joint, seeds, counts, greedy, and its error messages."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from core.strategies import CoupledWithOldLaw, FixedLaw, lopsided_guess
from core.toy_model import ToyModel
from scipy.stats import chi2
from torch import Tensor

from sjd_vllm.core import FIRST_GUESS_NAMES, DecodeResult, decode, get_redraft

NUM_TOKENS = 5
NUM_SEQUENCES = 20_000
PASS = 1e-4  # with a fixed seed the outcome is fixed; an exact decoder has this chance of a bad one
MODEL = ToyModel.random(5, num_tokens=NUM_TOKENS)


def sample(num_sequences: int = NUM_SEQUENCES, seed: int = 0, **options: Any) -> DecodeResult:
    options = {"window": 3, "row_stride": 2, "redraft": "coupled", **options}
    return decode(MODEL.next_token_logits, NUM_TOKENS, seed=seed, num_sequences=num_sequences, **options)


def p_value(result: DecodeResult, model: ToyModel) -> float:
    """Chi-square of the whole joint, cells of less than five expected sequences taken together."""
    num = len(result.token_ids)
    counts = model.sequence_index(result.token_ids).bincount(minlength=model.num_sequences).double()
    expected = model.joint() * num
    rare = expected < 5
    counts = torch.cat([counts[~rare], counts[rare].sum()[None]])
    expected = torch.cat([expected[~rare], expected[rare].sum()[None]]).clamp(min=1e-300)
    return float(chi2.sf(float(((counts - expected) ** 2 / expected).sum()), len(counts) - 1))


@pytest.mark.parametrize("redraft", ["coupled", "resample", "gumbel", "reuse"])
def test_joint_law_of_each_redraft(redraft: str) -> None:
    assert p_value(sample(redraft=redraft), MODEL) > PASS


@pytest.mark.parametrize(
    "first_guess", [*FIRST_GUESS_NAMES, FixedLaw(), lopsided_guess, lambda prefix: len(prefix) % 3]
)
def test_joint_law_of_each_first_guess(first_guess: Any) -> None:
    assert p_value(sample(first_guess=first_guess), MODEL) > PASS


@pytest.mark.parametrize("window", [0, 1, 2, 4])
def test_joint_law_of_each_window(window: int) -> None:
    assert p_value(sample(window=window), MODEL) > PASS


def test_joint_law_with_guidance_and_every_processor() -> None:
    model = ToyModel.random(5, num_tokens=NUM_TOKENS, guidance_scale=2.0, temperature=0.8, top_k=2)
    options = {"uncond_logits": MODEL.next_uncond_logits, "guidance_scale": 2.0, "temperature": 0.8, "top_k": 2}
    result = sample(**options, first_guess="above_probs")
    assert p_value(result, model) > PASS
    assert p_value(sample(**{**options, "guidance_scale": 1.5}), model) < PASS


def test_biased_rules_are_seen() -> None:
    with pytest.warns(UserWarning, match="does not sample from the model"):
        assert p_value(sample(redraft="reuse_biased", first_guess="left_probs"), MODEL) < PASS
    assert p_value(sample(redraft=CoupledWithOldLaw()), MODEL) < PASS


def test_a_sequence_depends_on_its_seed_only() -> None:
    together = sample(40, seed=1000)
    for i in (0, 7, 39):
        alone = sample(1, seed=1000 + i)
        assert torch.equal(alone.token_ids[0], together.token_ids[i])
        assert alone.accepted_per_step[0] == together.accepted_per_step[i]
    assert len(together.token_ids.unique(dim=0)) > 5


@pytest.mark.parametrize("window", [0, 1, 3, 10])
def test_steps_and_accepted_drafts_add_up(window: int) -> None:
    result = sample(200, window=window)
    assert result.token_ids.shape == (200, NUM_TOKENS)
    for steps, accepted in zip(result.num_steps.tolist(), result.accepted_per_step, strict=True):
        assert len(accepted) == steps
        assert sum(accepted) + steps == NUM_TOKENS
        assert max(accepted) <= window


@pytest.mark.parametrize("options", [{}, {"top_k": 5}, {"top_p": 0.8, "temperature": 0.7}, {"top_k": 7, "top_p": 0.9}])
def test_under_fixed_noise_windows_decide_when_tokens_come_and_not_which(options: dict[str, Any]) -> None:
    guidance = {"uncond_logits": bigram(20, seed=9), "guidance_scale": 2.0}
    plain, *windowed = (
        decode(bigram(20, seed=1), 120, window=window, seed=3, num_sequences=4, **guidance, **options)
        for window in (0, 1, 5, 30)
    )
    assert plain.num_steps.tolist() == [120] * 4
    for result in windowed:
        assert torch.equal(result.token_ids, plain.token_ids)
        assert int(result.num_steps.max()) < 120


def bigram(num_columns: int, seed: int) -> Callable[[list[list[int]]], Tensor]:
    """A longer model than a table can hold: the next token depends on the last two."""
    table = 3 * torch.randn(num_columns, num_columns, num_columns, generator=torch.Generator().manual_seed(seed))

    def next_token_logits(prefixes: list[list[int]]) -> Tensor:
        last = torch.tensor([([0, 0, *prefix])[-2:] for prefix in prefixes])
        return table[last[:, 0], last[:, 1]]

    return next_token_logits


@pytest.mark.parametrize(
    ("redraft", "first_guess"),
    [
        ("gumbel", "uniform"),
        *((redraft, guess) for redraft in ("coupled", "resample", "reuse") for guess in FIRST_GUESS_NAMES),
    ],
)
def test_temperature_zero_is_greedy(redraft: str, first_guess: str) -> None:
    logits = bigram(20, seed=1)
    greedy: list[int] = []
    for _ in range(150):
        greedy.append(int(logits([greedy])[0].argmax()))
    result = decode(
        logits, 150, window=8, seed=3, redraft=redraft, first_guess=first_guess, temperature=0, row_stride=9
    )
    assert result.token_ids[0].tolist() == greedy


def test_allowed_tokens_are_the_only_ones() -> None:
    result = decode(bigram(20, seed=1), 60, window=6, seed=0, allowed_token_ids=[3, 17, 4], num_sequences=5)
    assert set(result.token_ids.flatten().tolist()) == {3, 4, 17}
    forced = decode(bigram(20, seed=1), 60, window=6, seed=0, allowed_token_ids=[9])
    assert forced.token_ids.unique().tolist() == [9]
    assert int(forced.num_steps) == -(-60 // 7), "a forced token is always accepted"


def test_a_perfect_guess_is_always_accepted() -> None:
    logits = bigram(20, seed=2)
    result = decode(
        logits, 64, window=7, seed=0, first_guess=lambda prefix: logits([prefix])[0].softmax(0), redraft="coupled"
    )
    assert result.accepted_per_step[0] == [0] + [7] * 7 + [6]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_tokens": 0}, "num_tokens must be at least 1, got 0"),
        ({"num_tokens": 2.5}, "num_tokens must be a whole number, got 2.5"),
        ({"window": -1}, "window must be at least 0"),
        ({"num_sequences": 0}, "num_sequences must be at least 1"),
        ({"seed": 2**63}, "must stay below"),
        ({"redraft": "cupled"}, "did you mean 'coupled'"),
        ({"first_guess": "unifrom"}, "did you mean 'uniform'"),
        ({"redraft": "gumbel", "first_guess": "left_probs"}, "gumbel makes its first drafts uniform"),
        ({"redraft": 3}, "redraft must be a name or a Redraft"),
        ({"first_guess": 3}, "first_guess must be a name, a FirstGuess or a function"),
        ({"temperature": -0.5}, "temperature must be a finite number >= 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number >= 0"),
        ({"top_k": -2}, "top_k must be at least -1"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\]"),
        ({"guidance_scale": 2.0}, "needs uncond_logits"),
        ({"guidance_scale": float("inf")}, "guidance_scale must be finite"),
        ({"allowed_token_ids": []}, "allowed_token_ids is empty"),
        ({"allowed_token_ids": [1, 3]}, r"allowed_token_ids has 3; the model has tokens 0\.\.2"),
        ({"row_stride": 0}, "row_stride must be at least 1"),
        ({"first_guess": lambda prefix: 3}, "first_guess returned token 3"),
        ({"first_guess": lambda prefix: torch.ones(3)}, "apply softmax to logits first"),
        ({"first_guess": lambda prefix: torch.ones(4) / 4}, r"draft probabilities \[V\] = \[3\]"),
        ({"next_token_logits": lambda prefixes: torch.zeros(3)}, r"must return \[len\(prefixes\), V\]"),
        ({"next_token_logits": lambda prefixes: torch.full((len(prefixes), 3), torch.nan)}, "NaN"),
        ({"uncond_logits": lambda prefixes: torch.zeros(len(prefixes), 4)}, r"uncond_logits must return .* 3\]"),
    ],
)
def test_arguments_that_make_no_sense_are_explained(given: dict[str, Any], message: str) -> None:
    options: dict[str, Any] = {
        "next_token_logits": MODEL.next_token_logits,
        "num_tokens": 4,
        "window": 2,
        "seed": 0,
        "redraft": "coupled",
    }
    options |= given
    with pytest.raises(ValueError, match=message):
        decode(options.pop("next_token_logits"), options.pop("num_tokens"), **options)


def test_a_strategy_object_is_as_good_as_its_name() -> None:
    assert torch.equal(sample(50, redraft=get_redraft("reuse")).token_ids, sample(50, redraft="reuse").token_ids)
