"""The window by load: as long as drafts pay for the time that they cost, 0 where they do not.

A longer window takes fewer steps to a picture and more time a step. On idle hardware a step costs much the same for 2
tokens as for 100; under load every token costs. The controller knows neither hardware nor model: it fits the time of a
step to the rows and tokens in it, and the tokens gained to the window, both from the steps just taken, and picks the
window that yields the most tokens per second. All pictures of a step have the same window, so that is also the one that
finishes each of them soonest.

It serves requests under fixed noise only, whose tokens do not depend on windows.
"""

from __future__ import annotations

import numpy as np

# Drafts gained by a window of w, relative to an endless one: w / (w + HALF). From the forwards per picture of the demo
# model by window (benchmarks/results/forwards.csv).
_HALF_WINDOW = 17.0
_CANDIDATES = (0, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_MEMORY = 0.99  # weight of a step's figures after each later step
_NUM_WARM_UP = 4  # the first steps of a process are slow
_NUM_TRUSTED = 12  # steps before which the longest window is used
_PROBE_EVERY = 24  # steps between two with a neighbouring window, without which rows and tokens always grow together
_OUTLIER = 3.0  # a step that took so many times the expected time says nothing about the next one


class WindowController:
    """Chooses the window of the next step.

    Args:
        longest: the longest window, 0..128.
    """

    def __init__(self, longest: int) -> None:
        self._candidates = [window for window in _CANDIDATES if window < longest] + [longest]
        self._num_steps = 0
        # weighted sums of the least squares of seconds = cost @ (1, rows, tokens), each step relative to its seconds
        self._products = np.zeros((3, 3))
        self._rates = np.zeros(3)
        self._cost = np.zeros(3)
        # drafts accepted, and those that an acceptance of 1 would have had accepted
        self._accepted = 0.0
        self._possible = 0.0
        self.window = longest

    def observe_step(self, num_rows: int, num_tokens: int, seconds: float) -> None:
        """A step of so many rows and tokens took so long, from its start to the start of the next one."""
        self._num_steps += 1
        features = np.array([1.0, num_rows, num_tokens])
        if self._num_steps <= _NUM_WARM_UP or seconds <= 0:
            return
        if self._num_steps > _NUM_TRUSTED and seconds > _OUTLIER * float(self._cost @ features) > 0:
            seconds = _OUTLIER * float(self._cost @ features)
        relative = features / seconds
        self._products = _MEMORY * self._products + np.outer(relative, relative)
        self._rates = _MEMORY * self._rates + relative
        self._cost = self._fitted()

    def observe_acceptance(self, window: int, num_accepted: int) -> None:
        """A request had so many of its `window` drafts accepted."""
        self._accepted = _MEMORY * self._accepted + num_accepted
        self._possible = _MEMORY * self._possible + _gain(window)

    def choose(self, num_rows: int, num_pictures: int, other_rows: int, other_tokens: int) -> int:
        """The window for the next step.

        num_rows: rows of the pictures that take the window, both halves counted; num_pictures: how many these are.
        other_rows, other_tokens: of everything else in the step.
        """
        if not num_pictures or self._num_steps <= _NUM_TRUSTED or not self._possible:
            self.window = self._candidates[-1]
            return self.window
        windows = np.array(self._candidates, dtype=float)
        seconds = (
            self._cost[0]
            + self._cost[1] * (num_rows + other_rows)
            + self._cost[2] * (num_rows * (1 + windows) + other_tokens)
        )
        tokens = 1 + self._accepted / self._possible * _gain(windows)
        best = int(np.argmax(tokens / seconds))
        probe = self._num_steps % (2 * _PROBE_EVERY)
        if probe == 0:
            best = max(best - 1, 0)
        elif probe == _PROBE_EVERY:
            best = min(best + 1, len(windows) - 1)
        self.window = self._candidates[best]
        return self.window

    def _fitted(self) -> np.ndarray:
        """Seconds for a step, a row and a token, none below 0."""
        scale = 1 / np.sqrt(np.diag(self._products).clip(min=1e-30))
        scaled = self._products * np.outer(scale, scale) + 1e-6 * np.eye(3)
        free = np.ones(3, dtype=bool)
        cost = np.zeros(3)
        while free.any():
            cost = np.zeros(3)
            cost[free] = np.linalg.solve(scaled[np.ix_(free, free)], (self._rates * scale)[free])
            if (cost >= 0).all():
                break
            free &= cost > 0
        return cost * scale


def _gain(window: np.ndarray | float) -> np.ndarray | float:
    return window / (window + _HALF_WINDOW)
