"""`sjd_vllm.core.process_target` on a GPU: one launch, from the raw logits to the target distribution."""

# mypy: disable-error-code="misc,no-untyped-def,type-arg"
# Triton compiles the kernel from its source and reads no annotations.
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks import (
    block_size,
    check_device,
    check_tensors,
    count_digit,
    keep_top,
    mixed_logits,
    order_key,
    take_digit,
)
from .gumbel_choices import LOGIT_DTYPES


def process_target_fused(
    logits: Tensor,
    *,
    uncond_logits: Tensor,
    guidance_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    legal: Tensor | None = None,
) -> Tensor:
    """Guidance mix, legal mask, temperature, top-k, renormalise, in that order -> probs float32 [R, S, V].

    Arithmetic is float32: the result is the core's on `logits.float()`, up to rounding. A row that holds a NaN in a
    legal column is NaN all over, so that no token can be drawn from it; a slot with no legal column is all zeros.

    logits, uncond_logits: float32, bfloat16 or float16 [R, S, V], both of one type and one layout with contiguous
        columns; `uncond_logits` may be `logits` where nothing is guided, and is read where scale is not 1.
    guidance_scale, temperature: float32 [R]; scale 1 is exactly `logits`; temperature 0 puts all mass on the highest.
    top_k: int64 [R]; exactly so many columns survive, the lowest among equals; <= 0 is all. There is no top-p.
    legal: bool [R, S, V] of any strides (an expanded set is not copied), or None where all columns are legal.

    Raises ValueError for shapes, types and devices that do not fit, and on a CPU outside Triton's interpreter.
    """
    check_device(logits)
    if logits.dtype not in LOGIT_DTYPES or logits.dim() != 3 or logits.stride(2) != 1 or not logits.shape[2]:
        raise ValueError(
            "logits must be float32, bfloat16 or float16 [R, S, V] with contiguous columns, V >= 1, "
            f"got {logits.dtype} {list(logits.shape)} of strides {logits.stride()}"
        )
    for name, found, of in (
        ("shape", uncond_logits.shape, logits.shape),
        ("dtype", uncond_logits.dtype, logits.dtype),
        ("device", uncond_logits.device, logits.device),
        ("strides", uncond_logits.stride(), logits.stride()),
    ):
        if found != of:
            raise ValueError(f"uncond_logits must have the {name} of logits, {of}, got {found}")
    if legal is not None and (legal.dtype != torch.bool or legal.shape != logits.shape):
        raise ValueError(f"legal must be bool {list(logits.shape)}, got {legal.dtype} {list(legal.shape)}")
    if legal is not None and legal.device != logits.device:
        raise ValueError(f"legal must be on {logits.device}, got {legal.device}")
    num_requests, num_slots, num_columns = logits.shape
    check_tensors(
        logits,
        guidance_scale=(guidance_scale, "float32", (num_requests,)),
        temperature=(temperature, "float32", (num_requests,)),
        top_k=(top_k, "int64", (num_requests,)),
    )
    probs = torch.empty(logits.shape, dtype=torch.float32, device=logits.device)
    if num_requests and num_slots:
        _process[(num_requests * num_slots,)](
            logits,
            uncond_logits,
            logits.stride(0),
            logits.stride(1),
            guidance_scale,
            temperature,
            top_k,
            logits if legal is None else legal,  # not read without HAS_LEGAL
            *((0, 0, 0) if legal is None else legal.stride()),
            probs,
            num_slots,
            num_columns,
            HAS_LEGAL=legal is not None,
            BLOCK=block_size(num_columns),
            num_warps=8,
        )
    return probs


@triton.jit
def _legal_logits(cond_ptr, uncond_ptr, scale, legal_ptr, legal_step, columns, is_in, HAS_LEGAL: tl.constexpr):  # noqa: N803
    """Guided logits, -inf where a column is not legal; and which are legal."""
    is_legal = is_in
    if HAS_LEGAL:
        is_legal = is_in & (tl.load(legal_ptr + columns * legal_step, mask=is_in, other=0) != 0)
    return mixed_logits(cond_ptr, uncond_ptr, scale, columns, is_legal), is_legal


