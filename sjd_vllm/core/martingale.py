"""The martingale test: is a finished sequence a sample of the model, where no joint can be enumerated?

Teacher-force the finished tokens through the model and the same `process_target`. If each token was drawn
from its row p, then for any score f that is fixed before the token, f(x) - E_p[f] has mean 0 and variance
Var_p[f] given everything left of it, so the sum over all tokens divided by the root of the summed variances
is about standard normal.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 4096  # rows at a time, so that the float64 copies stay small
_NO_VARIANCE = 1e-12


@dataclass(frozen=True)
class MartingaleSum:
    """One statistic summed over tokens; sums of several batches add up.

    Attributes:
        excess: sum of f(x) - E_p[f].
        variance: sum of Var_p[f].
        num_tokens: how many tokens were summed, those that could not vary included.
    """

    excess: float
    variance: float
    num_tokens: int

    def __add__(self, other: MartingaleSum) -> MartingaleSum:
        return MartingaleSum(
            self.excess + other.excess, self.variance + other.variance, self.num_tokens + other.num_tokens
        )

    @property
    def z_score(self) -> float:
        """About N(0, 1) if exact; the excess itself where nothing could vary."""
        return self.excess / math.sqrt(self.variance) if self.variance > _NO_VARIANCE else self.excess

    def smallest_visible_bias(self, limit: float, power_quantile: float) -> float:
        """The bias of a token's mean E[f] that would have passed the limit with some probability.

        limit: of |z|. power_quantile: the standard normal quantile of that probability, 1.2816 for 90 %.
        """
        return (limit + power_quantile) * math.sqrt(self.variance) / self.num_tokens


def martingale_z_scores(target_probs: Tensor, tokens: Tensor, groups: Tensor | None = None) -> dict[str, float]:
    """z-scores of several statistics of `tokens` against their distributions; about N(0, 1) each if exact.

    target_probs [N, V]: processed distribution of each token given the tokens before it.
    tokens [N] long. groups [N] long: which sequence each token belongs to, tokens of a sequence in order;
    None: one sequence.

    Returned statistics (a bias shows in some and not in others, with either sign):
        surprisal    -log p(x), against the entropy of p
        top1         x is the most likely token
        probability  p(x), against the sum of p^2
        rank         mass above x plus half the mass equal to it, against 1/2
        repeat       x repeats the token before it in its sequence
    >>> coin = torch.tensor([[0.5, 0.5]]).expand(100, 2)
    >>> z_scores = martingale_z_scores(coin, torch.arange(100) % 4 // 3)  # a quarter ones
    >>> round(z_scores["top1"], 1)  # the first column is the most likely one
    5.0

    A token with p(x) = 0 makes surprisal infinite. A statistic that cannot vary (one-hot rows) gives 0.
    Raises ValueError where shapes do not fit.
    """
    return {name: total.z_score for name, total in martingale_sums(target_probs, tokens, groups).items()}


def martingale_sums(target_probs: Tensor, tokens: Tensor, groups: Tensor | None = None) -> dict[str, MartingaleSum]:
    """The sums behind `martingale_z_scores`, with the same arguments, so that pictures can be taken one by one."""
    if target_probs.dim() != 2 or tokens.shape != target_probs.shape[:1]:
        raise ValueError(
            f"need target_probs [N, V] and tokens [N], got {tuple(target_probs.shape)} and {tuple(tokens.shape)}"
        )
    if groups is not None and groups.shape != tokens.shape:
        raise ValueError(f"groups must be [N] like tokens, got {tuple(groups.shape)} for {tuple(tokens.shape)}")
    previous = _previous_in_group(tokens, groups)
    sums = {}
    for name, score in _SCORES.items():
        excess, variance = 0.0, 0.0
        for start in range(0, len(tokens), _CHUNK):
            rows = slice(start, start + _CHUNK)
            probs = target_probs[rows].double()
            probs = probs / probs.sum(-1, keepdim=True)
            values = score(probs, previous[rows])
            observed = values.gather(-1, tokens[rows, None])[:, 0]
            mean = torch.where(probs > 0, probs * values, 0).sum(-1)
            deviation = values - mean[:, None]
            excess += float((observed - mean).sum())
            variance += float(torch.where(probs > 0, probs * deviation**2, 0).sum())
        sums[name] = MartingaleSum(excess, variance, len(tokens))
    return sums


def _previous_in_group(tokens: Tensor, groups: Tensor | None) -> Tensor:
    """The token before each token of the same sequence; -1 at its start."""
    previous = torch.full_like(tokens, -1)
    groups = torch.zeros_like(tokens) if groups is None else groups
    order = groups.argsort(stable=True)
    sorted_tokens, sorted_groups = tokens[order], groups[order]
    continues = sorted_groups[1:] == sorted_groups[:-1]
    previous[order[1:]] = torch.where(continues, sorted_tokens[:-1], -1)
    return previous


def _surprisal(probs: Tensor, previous: Tensor) -> Tensor:
    return -probs.log()


def _top1(probs: Tensor, previous: Tensor) -> Tensor:
    return torch.zeros_like(probs).scatter_(-1, probs.argmax(-1, keepdim=True), 1)


def _probability(probs: Tensor, previous: Tensor) -> Tensor:
    return probs


def _rank(probs: Tensor, previous: Tensor) -> Tensor:
    # in falling order: the mass before the first column of a run of equals, and the mass up to its last
    ranked, order = probs.sort(-1, descending=True)
    up_to = ranked.cumsum(-1)
    rising = ranked.neg().contiguous()
    first = torch.searchsorted(rising, rising)
    last = torch.searchsorted(rising, rising, right=True) - 1
    middle = (up_to.gather(-1, first) - ranked + up_to.gather(-1, last)) / 2
    return torch.empty_like(probs).scatter_(-1, order, middle)


def _repeat(probs: Tensor, previous: Tensor) -> Tensor:
    has_previous = (previous >= 0)[:, None].to(probs.dtype)
    return torch.zeros_like(probs).scatter_(-1, previous.clamp(min=0)[:, None], has_previous)


_SCORES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "surprisal": _surprisal,
    "top1": _top1,
    "probability": _probability,
    "rank": _rank,
    "repeat": _repeat,
}
