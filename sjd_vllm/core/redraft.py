"""Refresh the drafts that were not tested far enough: one strategy, one law.

Given everything left of a slot, its new draft must be distributed as the q' that is stored with it, and q'
must not look at the draft. Each strategy here states its q'; docs/exactness.md has the proofs, and the tests
enumerate them.
"""

from __future__ import annotations

import difflib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad

from .randomness import Purpose, Randomness
from .verify import accept_drafts, prob_of, residual
from .window import DraftWindow, take_rows


class Redraft(ABC):
    """How the slots right of the last emitted token get their next draft."""

    name: ClassVar[str]

    @abstractmethod
    def refresh(
        self, window: DraftWindow, target_probs: Tensor, *, positions: Tensor, where: Tensor, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        """New drafts of the slots that `where` [R, W+1] marks.

        target_probs [R, W+1, V]; positions [R, W+1]. Slots below `window.lengths` hold a draft x with its q;
        the slot at `lengths` holds none yet and is drawn from p. Returns tokens [R, W+1] and their true
        distributions q' [R, W+1, V]; what they hold outside `where` is not used, except that q' there must
        be p.
        """


class Resample(Redraft):
    """Draw every draft anew from p; q' = p. Plain speculative Jacobi decoding (arXiv 2410.01699)."""

    name = "resample"

    def refresh(
        self, window: DraftWindow, target_probs: Tensor, *, positions: Tensor, where: Tensor, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        drawn = randomness.draw(target_probs, purpose=Purpose.REDRAFT, positions=positions, where=where)
        return drawn, target_probs


class Coupled(Redraft):
    """Maximal coupling: keep x with probability min(1, p(x)/q(x)), else draw from the residual; q' = p.

    The result is distributed as p whether or not x was kept, so p is stored in BOTH cases. It keeps the
    draft with probability 1 - TV(p, q), the most that any exact refresh to p can (arXiv 2510.24211).
    """

    name = "coupled"

    def refresh(
        self, window: DraftWindow, target_probs: Tensor, *, positions: Tensor, where: Tensor, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        width = window.width
        keep = accept_drafts(
            target_probs,
            window,
            purpose=Purpose.KEEP,
            positions=positions[:, :width],
            where=where[:, :width] & _has_draft(window),
            randomness=randomness,
        )
        keep = pad(keep, (0, 1))
        drawn = randomness.draw(
            _residuals(target_probs, window), purpose=Purpose.REDRAFT, positions=positions, where=where & ~keep
        )
        return torch.where(keep, pad(window.tokens, (0, 1)), drawn), target_probs


class Reuse(Redraft):
    """Keep x when p(x) > threshold * q(x), else draw from p (SJD++, arXiv 2512.07503), made exact.

    Whether x is kept depends on x, so the result is NOT distributed as p. Its true law is stored instead:

        q'(y) = q(y) * 1[p(y) > threshold * q(y)] + Pr_{x~q}[p(x) <= threshold * q(x)] * p(y)
    """

    name = "reuse"

    def __init__(self, threshold: float = 0.8) -> None:
        if not (math.isfinite(threshold) and threshold >= 0):
            raise ValueError(f"threshold must be a finite number >= 0 (a ratio p(x)/q(x)), got {threshold!r}")
        self.threshold = threshold

    def refresh(
        self, window: DraftWindow, target_probs: Tensor, *, positions: Tensor, where: Tensor, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        width = window.width
        has_draft = where[:, :width] & _has_draft(window)
        target_prob = prob_of(window.tokens, target_probs[:, :width])
        keep = has_draft & (target_prob > self.threshold * prob_of(window.tokens, window.probs))
        keep = pad(keep, (0, 1))
        drawn = randomness.draw(target_probs, purpose=Purpose.REDRAFT, positions=positions, where=where & ~keep)
        tokens = torch.where(keep, pad(window.tokens, (0, 1)), drawn)
        return tokens, self._law(window, target_probs, has_draft)

    def _law(self, window: DraftWindow, target_probs: Tensor, has_draft: Tensor) -> Tensor:
        target, draft = target_probs[:, : window.width], window.probs
        is_kept = target > self.threshold * draft
        redrawn_mass = draft.masked_fill(is_kept, 0).sum(-1, keepdim=True)
        law = draft.masked_fill(~is_kept, 0).addcmul_(redrawn_mass, target)
        return torch.cat([torch.where(has_draft[..., None], law, target), target_probs[:, window.width :]], dim=1)


class ReuseBiased(Reuse):
    """`Reuse` with q' = p, the plain reading of the paper. BIASED; kept only to compare with it."""

    name = "reuse_biased"

    def __init__(self, threshold: float = 0.8) -> None:
        super().__init__(threshold)
        warnings.warn(
            "redraft 'reuse_biased' does not sample from the model: whether a draft is kept depends on the draft, "
            "yet p is stored as its law. On a toy model the joint distribution is off by a total variation of "
            "about 0.02 (threshold 0.8) to 0.03 (0.3). Use 'coupled', or 'reuse', which stores the true law.",
            UserWarning,
            stacklevel=2,
        )

    def _law(self, window: DraftWindow, target_probs: Tensor, has_draft: Tensor) -> Tensor:
        return target_probs


_REDRAFTS: dict[str, Callable[[float], Redraft]] = {
    Coupled.name: lambda threshold: Coupled(),
    Resample.name: lambda threshold: Resample(),
    Reuse.name: Reuse,
    ReuseBiased.name: ReuseBiased,
}
REDRAFT_NAMES = tuple(_REDRAFTS)


def get_redraft(name: str, threshold: float = 0.8) -> Redraft:
    """The strategy of that name; `threshold` (a ratio p/q) matters to the two `reuse` ones only.

    Raises ValueError for an unknown name.
    """
    if name not in _REDRAFTS:
        raise ValueError(unknown_name("redraft strategy", name, REDRAFT_NAMES))
    return _REDRAFTS[name](threshold)


def unknown_name(what: str, name: str, known: tuple[str, ...]) -> str:
    """An error message that names the nearest known name."""
    nearest = difflib.get_close_matches(str(name), known, n=1, cutoff=0.4)
    hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
    return f"unknown {what} {name!r}{hint} Known: {', '.join(known)}."


def _has_draft(window: DraftWindow) -> Tensor:
    return torch.arange(window.width, device=window.tokens.device) < window.lengths[:, None]


def _residuals(target_probs: Tensor, window: DraftWindow) -> Tensor:
    """Residuals of all slots [R, W+1, V]; the slot at `lengths` has no draft, so its residual is p itself."""
    num_requests, num_rows, num_columns = target_probs.shape
    rest = torch.empty_like(target_probs)
    rest[:, : window.width] = residual(target_probs[:, : window.width], window.probs)
    bonus = window.lengths[:, None]
    flat_index = torch.arange(num_requests, device=bonus.device) * num_rows + window.lengths
    rest.view(-1, num_columns).index_copy_(0, flat_index, take_rows(target_probs, bonus)[:, 0])
    return rest