@triton.jit
def _process(
    logits_ptr,
    uncond_ptr,
    request_stride,
    slot_stride,
    scale_ptr,
    temperature_ptr,
    top_k_ptr,
    legal_ptr,
    legal_request_stride,
    legal_slot_stride,
    legal_step,
    probs_ptr,
    num_slots,
    num_columns,
    HAS_LEGAL: tl.constexpr,  # noqa: N803
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0).to(tl.int64)
    request, slot = row // num_slots, row % num_slots
    offset = request * request_stride + slot * slot_stride
    cond_ptr, other_ptr = logits_ptr + offset, uncond_ptr + offset
    allowed_ptr = legal_ptr + request * legal_request_stride + slot * legal_slot_stride
    scale = tl.load(scale_ptr + request)
    temperature = tl.load(temperature_ptr + request)
    top_k = tl.load(top_k_ptr + request)
    is_greedy = temperature <= 0
    divisor = tl.where(is_greedy, 1.0, tl.maximum(temperature, 1e-30))

    # the highest, and the lowest column that has it
    has_top_k = (top_k > 0) & (top_k < num_columns) & (temperature > 0)
    highest = tl.full((), float("-inf"), tl.float32)
    highest_at = tl.full((), 0, tl.int32)
    num_nan = tl.full((), 0, tl.int32)
    num_legal = tl.full((), 0, tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_in = columns < num_columns
        logits, is_legal = _legal_logits(cond_ptr, other_ptr, scale, allowed_ptr, legal_step, columns, is_in, HAS_LEGAL)
        num_legal += tl.sum(is_legal.to(tl.int32))
        num_nan += tl.sum((logits != logits).to(tl.int32))
        scaled = tl.math.div_rn(tl.where(logits != logits, float("-inf"), logits), divisor)
        top = tl.max(scaled)
        place = tl.min(tl.where(scaled == top, columns, 0x7FFFFFFF))
        highest_at = tl.where(top > highest, place, highest_at)
        highest = tl.maximum(top, highest)

    threshold = tl.full((), 0, tl.uint32)
    num_tied = tl.full((), 0x7FFFFFFF, tl.int32)
    if has_top_k:
        num_tied = top_k.to(tl.int32)
        for digit in tl.static_range(4):
            counts = tl.zeros((256,), tl.int32)
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                is_in = columns < num_columns
                logits, _ = _legal_logits(
                    cond_ptr, other_ptr, scale, allowed_ptr, legal_step, columns, is_in, HAS_LEGAL
                )
                keys = order_key(tl.math.div_rn(logits, divisor))
                counts = count_digit(counts, keys, threshold, 24 - 8 * digit, is_in)
            threshold, num_tied = take_digit(counts, threshold, num_tied)

    total = tl.full((), 0.0, tl.float32)
    num_seen = tl.full((), 0, tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_in = columns < num_columns
        logits, _ = _legal_logits(cond_ptr, other_ptr, scale, allowed_ptr, legal_step, columns, is_in, HAS_LEGAL)
        scaled = tl.math.div_rn(logits, divisor)
        is_kept = is_in
        if has_top_k:
            is_kept, num_seen = keep_top(order_key(scaled), threshold, num_tied, num_seen, is_in)
        total += tl.sum(tl.where(is_kept, tl.exp(scaled - highest), 0.0))

    num_seen = tl.full((), 0, tl.int32)
    is_empty = num_legal == 0
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_in = columns < num_columns
        logits, _ = _legal_logits(cond_ptr, other_ptr, scale, allowed_ptr, legal_step, columns, is_in, HAS_LEGAL)
        scaled = tl.math.div_rn(logits, divisor)
        is_kept = is_in
        if has_top_k:
            is_kept, num_seen = keep_top(order_key(scaled), threshold, num_tied, num_seen, is_in)
        probs = tl.where(is_kept, tl.math.div_rn(tl.exp(scaled - highest), total), 0.0)
        probs = tl.where(is_greedy, (columns == highest_at).to(tl.float32), probs)
        probs = tl.where(num_nan > 0, float("nan"), probs)
        probs = tl.where(is_empty, 0.0, probs)
        tl.store(probs_ptr + row * num_columns + columns, probs, mask=is_in)
