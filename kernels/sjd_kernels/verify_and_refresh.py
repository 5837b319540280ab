"""Verify and refresh (strategy `coupled`) on a GPU, as `sjd_vllm.core.jacobi_step` defines it: one launch."""

# mypy: disable-error-code="misc,no-untyped-def,type-arg"
# Triton compiles the kernel from its source and reads no annotations.
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import block_size, check_device, check_tensors, step_key, uniform

# sjd_vllm.core.Purpose
_ACCEPT = tl.constexpr(0)
_CORRECTION = tl.constexpr(1)
_KEEP = tl.constexpr(2)
_REDRAFT = tl.constexpr(3)


class Verified(NamedTuple):
    """What a step decides."""

    num_accepted: Tensor  # int64 [R], 0..lengths
    emitted: Tensor  # int64 [R, W+1]: num_accepted + 1 tokens, -1 beyond them and where a row has no mass
    refreshed: Tensor  # int64 [R, W+1]: the carried slots' new drafts, whose law is target_probs; -1 elsewhere


def verify_and_refresh(
    target_probs: Tensor,
    draft_tokens: Tensor,
    draft_probs: Tensor,
    lengths: Tensor,
    *,
    positions: Tensor,
    next_lengths: Tensor,
    seeds: Tensor,
    iterations: Tensor,
) -> Verified:
    """Accept drafts from the left, correct the first refused one, refresh those right of it (strategy `coupled`).

    The noise is `CounterNoise(seeds, iterations)`. The result can differ from the core's only where a number of the
    noise is within a rounding error of a boundary between tokens.

    target_probs: float32 [R, W+1, V]; p at each slot, given the drafts left of it.
    draft_tokens: int64 [R, W]. draft_probs: float32 [R, W, V]; q, from which the drafts were drawn.
    lengths: int64 [R], 0..W; how many drafts are real.
    positions: int64 [R]; absolute position of slot 0.
    next_lengths: int64 [R] >= 0; drafts wanted in the next window.
    seeds, iterations: int64 [R], keys of the noise.

    Raises ValueError for shapes, types and devices that do not fit, and on a CPU outside Triton's interpreter.
    """
    check_device(target_probs)
    if target_probs.dim() != 3 or not target_probs.shape[1] or not target_probs.shape[2]:
        raise ValueError(f"target_probs must be [R, W+1, V] with V >= 1, got {list(target_probs.shape)}")
    num_requests, num_rows, num_columns = target_probs.shape
    width = num_rows - 1
    per_request = ("int64", (num_requests,))
    check_tensors(
        target_probs,
        target_probs=(target_probs, "float32", (num_requests, num_rows, num_columns)),
        draft_tokens=(draft_tokens, "int64", (num_requests, width)),
        draft_probs=(draft_probs, "float32", (num_requests, width, num_columns)),
        lengths=(lengths, *per_request),
        positions=(positions, *per_request),
        next_lengths=(next_lengths, *per_request),
        seeds=(seeds, *per_request),
        iterations=(iterations, *per_request),
    )
    num_accepted = torch.empty_like(lengths)
    emitted = torch.empty((num_requests, num_rows), dtype=torch.long, device=target_probs.device)
    refreshed = torch.empty_like(emitted)
    if num_requests:
        _verify[(num_requests, num_rows)](
            target_probs,
            draft_tokens,
            draft_probs,
            lengths,
            positions,
            next_lengths,
            seeds,
            iterations,
            num_accepted,
            emitted,
            refreshed,
            width,
            num_columns,
            SLOTS=max(triton.next_power_of_2(width), 2),
            BLOCK=block_size(num_columns),
            num_warps=8,
        )
    return Verified(num_accepted, emitted, refreshed)


@triton.jit
def _weights(target_ptr, draft_ptr, has_draft, columns, is_in):
    """p, and max(p - q, 0) or p itself where there is no draft, of some columns."""
    target = tl.load(target_ptr + columns, mask=is_in, other=0.0)
    draft = tl.load(draft_ptr + columns, mask=is_in & (columns < has_draft * 0x7FFFFFFF), other=0.0)
    rest = target - draft
    return target, tl.where(rest < 0.0, 0.0, rest)


