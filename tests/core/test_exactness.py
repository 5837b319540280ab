"""The proof: the joint of the emitted tokens equals ordinary sampling, for every rule that rejects drafts by chance."""

from __future__ import annotations

import pytest
import torch
from core.enumeration import emitted_joint, total_variation
from core.strategies import FixedLaw, KeepAlways, lock_step, lopsided_guess
from core.toy_model import ToyModel

from sjd_vllm.core import FirstGuess, Redraft, get_first_guess, get_redraft
from sjd_vllm.core.prefix_guess import PrefixGuess

ROUNDING = 1e-12
ROW_STRIDE = 2

REDRAFTS = {
    "coupled": get_redraft("coupled"),
    "resample": get_redraft("resample"),
    "reuse-0.8": get_redraft("reuse", threshold=0.8),
    "reuse-0.3": get_redraft("reuse", threshold=0.3),
    "keep_always": KeepAlways(),
}
FIRST_GUESSES = {
    **{name: get_first_guess(name) for name in ("uniform", "repeat_left", "repeat_above", "left_probs", "above_probs")},
    "fixed_law": FixedLaw(),
    "function": PrefixGuess(lopsided_guess, 6),
}
DISTRIBUTIONS = {
    "plain": {},
    "guided": {"guidance_scale": 2.5},
    "top_k": {"top_k": 2},
    "guided, cold, top_k": {"guidance_scale": 3.0, "temperature": 0.7, "top_k": 2},
}
# six tokens let a window of two be refilled often enough to meet every kind of neighbour
NUM_TOKENS_OF_WIDTH = {1: 5, 2: 6, 3: 5}


def bias(model: ToyModel, width: int, redraft: Redraft, first_guess: FirstGuess, row_stride: int = ROW_STRIDE) -> float:
    joint = emitted_joint(model, width=width, redraft=redraft, first_guess=first_guess, row_stride=row_stride)
    return total_variation(joint, model.joint())


@pytest.mark.parametrize("first_guess", FIRST_GUESSES)
@pytest.mark.parametrize("redraft", REDRAFTS)
def test_every_rule_is_exact(redraft: str, first_guess: str) -> None:
    for width, num_tokens in NUM_TOKENS_OF_WIDTH.items():
        for kind, processing in DISTRIBUTIONS.items():
            model = ToyModel.random(width, num_tokens=num_tokens, **processing)
            assert bias(model, width, REDRAFTS[redraft], FIRST_GUESSES[first_guess]) < ROUNDING, (width, kind)


@pytest.mark.parametrize("first_guess", [name for name in FIRST_GUESSES if name != "function"])
@pytest.mark.parametrize("redraft", ["coupled", "resample", "reuse-0.8"])
def test_grammar_with_forced_positions_is_exact(redraft: str, first_guess: str) -> None:
    """Rows of two pixels and an end-of-line: columns 0..2 are pixels, column 3 is legal at row ends only."""
    legal = torch.tensor([[True, True, True, False], [True, True, True, False], [False, False, False, True]]).repeat(
        2, 1
    )
    model = ToyModel.random(3, num_columns=4, num_tokens=6, guidance_scale=2.0, legal=legal)
    for width in (2, 3):
        assert bias(model, width, REDRAFTS[redraft], FIRST_GUESSES[first_guess], row_stride=3) < ROUNDING, width


@pytest.mark.parametrize("first_guess", ["uniform", "above_probs"])
@pytest.mark.parametrize("redraft", ["coupled", "reuse-0.8"])
def test_a_window_that_grows_and_shrinks_is_exact(redraft: str, first_guess: str) -> None:
    """By position, so by how much was accepted before: drafts are cut off, made anew, or not made at all."""
    model = ToyModel.random(6, num_tokens=6)
    lengths = torch.tensor([3, 1, 3, 0, 2, 0])
    joint = emitted_joint(
        model,
        width=3,
        redraft=REDRAFTS[redraft],
        first_guess=FIRST_GUESSES[first_guess],
        row_stride=ROW_STRIDE,
        window_at=lambda positions: lengths[positions],
    )
    assert total_variation(joint, model.joint()) < ROUNDING


def test_surplus_of_a_lock_step_batch_is_exact_when_its_law_is_restated() -> None:
    model = ToyModel.random(4, num_tokens=5)
    joint = emitted_joint(
        model,
        width=3,
        redraft=get_redraft("coupled"),
        first_guess=get_first_guess("left_probs"),
        after_step=lock_step(restate_law=True),
    )
    assert total_variation(joint, model.joint()) < ROUNDING
