"""Negative controls: the check of test_exactness.py must see every known way to be subtly wrong.

The figures are those of docs/exactness.md; an enumeration has no noise, so they are the same everywhere.
"""

from __future__ import annotations

import pytest
from core.enumeration import AfterStep, emitted_joint, total_variation
from core.strategies import CoupledWithOldLaw, FixedLaw, KeepIfLikely, lock_step
from core.toy_model import ToyModel

from sjd_vllm.core import FirstGuess, Redraft, get_first_guess, get_redraft, verify

FIRST_GUESSES = {
    "uniform": get_first_guess("uniform"),
    "left_probs": get_first_guess("left_probs"),
    "fixed_law": FixedLaw(),
}
MODEL = ToyModel.random(1, num_tokens=6)


def bias(
    redraft: Redraft, first_guess: FirstGuess, model: ToyModel = MODEL, after_step: AfterStep | None = None
) -> float:
    joint = emitted_joint(model, width=3, redraft=redraft, first_guess=first_guess, after_step=after_step)
    return total_variation(joint, model.joint())


def measured(total_variation: float) -> object:
    return pytest.approx(total_variation, rel=0.02)


@pytest.mark.parametrize(("first_guess", "expected"), [("uniform", 0.045), ("left_probs", 0.061), ("fixed_law", 0.085)])
def test_old_law_stored_with_a_kept_token(first_guess: str, expected: float) -> None:
    assert bias(CoupledWithOldLaw(), FIRST_GUESSES[first_guess]) == measured(expected)


@pytest.mark.parametrize(("first_guess", "expected"), [("uniform", 0.040), ("left_probs", 0.054), ("fixed_law", 0.081)])
def test_old_law_stored_after_a_look_at_the_token(first_guess: str, expected: float) -> None:
    assert bias(KeepIfLikely(), FIRST_GUESSES[first_guess]) == measured(expected)


@pytest.mark.parametrize(
    ("threshold", "expected"), [(0.8, (0.019, 0.053)), (0.3, (0.0267, 0.074)), (0.0, (0.094, 0.271))]
)
def test_plain_reading_of_threshold_reuse(threshold: float, expected: tuple[float, float]) -> None:
    with pytest.warns(UserWarning, match="does not sample from the model"):
        redraft = get_redraft("reuse_biased", threshold=threshold)
    assert bias(redraft, FIRST_GUESSES["uniform"]) == measured(expected[0])
    assert bias(redraft, FIRST_GUESSES["fixed_law"]) == measured(expected[1])


@pytest.mark.parametrize(("first_guess", "expected"), [("uniform", 0.123), ("left_probs", 0.137), ("fixed_law", 0.196)])
def test_skipped_residual(first_guess: str, expected: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "residual", lambda target_probs, draft_probs: target_probs)
    assert bias(get_redraft("resample"), FIRST_GUESSES[first_guess]) == measured(expected)


@pytest.mark.parametrize(("first_guess", "expected"), [("uniform", 0.127), ("left_probs", 0.150)])
def test_surplus_of_a_lock_step_batch_tested_again(first_guess: str, expected: float) -> None:
    model = ToyModel.random(4, num_tokens=5)
    lost = bias(get_redraft("coupled"), FIRST_GUESSES[first_guess], model, lock_step(restate_law=False))
    assert lost == measured(expected)
