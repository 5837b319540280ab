"""The window by load: as long as drafts pay for the time that they cost, 0 where they do not.

A longer window takes fewer steps to a picture and more time a step. On idle hardware a step costs much the same for 2
tokens as for 100; under load every token costs. The controller knows neither hardware nor model: it fits the time of a
step to the rows, the rows with drafts and the tokens in it, and the tokens gained to the window, both from the steps
just taken, and picks the window that yields the most tokens per second. All pictures of a step have the same window, so
that is also the one that finishes each of them soonest.

It serves requests under fixed noise only, whose tokens do not depend on windows.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

# Drafts gained by a window of w, relative to an endless one: w / (w + HALF). From the forwards per picture of the demo
# model by window (benchmarks/results/forwards.csv).
_HALF_WINDOW = 17.0
# What an endless window gains as long as nothing was measured, and for how many full windows' worth this counts.
_PRIOR_GAIN, _PRIOR_WEIGHT = 5.0, 4.0
_CANDIDATES = (0, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
_MEMORY = 0.995  # weight of a step's figures after each later step
# Weight of what was measured after a step that tells nothing of drafts, mostly because none were taken: it gives way to
# the prior, slowly, so that drafts given up for a wrong reason come back.
_FADING = 0.9995
# Steps with drafts in a row after which what all of them give is compared with what settled windows promise, and for
# how many accepted drafts it counts that the two were equal.
_NUM_UNTIL_STEADY, _PROMISE_WEIGHT = 32, 20.0
# Added to the scaled least squares, for a step, a row, a row with drafts, a token. Few steps tell rows from rows with
# drafts, so noise in these few must not decide.
_RIDGE = (1e-6, 1e-6, 5e-3, 1e-6)
_NUM_WARM_UP = 4  # the first steps of a process are slow
# Steps with drafts before which the cost of a step is unknown. They have this many tokens at most, or half as many, but
# two drafts a row at least every second time, to learn what tokens cost and not to be slow where they cost much. Every
# fourth step then has no drafts, to tell what rows cost from what drafting costs.
_NUM_TRUSTED, _TRIAL_TOKENS = 12, 256
# Every so many steps one has another window, all candidates in turn: rows and tokens must not always grow together. Not
# those that would take so many times the best one's time, but the shortest always: what a token was thought to cost may
# be wrong by now, and without drafts nothing else would tell.
_PROBE_EVERY, _PROBE_LIMIT = 16, 1.5
# How much faster than none a window must look for drafts to be taken up, and to be kept. What is fitted is this far off
# at times, where drafts hardly pay a wrong guess costs more than a right one brings, and the first windows after a
# pause are guesses, so it must not go to and fro.
_MARGIN_TO_BEGIN, _MARGIN_TO_STAY = 1.15, 1.02


class WindowController:
    """Chooses the window of the next step.

    Args:
        longest: the longest window, 0..128.
    """

    def __init__(self, longest: int) -> None:
        self._candidates = np.array([window for window in _CANDIDATES if window < longest] + [longest])
        self._num_steps = 0
        self._num_drafting = 0  # steps with drafts so far
        self._is_drafting = True
        # weighted sums of the least squares of seconds = cost @ (1, rows, rows with drafts, tokens), each step
        # relative to its seconds, so that a stalled step, which says nothing about the next one, hardly counts
        self._products = np.zeros((4, 4))
        self._rates = np.zeros(4)
        # drafts accepted, and what a gain of 1 would have had accepted
        self._accepted = _PRIOR_GAIN * _PRIOR_WEIGHT
        self._possible = _PRIOR_WEIGHT
        # drafts accepted of all windows, settled or not, and what the settled ones' gain had promised
        self._got = self._promised = _PROMISE_WEIGHT
        self._num_in_a_row = 0
        self.window = longest

    def observe_step(self, num_rows: int, num_drafting: int, num_tokens: int, seconds: float) -> None:
        """A step of so many rows, rows with drafts and tokens took so long, from its start to the start of the next."""
        self._num_steps += 1
        if self._num_steps <= _NUM_WARM_UP or seconds <= 0:
            return
        self._num_drafting += num_drafting > 0
        relative = np.array([1.0, num_rows, num_drafting, num_tokens]) / seconds
        self._products = _MEMORY * self._products + np.outer(relative, relative)
        self._rates = _MEMORY * self._rates + relative

    def observe_acceptance(
        self, settled: Sequence[tuple[int, float]], others: Sequence[tuple[int, float]] = ()
    ) -> None:
        """What became of a step's drafts: (length of the window, drafts accepted) of each request that had any.

        settled: those whose drafts all had come in at the window's end. The drafts of a window just opened are first
        guesses, and say nothing about what it will give.
        others: the rest. Where pictures come and go there are always some, and less is accepted than could be.
        """
        if settled:
            windows, accepted = np.array(settled).T
            # all requests of a step are one measurement: they may have begun together, and be at the same hard place
            self._accepted = _MEMORY * self._accepted + accepted.mean()
            self._possible = _MEMORY * self._possible + _gain(windows).mean()
        else:
            self._accepted += (1 - _FADING) * (_PRIOR_GAIN * _PRIOR_WEIGHT - self._accepted)
            self._possible += (1 - _FADING) * (_PRIOR_WEIGHT - self._possible)
        drafts = [*settled, *others]
        self._num_in_a_row = self._num_in_a_row + 1 if drafts else 0
        if self._num_in_a_row > _NUM_UNTIL_STEADY:
            windows, accepted = np.array(drafts).T
            self._got = _MEMORY * self._got + accepted.mean()
            self._promised = _MEMORY * self._promised + self._accepted / self._possible * _gain(windows).mean()
        elif not drafts:
            self._got += (1 - _FADING) * (_PROMISE_WEIGHT - self._got)
            self._promised += (1 - _FADING) * (_PROMISE_WEIGHT - self._promised)

    def choose(
        self, num_rows: int, num_pictures: int, *, other_rows: int = 0, other_drafting: int = 0, other_tokens: int = 0
    ) -> int:
        """The window for the next step.

        num_rows: rows of the pictures that take the window, both halves counted; num_pictures: how many these are.
        other_rows, other_drafting, other_tokens: of everything else in the step.
        """
        best = len(self._candidates) - 1
        if num_pictures and self._num_drafting < _NUM_TRUSTED:
            is_odd = self._num_steps % 2
            fitting = int((num_rows * (1 + self._candidates) <= _TRIAL_TOKENS >> is_odd).sum()) - 1
            best = max(fitting, 0 if is_odd else min(best, 1)) if self._num_steps % 4 < 3 else 0
        elif num_pictures:
            fixed, per_row, per_drafting, per_token = self._fitted()
            drafting = num_rows * (self._candidates > 0) + other_drafting
            tokens = num_rows * (1 + self._candidates) + other_tokens
            seconds = fixed + per_row * (num_rows + other_rows) + per_drafting * drafting + per_token * tokens
            gain = self._accepted / self._possible * self._got / self._promised
            rates = (1 + gain * _gain(self._candidates)) / seconds
            best = int(np.argmax(rates))
            margin = _MARGIN_TO_STAY if self._is_drafting else _MARGIN_TO_BEGIN
            if rates[best] < margin * rates[0]:
                best = 0
            self._is_drafting = best > 0
            if self._num_steps % _PROBE_EVERY == 0:
                probe = self._num_steps // _PROBE_EVERY % len(self._candidates)
                if probe == 1 or seconds[probe] <= _PROBE_LIMIT * seconds[best]:
                    best = probe
        self.window = int(self._candidates[best])
        return self.window

    def _fitted(self) -> np.ndarray:
        """Seconds for a step, a row, a row with drafts (more than without) and a token, none below 0."""
        scale = 1 / np.sqrt(np.diag(self._products).clip(min=1e-30))
        scaled = self._products * np.outer(scale, scale) + np.diag(_RIDGE)
        free = np.ones(len(scale), dtype=bool)
        cost = np.zeros(len(scale))
        while free.any():
            cost = np.zeros(len(scale))
            cost[free] = np.linalg.solve(scaled[np.ix_(free, free)], (self._rates * scale)[free])
            if (cost >= 0).all():
                break
            free &= cost > 0
        return cost * scale


def _gain(window: np.ndarray | float) -> np.ndarray | float:
    return window / (window + _HALF_WINDOW)
