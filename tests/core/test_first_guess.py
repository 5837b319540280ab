"""Which neighbour a first guess finds, and what it does where there is none."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sjd_vllm.core import CounterNoise, FirstGuess, History, get_first_guess
from sjd_vllm.core.first_guess import uniform_over_legal

NUM_COLUMNS = 5  # column 4 ends a line
ROW_STRIDE = 4
KNOWN = [0, 1, 2, 4, 3, 0]  # positions 0..5; position 3 ends the first line


def history(num_known: int) -> History:
    tokens = torch.tensor([KNOWN[:num_known]])
    hot = torch.nn.functional.one_hot(tokens, NUM_COLUMNS)
    probs = torch.where(tokens[..., None] == 4, hot, hot * 0.6 + 0.08)
    zero = torch.zeros(1, dtype=torch.long)
    return History(tokens, probs, origin=zero, first=zero, last=zero + num_known - 1)


def legal(positions: Tensor) -> Tensor:
    is_end = (positions % ROW_STRIDE == ROW_STRIDE - 1)[..., None]
    return (torch.arange(NUM_COLUMNS) == 4) == is_end


def laws(guess: FirstGuess, num_known: int, positions: list[int], row_stride: int | None = ROW_STRIDE) -> Tensor:
    where = torch.tensor([positions])
    uniform = uniform_over_legal(legal(where), where, like=torch.zeros(NUM_COLUMNS))
    tokens, probs = guess.guess(
        history(num_known),
        uniform,
        positions=where,
        where=torch.ones_like(where, dtype=torch.bool),
        row_stride=row_stride,
        randomness=CounterNoise(torch.tensor([0]), torch.tensor([0])),
    )
    assert (probs.gather(-1, tokens[..., None]) > 0).all()
    return probs[0]


def one_hot(token: int) -> list[float]:
    return [float(column == token) for column in range(NUM_COLUMNS)]


QUARTERS = [0.25, 0.25, 0.25, 0.25, 0.0]


@pytest.mark.parametrize("name", ["uniform", "repeat_left", "repeat_above", "left_probs", "above_probs"])
def test_a_forced_position_drafts_the_forced_token(name: str) -> None:
    assert laws(get_first_guess(name), 6, [7])[0].tolist() == one_hot(4)


def test_left_skips_an_end_of_line() -> None:
    guess = get_first_guess("repeat_left")
    assert laws(guess, 3, [4])[0].tolist() == one_hot(2)
    assert laws(guess, 4, [4])[0].tolist() == one_hot(2), "position 3 ends the line, position 2 is a pixel"
    assert laws(guess, 4, [4, 5, 6])[2].tolist() == one_hot(2), "all new slots share one neighbour"


def test_left_probs_is_the_law_behind_the_neighbour_on_the_legal_columns() -> None:
    law = laws(get_first_guess("left_probs"), 4, [4])[0]
    torch.testing.assert_close(law, torch.tensor([0.08, 0.08, 0.68, 0.08, 0.0]) / 0.92)


def test_above_takes_the_token_one_row_up() -> None:
    assert laws(get_first_guess("repeat_above"), 6, [6])[0].tolist() == one_hot(2)
    law = laws(get_first_guess("above_probs"), 4, [5])[0]
    torch.testing.assert_close(law, torch.tensor([0.08, 0.68, 0.08, 0.08, 0.0]) / 0.92)


def test_above_falls_back_to_left_then_to_uniform() -> None:
    for name in ("repeat_above", "above_probs"):
        guess, left = get_first_guess(name), get_first_guess(name.replace("above", "left"))
        assert torch.equal(laws(guess, 3, [8]), laws(left, 3, [8])), "position 4 is not known yet"
        assert torch.equal(laws(guess, 6, [6], row_stride=None), laws(left, 6, [6])), "no rows at all"
        assert torch.equal(laws(guess, 6, [9], row_stride=6), laws(left, 6, [9])), "an end-of-line above a pixel"


def test_nothing_usable_is_uniform() -> None:
    only_line_end = History(
        torch.tensor([[4]]),
        torch.tensor([[one_hot(4)]]),
        *(torch.tensor([3]) for _ in range(3)),
    )
    where = torch.tensor([[4]])
    uniform = uniform_over_legal(legal(where), where, like=torch.zeros(NUM_COLUMNS))
    for name in ("repeat_left", "repeat_above", "left_probs", "above_probs"):
        law = get_first_guess(name).draft_probs(only_line_end, uniform, positions=where, row_stride=1)
        assert law[0, 0].tolist() == QUARTERS


@pytest.mark.parametrize(
    ("name", "num_slots", "needs_probs"),
    [
        ("uniform", 0, False),
        ("repeat_left", 1, False),
        ("left_probs", 1, True),
        ("repeat_above", ROW_STRIDE - 1, False),
        ("above_probs", ROW_STRIDE - 1, True),
    ],
)
def test_a_guess_asks_for_no_more_context_than_it_reads(name: str, num_slots: int, needs_probs: bool) -> None:
    guess = get_first_guess(name)
    assert guess.num_context_slots(ROW_STRIDE) == num_slots
    assert guess.num_context_slots(None) == min(num_slots, 1)
    assert guess.needs_probs == needs_probs


def test_no_legal_column_has_no_law() -> None:
    nothing = torch.zeros(1, 1, NUM_COLUMNS, dtype=torch.bool)
    assert not uniform_over_legal(nothing, torch.zeros(1, 1), like=torch.zeros(NUM_COLUMNS)).any()
