"""Negative controls: the check of test_exactness.py must see every known way to be subtly wrong."""

from __future__ import annotations

import pytest
from core.enumeration import emitted_joint, total_variation
from core.strategies import CoupledWithOldLaw, FixedLaw, KeepIfLikely, lock_step
from core.toy_model import ToyModel

from sjd_vllm.core import FirstGuess, Redraft, get_first_guess, get_redraft, verify

VISIBLE = 1e-3


def bias(redraft: Redraft, first_guess: FirstGuess) -> float:
    model = ToyModel.random(1, num_tokens=6)
    joint = emitted_joint(model, width=3, redraft=redraft, first_guess=first_guess)
    return total_variation(joint, model.joint())


@pytest.mark.parametrize("first_guess", ["uniform", "left_probs"])
def test_old_law_stored_with_a_kept_token(first_guess: str) -> None:
    assert bias(CoupledWithOldLaw(), get_first_guess(first_guess)) > VISIBLE


@pytest.mark.parametrize("first_guess", ["uniform", "left_probs"])
def test_old_law_stored_after_a_look_at_the_token(first_guess: str) -> None:
    assert bias(KeepIfLikely(), get_first_guess(first_guess)) > VISIBLE


@pytest.mark.parametrize("threshold", [0.8, 0.3, 0.0])
def test_plain_reading_of_threshold_reuse(threshold: float) -> None:
    with pytest.warns(UserWarning, match="does not sample from the model"):
        redraft = get_redraft("reuse_biased", threshold=threshold)
    assert bias(redraft, get_first_guess("uniform")) > VISIBLE
    assert bias(redraft, FixedLaw()) > VISIBLE


def test_skipped_residual(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "residual", lambda target_probs, draft_probs: target_probs)
    assert bias(get_redraft("resample"), FixedLaw()) > VISIBLE


def test_surplus_of_a_lock_step_batch_tested_again() -> None:
    model = ToyModel.random(4, num_tokens=5)
    joint = emitted_joint(
        model,
        width=3,
        redraft=get_redraft("coupled"),
        first_guess=get_first_guess("left_probs"),
        after_step=lock_step(restate_law=False),
    )
    assert total_variation(joint, model.joint()) > VISIBLE
