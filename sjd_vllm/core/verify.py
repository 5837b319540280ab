"""Test the drafts from the left and replace the first one that fails (speculative sampling).

Leviathan et al., arXiv 2211.17192, section 2.3: a draft x ~ q is accepted with probability
min(1, p(x)/q(x)); the first refused one is replaced by a draw from norm(max(p - q, 0)). The emitted token is
then distributed exactly as p.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .randomness import Purpose, Randomness
from .window import DraftWindow, take_rows


def prob_of(tokens: Tensor, probs: Tensor) -> Tensor:
    """tokens [R, S], probs [R, S, V] -> the probability of each token [R, S]. Token -1 reads column 0."""
    return probs.gather(-1, tokens.clamp(min=0)[..., None]).squeeze(-1)


def accept_drafts(
    target_probs: Tensor,
    window: DraftWindow,
    *,
    purpose: Purpose,
    positions: Tensor,
    where: Tensor,
    randomness: Randomness,
) -> Tensor:
    """Toss min(1, p(x)/q(x)) for the drafts `where` [R, W] marks -> bool [R, W], False elsewhere.

    target_probs [R, W+1, V]; positions [R, W]. A draft that its own q cannot have produced (q(x) = 0, a slot
    that was never filled) is refused.
    """
    draft_prob = prob_of(window.tokens, window.probs)
    target_prob = prob_of(window.tokens, target_probs[:, : window.width])
    where = where & (draft_prob > 0)
    return randomness.accept(target_prob, draft_prob, purpose=purpose, positions=positions, where=where) & where


def count_accepted(target_probs: Tensor, window: DraftWindow, *, positions: Tensor, randomness: Randomness) -> Tensor:
    """How many drafts from the left pass the test -> long [R]. positions [R, W+1]."""
    slots = torch.arange(window.width, device=window.tokens.device)
    accepted = accept_drafts(
        target_probs,
        window,
        purpose=Purpose.ACCEPT,
        positions=positions[:, : window.width],
        where=slots < window.lengths[:, None],
        randomness=randomness,
    )
    return accepted.long().cumprod(1).sum(1)


def residual(target_probs: Tensor, draft_probs: Tensor) -> Tensor:
    """max(p - q, 0), unnormalised, [..., V]; p itself where nothing is left (p and q equal up to rounding)."""
    rest = torch.sub(target_probs, draft_probs).clamp_(min=0)
    has_rest = rest.sum(-1, keepdim=True) > 0
    return torch.where(has_rest, rest, target_probs)


def correct(
    target_probs: Tensor, window: DraftWindow, num_accepted: Tensor, *, positions: Tensor, randomness: Randomness
) -> Tensor:
    """The token after the accepted prefix -> long [R].

    From the residual where a draft was refused; from p itself (the bonus token) where none was left to test.
    positions [R, W+1].
    """
    slot = num_accepted[:, None]
    target = take_rows(target_probs, slot)[:, 0]
    weights = target
    if window.width:
        draft = take_rows(window.probs, slot.clamp(max=window.width - 1))[:, 0]
        refused = (num_accepted < window.lengths)[:, None]
        weights = torch.where(refused, residual(target, draft), target)
    return randomness.draw(
        weights,
        purpose=Purpose.CORRECTION,
        positions=positions.gather(1, slot)[:, 0],
        where=torch.ones_like(num_accepted, dtype=torch.bool),
    )
