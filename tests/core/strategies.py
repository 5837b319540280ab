"""First guesses and refresh rules that only tests use: awkward ones, and biased ones that a proof must reject."""

from __future__ import annotations

import torch
from core.enumeration import AfterStep, States
from torch import Tensor
from torch.nn.functional import pad

from sjd_vllm.core import DraftWindow, History, Purpose, Randomness, Redraft, StepResult
from sjd_vllm.core.first_guess import ParallelGuess
from sjd_vllm.core.verify import accept_drafts, prob_of, residual


class FixedLaw(ParallelGuess):
    """The same lopsided law at every slot, confined to the legal columns."""

    name = "fixed_law"

    def draft_probs(
        self, history: History, uniform_probs: Tensor, *, positions: Tensor, row_stride: int | None
    ) -> Tensor:
        weights = torch.arange(uniform_probs.shape[-1], 0, -1, dtype=uniform_probs.dtype) ** 2
        weights = weights * (uniform_probs > 0)
        return weights / weights.sum(-1, keepdim=True)


def lopsided_guess(prefix: list[int]) -> Tensor:
    """A law of three columns that depends on the whole prefix."""
    return torch.tensor([1.0 + 5 * (sum(prefix) % 3 == column) for column in range(3)]).double().softmax(0)


class CoupledWithOldLaw(Redraft):
    """BIASED: maximal coupling, but a kept token keeps its old q too."""

    name = "coupled_with_old_law"

    def refresh(
        self, window: DraftWindow, target_probs: Tensor, *, positions: Tensor, where: Tensor, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        width = window.width
        has_draft = where[:, :width] & (torch.arange(width) < window.lengths[:, None])
        keep = accept_drafts(
            target_probs,
            window,
            purpose=Purpose.KEEP,
            positions=positions[:, :width],
            where=has_draft,
            randomness=randomness,
        )
        weights = target_probs.clone()
        weights[:, :width] = torch.where(
            has_draft[..., None], residual(target_probs[:, :width], window.probs), target_probs[:, :width]
        )
        return _keep_with_old_law(window, target_probs, weights, keep, positions, where, randomness)


class KeepIfLikely(Redraft):
    """BIASED: keep x with its old q when p(x) > threshold * q(x), else draw from p. The choice looked at x."""

    name = "keep_if_likely"

    def refresh(
        self, window: DraftWindow, target_probs: Tensor, *, positions: Tensor, where: Tensor, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        width = window.width
        has_draft = where[:, :width] & (torch.arange(width) < window.lengths[:, None])
        target_prob = prob_of(window.tokens, target_probs[:, :width])
        keep = has_draft & (target_prob > 0.8 * prob_of(window.tokens, window.probs))
        return _keep_with_old_law(window, target_probs, target_probs, keep, positions, where, randomness)


class KeepAlways(Redraft):
    """Exact: keep every x with its old q. The choice looked at nothing."""

    name = "keep_always"

    def refresh(
        self, window: DraftWindow, target_probs: Tensor, *, positions: Tensor, where: Tensor, randomness: Randomness
    ) -> tuple[Tensor, Tensor]:
        keep = where[:, : window.width] & (torch.arange(window.width) < window.lengths[:, None])
        return _keep_with_old_law(window, target_probs, target_probs, keep, positions, where, randomness)


def _keep_with_old_law(
    window: DraftWindow,
    target_probs: Tensor,
    weights: Tensor,
    keep: Tensor,
    positions: Tensor,
    where: Tensor,
    randomness: Randomness,
) -> tuple[Tensor, Tensor]:
    keep = pad(keep, (0, 1))
    drawn = randomness.draw(weights, purpose=Purpose.REDRAFT, positions=positions, where=where & ~keep)
    old_probs = pad(window.probs, (0, 0, 0, 1))
    return (
        torch.where(keep, pad(window.tokens, (0, 1)), drawn),
        torch.where(keep[..., None], old_probs, target_probs),
    )


def lock_step(*, restate_law: bool) -> AfterStep:
    """A batch that advances by the smallest accepted count, here that of a mate which never accepts anything.

    One token is emitted; the others go back into the window to be tested again. With their old q this is
    BIASED; with q := p, since a tested token is distributed as p, it is exact.
    """

    def after_step(states: States, target_probs: Tensor, result: StepResult) -> StepResult:
        old, new = states.window, result.window
        slots = torch.arange(old.width)
        laws = target_probs
        if not restate_law:
            was_draft = pad(slots < old.lengths[:, None], (0, 1))[..., None]
            laws = torch.where(was_draft, pad(old.probs, (0, 0, 0, 1)), target_probs)
        num_surplus = result.num_accepted  # the emitted tokens but the first
        is_surplus = slots < num_surplus[:, None]
        old_slot = (slots + 1).expand_as(old.tokens)
        new_slot = (slots - num_surplus[:, None]).clamp(min=0)
        window = DraftWindow(
            tokens=torch.where(is_surplus, result.tokens.gather(1, old_slot), new.tokens.gather(1, new_slot)),
            probs=torch.where(is_surplus[..., None], _slots_of(laws, old_slot), _slots_of(new.probs, new_slot)),
            lengths=(num_surplus + new.lengths).clamp(max=old.width),
        )
        one = torch.ones_like(result.num_emitted)
        tokens = result.tokens.masked_fill(torch.arange(old.width + 1) > 0, -1)
        return StepResult(tokens, one - 1, one, window, result.context)

    return after_step


def _slots_of(values: Tensor, slots: Tensor) -> Tensor:
    return values.gather(1, slots[..., None].expand(-1, -1, values.shape[-1]))
