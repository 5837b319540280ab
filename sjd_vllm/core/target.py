"""From raw logits to the target distribution: one pipeline for everything that is compared."""

from __future__ import annotations

import torch
from torch import Tensor

COLDEST = 1e-30  # dividing by less overflows float32; nothing but equals shares the mass long before


def process_target(
    logits: Tensor,
    *,
    uncond_logits: Tensor | None = None,
    guidance_scale: Tensor | None = None,
    legal: Tensor | None = None,
    temperature: Tensor | None = None,
    top_k: Tensor | int | None = None,
    top_p: Tensor | None = None,
    max_top_k: int | None = None,
) -> Tensor:
    """Guidance mix, legal mask, temperature, top-k, top-p, renormalise, in that order -> probs [R, S, V].

    logits, uncond_logits: [R, S, V] floating point, any S. The result has their dtype. -inf is a legal logit
        in `logits`; in `uncond_logits` only where `logits` has it too.
    guidance_scale [R]: uncond + scale * (cond - uncond); a row with scale 1 is exactly `logits`.
    legal: bool [R, S, V]. A slot with no legal column gets all zeros: no token can be drawn from it. See
        `validate_legal` for an error instead.
    temperature [R]: 0 puts all mass on the highest logit (the lowest column among equals). None: 1.
    top_k [R] long: exactly so many columns survive, the lowest columns among equals; <= 0 is off. One int for
        all rows gives the same result and is three times as fast as a tensor.
    top_p [R]: the fewest highest columns whose mass reaches top_p (at least one); >= 1 is off.
    max_top_k: an upper bound of the values in top_k that the host knows (rows that are off do not count).
        Without it the bound is read from the tensor, which waits for the device; with it nothing does.

    Each of temperature, top_k and top_p may be None: off for all rows, and then it costs nothing.

    A slot that holds a NaN in a legal column is NaN all over, whatever the settings: no token can be drawn from it.
    """
    if (uncond_logits is None) != (guidance_scale is None):
        raise ValueError("uncond_logits and guidance_scale belong together: give both or neither")
    mixed = logits
    if uncond_logits is not None and guidance_scale is not None:
        mixed = mix_guidance(logits, uncond_logits, guidance_scale[:, None, None].to(logits.dtype))
    if legal is not None:
        mixed = mixed.masked_fill(~legal, -torch.inf)

    scaled = mixed
    is_greedy = None
    if temperature is not None:
        is_greedy = (temperature <= 0)[:, None, None]
        scaled = mixed / temperature.to(mixed.dtype).clamp(min=COLDEST)[:, None, None]
    if top_k is not None or top_p is not None:
        scaled = keep_top(scaled, top_k, top_p, max_top_k)

    probs = scaled.softmax(-1)
    if is_greedy is not None:
        best = mixed.argmax(-1, keepdim=True)  # the first of equals, or of NaN
        elsewhere = torch.zeros_like(best, dtype=probs.dtype).masked_fill_(mixed.gather(-1, best).isnan(), torch.nan)
        probs = torch.where(is_greedy, elsewhere, probs)
        probs.scatter_add_(-1, best, is_greedy.to(probs.dtype).expand_as(best))
    if legal is not None:
        probs = probs.masked_fill_(~legal.any(-1, keepdim=True), 0)
    return probs


def validate_legal(legal: Tensor, lengths: Tensor | None = None) -> None:
    """Raise ValueError if a slot has no legal column. Waits for the device: for set-up code and debugging.

    legal: bool [R, S, V]. lengths [R]: only slots below it are looked at.
    """
    is_empty = ~legal.any(-1)
    if lengths is not None:
        is_empty &= torch.arange(legal.shape[1], device=legal.device) < lengths[:, None]
    if bool(is_empty.any()):
        request, slot = is_empty.nonzero()[0].tolist()
        raise ValueError(
            f"no legal column for request {request} at slot {slot} ({int(is_empty.sum())} such slots in all): a "
            "grammar must leave at least one token at every position up to its end"
        )


def mix_guidance(cond: Tensor, uncond: Tensor, scale: Tensor) -> Tensor:
    """uncond + scale * (cond - uncond); scale [R, ...] broadcasts over the columns, and 1 gives exactly `cond`."""
    # where both models forbid a column, -inf - -inf would be NaN
    return torch.lerp(uncond, cond, scale).masked_fill_(cond == -torch.inf, -torch.inf)


def keep_top(logits: Tensor, top_k: Tensor | int | None, top_p: Tensor | None, max_top_k: int | None) -> Tensor:
    """-inf outside the columns that top-k, then top-p, leave; arguments as in `process_target`.

    Both come down to one count for each slot.
    """
    num_columns = logits.shape[-1]
    if isinstance(top_k, int):
        if not 0 < top_k < num_columns:
            top_k = None
        elif top_p is None:
            highest = logits.topk(top_k, dim=-1, sorted=False).values
            return _keep_highest(logits, highest, highest.amin(-1, keepdim=True), top_k)
    counts = torch.full_like(logits[..., :1], num_columns, dtype=torch.long)
    if top_k is not None:
        top_k = torch.as_tensor(top_k, device=logits.device).view(-1, 1, 1)
        is_on = (top_k > 0) & (top_k < num_columns)
        counts = torch.where(is_on, top_k, counts)
        if top_p is None:
            if max_top_k is None:
                max_top_k = int(top_k.max()) if top_k.numel() else 1
            highest = logits.topk(min(max(max_top_k, 1), num_columns), dim=-1).values
            threshold = highest.gather(-1, counts.clamp(max=highest.shape[-1]) - 1)
            return torch.where(is_on, _keep_highest(logits, highest, threshold, counts), logits)
    ranked = logits.sort(-1, descending=True).values
    if top_p is not None:
        ranks = torch.arange(num_columns, device=logits.device)
        ranked_probs = ranked.masked_fill(ranks >= counts, -torch.inf).softmax(-1)
        mass_before = ranked_probs.cumsum(-1) - ranked_probs
        limit = top_p.to(logits.dtype)[:, None, None]
        is_in = (mass_before < limit) | (limit >= 1) | (ranks == 0)
        counts = torch.minimum(counts, is_in.sum(-1, keepdim=True))
    return _keep_highest(logits, ranked, ranked.gather(-1, counts - 1), counts)


def _keep_highest(logits: Tensor, highest: Tensor, threshold: Tensor, counts: Tensor | int) -> Tensor:
    """Exactly `counts` ([R, S, 1]) highest columns of logits [R, S, V] stay, and NaN; the lowest columns among equals.

    highest [R, S, K]: the K >= counts highest logits in any order. threshold [R, S, 1]: the lowest that stays.
    """
    num_tied_kept = counts - (highest > threshold).sum(-1, keepdim=True)
    is_tied = logits == threshold
    is_kept_tie = is_tied & (is_tied.cumsum(-1, dtype=torch.int32) <= num_tied_kept)
    # not the opposite of (logits > threshold) | is_kept_tie: comparisons with NaN are false
    return logits.masked_fill((logits < threshold) | (is_tied & ~is_kept_tie), -torch.inf)
