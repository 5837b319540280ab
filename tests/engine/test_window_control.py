"""The window by load, on machines whose cost of a step is known."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from sjd_vllm.engine.window_control import WindowController

Cost = Callable[[int, int], float]
NUM_LAST = 208  # a round of probes
ACCEPTANCE = 5.0  # drafts that an endless window gains


def settled(cost: Cost, num_pictures: int, *, longest: int = 64, acceptance: float = ACCEPTANCE) -> list[int]:
    """The last windows chosen for so many guided pictures on a machine with this cost of (rows, tokens)."""
    controller = WindowController(longest)
    rows = 2 * num_pictures
    chosen = []
    for _ in range(700):
        window = controller.choose(num_rows=rows, num_pictures=num_pictures)
        tokens = rows * (1 + window)
        controller.observe_step(rows, rows * (window > 0), tokens, cost(rows, tokens))
        controller.observe_acceptance([(window, round(acceptance * window / (window + 17)))] if window else [])
        chosen.append(window)
    return chosen[-NUM_LAST:]


def usual(windows: list[int]) -> int:
    return max(set(windows), key=windows.count)


def test_idle_compute_takes_the_longest_window() -> None:
    """A step that costs the same for any number of tokens."""
    assert usual(settled(lambda rows, tokens: 0.02 + 1e-7 * tokens, 1)) == 64


def test_a_token_that_costs_as_much_as_a_step_takes_none() -> None:
    assert usual(settled(lambda rows, tokens: 1e-6 + 0.01 * tokens, 4)) == 0


def test_windows_shrink_with_the_load() -> None:
    def cost(rows: int, tokens: int) -> float:
        return 0.006 + 1e-4 * rows + 1e-4 * tokens

    windows = [usual(settled(cost, num_pictures)) for num_pictures in (1, 8, 64)]
    assert windows == sorted(windows, reverse=True)
    assert windows[0] >= 16 > windows[-1]


def test_what_drafting_costs_whatever_the_window_is_told_from_what_rows_cost() -> None:
    """A row that has drafts at all costs more than its tokens say, and plain steps are rare among the others."""

    def cost(rows: int, tokens: int) -> float:
        return 0.005 + 1e-4 * rows + 6e-4 * rows * (tokens > rows) + 2e-5 * tokens

    def rate(window: int) -> float:
        return (1 + ACCEPTANCE * window / (window + 17)) / cost(128, 128 * (1 + window))

    assert max(rate(window) for window in range(1, 65)) < 0.95 * rate(0)
    assert usual(settled(cost, 64)) == 0


def test_where_pictures_come_and_go_drafts_give_less_than_settled_windows_promise() -> None:
    """Half of the windows are just opened, and give a third; with what the others give, drafts would pay."""
    controller = WindowController(64)
    chosen = []
    for _ in range(2000):
        window = controller.choose(num_rows=64, num_pictures=32)
        tokens = 64 * (1 + window)
        controller.observe_step(64, 64 * (window > 0), tokens, 0.02 + 8e-5 * tokens)
        gain = ACCEPTANCE * window / (window + 17)
        if window:
            controller.observe_acceptance([(window, gain)] * 16, [(window, gain / 3)] * 16)
        else:
            controller.observe_acceptance([])
        chosen.append(window)
    assert usual(chosen[-NUM_LAST:]) == 0
    assert usual(settled(lambda rows, tokens: 0.02 + 8e-5 * tokens, 32)) > 0


@pytest.mark.parametrize("num_pictures", [1, 4, 16, 64])
def test_the_window_is_within_a_hair_of_the_best(num_pictures: int) -> None:
    def cost(rows: int, tokens: int) -> float:
        return 0.005 + 2e-4 * rows + 8e-5 * tokens

    def rate(window: int) -> float:
        rows = 2 * num_pictures
        return (1 + ACCEPTANCE * window / (window + 17)) / cost(rows, rows * (1 + window))

    best = max(rate(window) for window in range(65))
    assert rate(usual(settled(cost, num_pictures))) > 0.93 * best


def test_drafts_that_are_never_accepted_are_not_made() -> None:
    assert usual(settled(lambda rows, tokens: 0.01 + 1e-4 * tokens, 1, acceptance=0.0)) == 0


def test_one_stalled_step_changes_nothing() -> None:
    def cost(rows: int, tokens: int) -> float:
        return 0.006 + 1e-4 * tokens

    steps = iter([1.0] * 650 + [500.0] + [1.0] * 1000)
    calm, stalled = settled(cost, 2), settled(lambda rows, tokens: cost(rows, tokens) * next(steps), 2)
    assert usual(stalled) == usual(calm)


def test_a_window_of_zero_can_be_left_again() -> None:
    """Load goes, and the window comes back."""
    controller = WindowController(64)

    def run(num_pictures: int, steps: int) -> list[int]:
        chosen = []
        for _ in range(steps):
            rows = 2 * num_pictures
            window = controller.choose(num_rows=rows, num_pictures=num_pictures)
            tokens = rows * (1 + window)
            controller.observe_step(rows, rows * (window > 0), tokens, 0.004 + 2e-4 * tokens)
            controller.observe_acceptance([(window, round(ACCEPTANCE * window / (window + 17)))] if window else [])
            chosen.append(window)
        return chosen

    assert usual(run(64, 700)[-NUM_LAST:]) <= 2
    assert usual(run(1, 700)[-NUM_LAST:]) >= 8


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("num_pictures", [1, 8])
def test_noise_costs_little(num_pictures: int, seed: int) -> None:
    """A shared machine: steps vary by a third, and one in ten takes three times as long."""
    noise = np.random.default_rng(seed)

    def quiet(rows: int, tokens: int) -> float:
        return 0.005 + 1e-4 * rows + 6e-5 * tokens

    def cost(rows: int, tokens: int) -> float:
        return quiet(rows, tokens) * float(np.exp(0.3 * noise.normal()) * (3 if noise.random() < 0.1 else 1))

    def rate(window: int) -> float:
        rows = 2 * num_pictures
        return (1 + ACCEPTANCE * window / (window + 17)) / quiet(rows, rows * (1 + window))

    chosen = settled(cost, num_pictures)
    best = max(rate(window) for window in range(65))
    assert sum(map(rate, chosen)) / len(chosen) > 0.88 * best, chosen


def test_plain_decoding_before_does_not_mislead() -> None:
    """Steps without drafts tell nothing of what a draft costs."""
    controller = WindowController(64)
    for _ in range(600):
        controller.observe_step(2, 0, 2, 0.006)
    chosen = []
    for _ in range(200):
        window = controller.choose(num_rows=2, num_pictures=1)
        controller.observe_step(2, 2 * (window > 0), 2 * (1 + window), 0.006 + 1e-5 * 2 * window)
        controller.observe_acceptance([(window, round(ACCEPTANCE * window / (window + 17)))] if window else [])
        chosen.append(window)
    assert usual(chosen[-NUM_LAST:]) == 64


def test_what_a_token_costs_is_learned_on_small_steps() -> None:
    """A busy engine's first steps with drafts must not take seconds."""
    controller = WindowController(64)
    tokens = []
    for _ in range(16):
        window = controller.choose(num_rows=64, num_pictures=32)
        tokens.append(64 * (1 + window))
        controller.observe_step(64, 64 * (window > 0), tokens[-1], 0.01 + 1e-4 * tokens[-1])
    assert max(tokens) <= 256
    assert WindowController(64).choose(num_rows=2, num_pictures=1) == 64


