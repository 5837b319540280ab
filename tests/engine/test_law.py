"""The joint law of several tokens through the real engine, against the exact joint, by chi-square.

Seeds are fixed, so each p-value is one number and the bound of 1e-4 cannot flake; the negative controls show that
the same samples would not pass if the law were broken.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_harness import Engine, Reference, chi_square_p_value, engine, guided, needs_v1, sampling, scaled, strategies

PROMPT = list(range(1, 30))  # with blocks of 32, a picture's tokens cross into a second block
ALLOWED = [5, 17, 18, 40]
NUM_TOKENS = scaled(5, 3)  # 4**5 = 1024 cells
NUM_SAMPLES = scaled(6000, 1000)
PASS = 1e-4
GUIDANCE = guided(2.0, list(range(30, 60)))


@pytest.fixture(scope="module")
def running(tiny_llama: Path) -> Iterator[Engine]:
    # A low reuse threshold makes the biased control clearly biased; the exact form must be exact at any threshold.
    with engine(tiny_llama, window=4, max_num_seqs=128, sjd={"reuse_threshold": 0.05}) as started:
        yield started


def p_value(
    running: Engine,
    reference: Reference,
    sjd: dict[str, Any] | None = None,
    *,
    num_samples: int = NUM_SAMPLES,
    **kwargs: Any,
) -> float:
    params = [
        sampling(NUM_TOKENS, seed=seed, allowed_token_ids=ALLOWED, sjd=sjd, **kwargs) for seed in range(num_samples)
    ]
    samples = [tokens for (tokens,) in running.generate([PROMPT] * num_samples, params)]
    guidance = sjd if sjd and "guidance_scale" in sjd else None
    return chi_square_p_value(samples, reference.joint(PROMPT, guidance, ALLOWED, NUM_TOKENS, **kwargs))


@pytest.mark.parametrize(
    ("redraft", "first_guess"),
    [
        ("gumbel", "uniform"),
        *(
            pytest.param(redraft, guess, marks=needs_v1)
            for redraft, guess in [
                *itertools.product(("coupled", "resample"), ("uniform", "repeat_left")),
                ("coupled", "left_probs"),
                ("reuse", "uniform"),
                ("reuse", "left_probs"),
            ]
        ),
    ],
)
def test_joint_law(running: Engine, reference: Reference, redraft: str, first_guess: str) -> None:
    assert p_value(running, reference, {"redraft": redraft, "first_guess": first_guess}) > PASS


@pytest.mark.parametrize("redraft", strategies("gumbel", "coupled", "reuse"))
def test_joint_law_under_guidance(running: Engine, reference: Reference, redraft: str) -> None:
    assert p_value(running, reference, {**GUIDANCE, "redraft": redraft}) > PASS


@pytest.mark.parametrize("redraft", strategies("gumbel", "coupled"))
@pytest.mark.parametrize(
    "processing", scaled([{"top_k": 3}, {"top_p": 0.8}, {"top_k": 3, "top_p": 0.9}], [{"top_k": 3, "top_p": 0.9}])
)
def test_joint_law_under_top_k_and_top_p(
    running: Engine, reference: Reference, redraft: str, processing: dict[str, Any]
) -> None:
    assert p_value(running, reference, {**GUIDANCE, "redraft": redraft}, **processing) > PASS


@pytest.mark.parametrize("redraft", strategies("gumbel", "coupled"))
def test_joint_law_of_plain_decoding(running: Engine, reference: Reference, redraft: str) -> None:
    assert p_value(running, reference, {"num_speculative_tokens": 0, "redraft": redraft}) > PASS


@needs_v1
def test_biased_reuse_is_seen(running: Engine, reference: Reference) -> None:
    with pytest.warns(UserWarning, match="biased"):
        assert p_value(running, reference, {"redraft": "reuse_biased"}) < PASS


@needs_v1
def test_a_skipped_residual_is_seen(running: Engine, reference: Reference, monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw from the target itself, not from what the refused draft left of it."""
    import sjd_vllm.core.step as step

    correct: Callable[..., Any] = step.correct

    def skip_residual(target_probs: Any, window: Any, *args: Any, **kwargs: Any) -> Any:
        return correct(target_probs, type(window)(window.tokens, window.probs * 0, window.lengths), *args, **kwargs)

    monkeypatch.setattr(step, "correct", skip_residual)
    assert p_value(running, reference, {"redraft": "coupled", "first_guess": "left_probs"}) < PASS


def test_lost_guidance_is_seen(running: Engine, reference: Reference) -> None:
    params = [sampling(NUM_TOKENS, seed=seed, allowed_token_ids=ALLOWED) for seed in range(NUM_SAMPLES)]
    samples = [tokens for (tokens,) in running.generate([PROMPT] * NUM_SAMPLES, params)]
    assert chi_square_p_value(samples, reference.joint(PROMPT, GUIDANCE, ALLOWED, NUM_TOKENS)) < PASS