@triton.jit
def _draw(target_ptr, draft_ptr, has_draft, u, num_columns, BLOCK: tl.constexpr):  # noqa: N803
    """A column in proportion to the residual, or to p where nothing is left of it; -1 without mass or with NaN."""
    target_total = tl.full((), 0.0, tl.float32)
    rest_total = tl.full((), 0.0, tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        target, rest = _weights(target_ptr, draft_ptr, has_draft, columns, columns < num_columns)
        target_total += tl.sum(target)
        rest_total += tl.sum(rest)
    has_rest = (rest_total > 0.0).to(tl.int32)
    has_draft = has_draft * has_rest
    total = tl.where(has_rest > 0, rest_total, target_total)
    below_total = (total.to(tl.int32, bitcast=True) - 1).to(tl.float32, bitcast=True)
    threshold = tl.minimum(u * total, below_total)

    cdf = tl.full((), 0.0, tl.float32)
    drawn = tl.full((), 0x7FFFFFFF, tl.int32)
    heaviest = tl.full((), 0.0, tl.float32)
    heaviest_at = tl.full((), 0, tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        _, weights = _weights(target_ptr, draft_ptr, has_draft, columns, columns < num_columns)
        is_beyond = (cdf + tl.cumsum(weights) > threshold) & (weights > 0.0)
        drawn = tl.minimum(drawn, tl.min(tl.where(is_beyond, columns, 0x7FFFFFFF)))
        cdf += tl.sum(weights)
        top = tl.max(weights)
        place = tl.min(tl.where(weights == top, columns, 0x7FFFFFFF))
        heaviest_at = tl.where(top > heaviest, place, heaviest_at)
        heaviest = tl.maximum(top, heaviest)
    # two sums of one row may differ by rounding, and leave nothing beyond the threshold
    drawn = tl.where(drawn < 0x7FFFFFFF, drawn, heaviest_at)
    return tl.where(total > 0.0, drawn, -1).to(tl.int64)


@triton.jit
def _verify(
    target_ptr,
    tokens_ptr,
    draft_ptr,
    lengths_ptr,
    positions_ptr,
    next_lengths_ptr,
    seeds_ptr,
    iterations_ptr,
    num_accepted_ptr,
    emitted_ptr,
    refreshed_ptr,
    width,
    num_columns,
    SLOTS: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    request = tl.program_id(0).to(tl.int64)
    slot = tl.program_id(1)
    length = tl.load(lengths_ptr + request)
    position = tl.load(positions_ptr + request)
    key = step_key(tl.load(seeds_ptr + request), tl.load(iterations_ptr + request))
    request_target_ptr = target_ptr + request * (width + 1) * num_columns
    request_draft_ptr = draft_ptr + request * width * num_columns

    # each slot's program tests all drafts: two numbers a draft are cheaper than a second launch
    slots = tl.arange(0, SLOTS)
    is_draft = (slots < width) & (slots < length)
    tokens = tl.load(tokens_ptr + request * width + slots, mask=is_draft, other=0)
    tokens = tl.maximum(tokens, 0)
    is_draft = is_draft & (tokens < num_columns)
    target = tl.load(request_target_ptr + slots * num_columns + tokens, mask=is_draft, other=0.0)
    draft = tl.load(request_draft_ptr + slots * num_columns + tokens, mask=is_draft, other=0.0)
    is_accepted = is_draft & (draft > 0.0) & (uniform(key, position + slots, _ACCEPT) * draft < target)
    num_accepted = tl.min(tl.where(is_accepted, SLOTS, slots))
    num_accepted = tl.minimum(num_accepted, length).to(tl.int32)
    is_kept = is_draft & (draft > 0.0) & (uniform(key, position + slots, _KEEP) * draft < target)
    is_slot_kept = tl.sum((is_kept & (slots == slot)).to(tl.int32)) > 0

    num_carried = tl.minimum(length - num_accepted, tl.load(next_lengths_ptr + request))
    is_correction = slot == num_accepted
    is_carried = (slot > num_accepted) & (slot - num_accepted - 1 < num_carried)
    emitted = tl.full((), -1, tl.int64)
    refreshed = tl.full((), -1, tl.int64)
    own_token_ptr = tokens_ptr + request * width + slot
    if slot < num_accepted:
        emitted = tl.load(own_token_ptr)
    elif is_correction | (is_carried & (is_slot_kept == 0)):
        correction_u = uniform(key, position + slot, _CORRECTION)
        redraft_u = uniform(key, position + slot, _REDRAFT)
        row = slot.to(tl.int64) * num_columns
        drawn = _draw(
            request_target_ptr + row,
            request_draft_ptr + row,
            (slot < length).to(tl.int32),
            tl.where(is_correction, correction_u, redraft_u),
            num_columns,
            BLOCK,
        )
        emitted = tl.where(is_correction, drawn, -1)
        refreshed = tl.where(is_correction, -1, drawn)
    elif is_carried:
        refreshed = tl.load(own_token_ptr)
    if slot == 0:
        tl.store(num_accepted_ptr + request, num_accepted.to(tl.int64))
    tl.store(emitted_ptr + request * (width + 1) + slot, emitted)
    tl.store(refreshed_ptr + request * (width + 1) + slot, refreshed)