def test_where_drafts_hardly_pay_it_does_not_go_to_and_fro() -> None:
    """Where they bring 8 %, drafts that are there stay, and none are begun: a pause makes them first guesses again."""
    num_pictures, rows = 16, 32
    hardly_pays, too_much = 8e-5, 2e-4  # seconds a token

    def rate(window: int) -> float:
        return (1 + ACCEPTANCE * window / (window + 17)) / (0.01 + hardly_pays * rows * (1 + window))

    assert 1.06 < max(rate(window) for window in range(65)) / rate(0) < 1.1

    def share_of_drafting(seconds_a_token: list[float]) -> float:
        controller = WindowController(64)
        chosen = []
        for per_token in seconds_a_token:
            window = controller.choose(num_rows=rows, num_pictures=num_pictures)
            tokens = rows * (1 + window)
            controller.observe_step(rows, rows * (window > 0), tokens, 0.01 + per_token * tokens)
            # whole drafts, with the right mean over the pictures
            accepted = round(num_pictures * ACCEPTANCE * window / (window + 17))
            counts = [accepted // num_pictures + (n < accepted % num_pictures) for n in range(num_pictures)]
            controller.observe_acceptance([(window, count) for count in counts] if window else [])
            chosen.append(window > 0)
        return sum(chosen[-NUM_LAST:]) / NUM_LAST

    assert share_of_drafting([hardly_pays] * 3000) > 0.9
    assert share_of_drafting([too_much] * 1000 + [hardly_pays] * 3000) < 0.1


def test_a_token_that_has_become_cheap_is_noticed() -> None:
    """With as many pictures as before, and no drafts to measure it by."""
    per_token = iter([2e-4] * 1000 + [5e-6] * 3000)
    controller = WindowController(64)
    chosen = []
    for cost in per_token:
        window = controller.choose(num_rows=32, num_pictures=16)
        controller.observe_step(32, 32 * (window > 0), 32 * (1 + window), 0.01 + cost * 32 * (1 + window))
        controller.observe_acceptance([(window, round(ACCEPTANCE * window / (window + 17)))] if window else [])
        chosen.append(window)
    assert usual(chosen[800:1000]) == 0
    assert usual(chosen[-NUM_LAST:]) >= 16


def test_drafts_that_were_given_up_for_a_wrong_reason_come_back() -> None:
    controller = WindowController(64)
    chosen = []
    for step in range(9000):
        window = controller.choose(num_rows=8, num_pictures=4)
        controller.observe_step(8, 8 * (window > 0), 8 * (1 + window), 0.01 + 1e-4 * 8 * (1 + window))
        gain = 0.1 if step < 1000 else ACCEPTANCE
        # a lone window, as a probe is, tells nothing: its drafts are first guesses
        is_settled = window > 0 and all(chosen[-3:])
        controller.observe_acceptance([(window, round(gain * window / (window + 17)))] if is_settled else [])
        chosen.append(window)
    assert usual(chosen[800:1000]) == 0
    assert usual(chosen[-NUM_LAST:]) >= 8
