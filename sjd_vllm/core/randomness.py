"""Random choices as an interface, and the counter-based noise behind it in production.

A strategy never draws a number itself: it asks a `Randomness` to accept or to draw. That makes the noise a
pure function of (request seed, absolute position, iteration, purpose), so that a result depends neither on
the batch nor on the rank that computes it, and it lets the tests replace chance by enumeration.
"""

from __future__ import annotations

from enum import IntEnum
from typing import Protocol

import torch
from torch import Tensor


class Purpose(IntEnum):
    """What a random number is used for; each purpose has an independent stream."""

    ACCEPT = 0  # the test of a draft
    CORRECTION = 1  # the token in place of the first refused draft, or the bonus token
    KEEP = 2  # whether a refresh keeps an uncommitted draft
    REDRAFT = 3  # a fresh draw for an uncommitted slot
    FIRST_GUESS = 4  # the first draft of a new slot


class Randomness(Protocol):
    """The random choices of a step. `where` (bool) marks the results that will be used."""

    def accept(self, target: Tensor, draft: Tensor, *, purpose: Purpose, positions: Tensor, where: Tensor) -> Tensor:
        """True with probability min(1, target / draft). All tensors share one shape, [R, S]."""

    def draw(self, weights: Tensor, *, purpose: Purpose, positions: Tensor, where: Tensor) -> Tensor:
        """One column for each row of non-negative `weights` [..., V], in proportion to them -> long [...].

        A row without mass (or with NaN) gives -1, which is no token.
        """


class CounterNoise:
    """Noise that is a hash of what it is for; nothing is stored and nothing advances.

    seeds, iterations: long [R]. `iterations` counts the steps of each request, so that a position that is
    looked at again gets fresh noise; a request must not take two steps under one number.

    The hash is SplitMix64's output function (Steele, Lea, Flood 2014, in Stafford's variant 13) over wrapping
    int64 arithmetic, which is the same on every device.
    """

    def __init__(self, seeds: Tensor, iterations: Tensor) -> None:
        if seeds.dtype != torch.long or iterations.dtype != torch.long:
            raise ValueError(f"seeds and iterations must be int64, got {seeds.dtype} and {iterations.dtype}")
        if seeds.shape != iterations.shape or seeds.dim() != 1:
            raise ValueError(
                f"seeds and iterations must both be [R], got {tuple(seeds.shape)} and {tuple(iterations.shape)}"
            )
        self._step_key = _mix(_seed_key(seeds) + iterations * _ITERATION_GAMMA)

    def accept(self, target: Tensor, draft: Tensor, *, purpose: Purpose, positions: Tensor, where: Tensor) -> Tensor:
        # u < 1 strictly, so target == draft is always accepted; a product, so nothing is divided by zero
        return self._uniform(purpose, positions, target.dtype) * draft < target

    def draw(self, weights: Tensor, *, purpose: Purpose, positions: Tensor, where: Tensor) -> Tensor:
        if weights.shape[-1] == 0 or positions.numel() == 0:
            return torch.full_like(positions, -1)
        cdf = weights.cumsum(-1)
        total = cdf[..., -1:]
        threshold = self._uniform(purpose, positions, weights.dtype)[..., None] * total
        # rounding may lift u * total to total itself, which would point beyond the last column
        threshold = torch.minimum(threshold, torch.nextafter(total, torch.zeros_like(total)))
        column = torch.searchsorted(cdf, threshold, right=True).clamp_(max=weights.shape[-1] - 1)
        # a device that sums in parallel may give a column of zero weight a width of one rounding error
        heaviest = weights.argmax(-1, keepdim=True)
        column = torch.where(weights.gather(-1, column) > 0, column, heaviest)
        return torch.where(total > 0, column, -1).squeeze(-1)

    def _uniform(self, purpose: Purpose, positions: Tensor, dtype: torch.dtype) -> Tensor:
        counter = positions * len(Purpose) + int(purpose)
        return _to_unit(_mix(_per_request(self._step_key, positions) + counter * _GAMMA), dtype)


def gumbel_noise(seeds: Tensor, positions: Tensor, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Gumbel noise that is fixed for each (seed, position, token) -> [N, V].

    seeds, positions: long [N]. token_ids: long [V], the same in every row, or [N, V].
    """
    key = _mix(_mix(_seed_key(seeds) ^ _GUMBEL_SALT) + positions * _GAMMA)
    u = _to_unit(_mix(key[:, None] + token_ids * _GAMMA), dtype)
    # -log(-log(1 - u)) and not -log(-log(u)): large noise, which wins, comes from small u, where the grain is finest
    return torch.log1p(-u).neg_().clamp_(min=torch.finfo(dtype).tiny).log_().neg_()


def uniform_choice(counts: Tensor, *, seeds: Tensor, positions: Tensor) -> Tensor:
    """An index below each count (>= 1), equally likely, fixed for each (seed, position); all long, of one shape."""
    bits = _mix(_mix(_seed_key(seeds) ^ _FIRST_DRAFT_SALT) + positions * _GAMMA)
    return _shift(bits, 1) % counts


def _seed_key(seeds: Tensor) -> Tensor:
    return _mix(seeds * _GAMMA + _SEED_SALT)


def _wrapped(value: int) -> int:
    """A 64-bit pattern as the signed number that torch's int64 shows for it."""
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _wrapped(0x9E3779B97F4A7C15)
_ITERATION_GAMMA = _wrapped(0xD1B54A32D192ED03)
_SEED_SALT = _wrapped(0x8BB84B93962EACC9)
_GUMBEL_SALT = _wrapped(0x2D358DCCAA6C78A5)
_FIRST_DRAFT_SALT = _wrapped(0xA0761D6478BD642F)
_MIX_1 = _wrapped(0xBF58476D1CE4E5B9)
_MIX_2 = _wrapped(0x94D049BB133111EB)


def _mix(x: Tensor) -> Tensor:
    """A bijection of the 64-bit integers whose output bits each depend on all input bits. x is not changed."""
    x = _shift(x, 30).bitwise_xor_(x).mul_(_MIX_1)
    x = _shift(x, 27).bitwise_xor_(x).mul_(_MIX_2)
    return _shift(x, 31).bitwise_xor_(x)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift; torch's own is arithmetic."""
    return (x >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _to_unit(bits: Tensor, dtype: torch.dtype) -> Tensor:
    """63 random bits as a number in [0, 1); small numbers keep their full relative precision."""
    u = (bits & ((1 << 63) - 1)).to(dtype).mul_(2.0**-63)
    return u.clamp_(max=1.0 - torch.finfo(dtype).eps / 2)


def _per_request(key: Tensor, positions: Tensor) -> Tensor:
    """key [R] shaped to broadcast over positions [R, ...]."""
    return key.view(-1, *[1] * (positions.dim() - 1))
