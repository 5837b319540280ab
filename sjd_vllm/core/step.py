"""One step of speculative Jacobi decoding: verify, correct, redraft, carry, first guess.

Teng et al., arXiv 2410.01699. One forward pass of the target model scores a window of drafts; the step emits
the accepted prefix and one more token, and turns what is left of the window into better drafts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from .first_guess import FirstGuess, uniform_over_legal
from .randomness import Randomness
from .redraft import Redraft
from .verify import correct, count_accepted
from .window import Context, DraftWindow, History, take_rows


@dataclass(frozen=True)
class StepResult:
    """What a step emits, and what the next one starts from."""

    tokens: Tensor  # [R, W+1] long: emitted tokens, -1 beyond num_emitted
    num_accepted: Tensor  # [R] long: drafts accepted, 0..lengths
    num_emitted: Tensor  # [R] long: num_accepted + 1
    window: DraftWindow  # [R, N]: the next drafts, for the position after the last emitted token
    context: Context  # [R, H]: the positions before the next window


def jacobi_step(
    target_probs: Tensor,
    window: DraftWindow,
    *,
    positions: Tensor,
    next_lengths: Tensor,
    next_width: int,
    legal_at: Callable[[Tensor], Tensor | None] | None = None,
    context: Context | None = None,
    row_stride: int | None = None,
    redraft: Redraft,
    first_guess: FirstGuess,
    randomness: Randomness,
) -> StepResult:
    """Emit num_accepted + 1 tokens a request and prepare its next window. Never synchronises with the host.

    target_probs [R, W+1, V]: row j is p at slot j, given the committed tokens and the drafts left of j; rows
        0..window.lengths are read. A row without mass (no legal column) emits -1, which is no token.
    positions [R] long: absolute position of slot 0.
    next_lengths [R] long, 0..next_width: drafts wanted in the next window. It may depend on load and on past
        acceptance, never on the drafts. What the end of the image forbids is cut by `DraftWindow.truncated`.
    legal_at: positions [R, N] -> legal columns bool [R, N, V], or None where all are; read for first guesses.
    context: the `first_guess.num_context_slots(row_stride)` positions before slot 0, or None for none.
    row_stride: tokens of an image row, end-of-line included, for the guesses that look above.

    Raises ValueError where shapes do not fit together.
    """
    context = Context.empty(len(positions), device=positions.device) if context is None else context
    _check_shapes(target_probs, window, positions, next_lengths, next_width, context, first_guess)
    slots = torch.arange(window.width + 1, device=positions.device)
    next_slots = torch.arange(next_width, device=positions.device)
    slot_positions = positions[:, None] + slots

    # verify, correct
    num_accepted = count_accepted(target_probs, window, positions=slot_positions, randomness=randomness)
    last_token = correct(target_probs, window, num_accepted, positions=slot_positions, randomness=randomness)

    # redraft the slots right of the emitted ones, as far as the next window reaches
    num_emitted = num_accepted + 1
    offset = slots - num_emitted[:, None]
    num_carried = torch.minimum(window.lengths - num_accepted, next_lengths)
    drafts, draft_probs = redraft.refresh(
        window,
        target_probs,
        positions=slot_positions,
        where=(offset >= 0) & (offset < num_carried[:, None]),
        randomness=randomness,
    )
    emitted = torch.where(offset < -1, pad(window.tokens, (0, 1)), last_token[:, None])
    tokens = torch.where(offset < 0, emitted, drafts)

    # carry: old slot num_emitted + i becomes slot i
    is_carried = next_slots < num_carried[:, None]
    old_slots = (num_emitted[:, None] + next_slots).clamp(max=window.width)
    next_positions = (positions + num_emitted)[:, None] + next_slots

    # first guess for the slots that no row of this step has scored
    history = History.of_step(
        context, tokens, draft_probs, positions, num_accepted + num_carried, with_probs=first_guess.needs_probs
    )
    legal = None if legal_at is None else legal_at(next_positions)
    guesses, guess_probs = first_guess.guess(
        history,
        uniform_over_legal(legal, next_positions, like=target_probs),
        positions=next_positions,
        where=~is_carried & (next_slots < next_lengths[:, None]),
        row_stride=row_stride,
        randomness=randomness,
    )
    next_window = DraftWindow(
        tokens=torch.where(is_carried, tokens.gather(1, old_slots), guesses),
        probs=torch.where(is_carried[..., None], take_rows(draft_probs, old_slots), guess_probs),
        lengths=next_lengths,
    )
    return StepResult(
        tokens=emitted.masked_fill(offset >= 0, -1),
        num_accepted=num_accepted,
        num_emitted=num_emitted,
        window=next_window,
        context=history.context_before(positions + num_emitted, context.num_slots),
    )


def _check_shapes(
    target_probs: Tensor,
    window: DraftWindow,
    positions: Tensor,
    next_lengths: Tensor,
    next_width: int,
    context: Context,
    first_guess: FirstGuess,
) -> None:
    num_requests, width = window.tokens.shape
    expected = (num_requests, width + 1, window.probs.shape[-1])
    if target_probs.shape != expected:
        raise ValueError(
            f"target_probs must be [R, W+1, V] = {expected} for this window, got {tuple(target_probs.shape)}"
        )
    if target_probs.dtype != window.probs.dtype:
        raise ValueError(f"target_probs ({target_probs.dtype}) and window.probs ({window.probs.dtype}) must agree")
    for name, tensor in (
        ("positions", positions),
        ("next_lengths", next_lengths),
        ("window.lengths", window.lengths),
        ("context.lengths", context.lengths),
    ):
        if tensor.shape != (num_requests,) or tensor.dtype != torch.long:
            raise ValueError(f"{name} must be int64 [R] = [{num_requests}], got {tensor.dtype} {tuple(tensor.shape)}")
    if next_width < 0:
        raise ValueError(f"next_width must be >= 0, got {next_width}")
    if first_guess.needs_probs and context.num_slots and context.probs is None:
        raise ValueError(
            f"first guess {first_guess.name!r} needs the distributions of the context: keep Context.probs, "
            "or pass an empty context"
        )
