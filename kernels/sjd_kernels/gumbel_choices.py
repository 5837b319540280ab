"""`sjd_vllm.core.gumbel_choices` on a GPU: one launch, from the raw logits to the token that the noise picks."""

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
    gumbel_key,
    gumbel_noise,
    keep_top,
    mixed_logits,
    order_key,
    take_digit,
)

LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gumbel_choices(
    logits: Tensor,
    first_token_id: int,
    num_columns: int,
    *,
    rows: Tensor,
    uncond_rows: Tensor,
    guidance_scale: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    seeds: Tensor,
    positions: Tensor,
) -> Tensor:
    """The token that the noise picks in each of N rows -> int64 [N]; -1 where the logits are NaN or all -inf.

    Arithmetic is float32. The result can differ from the core's (on `logits.float()`) only where two tokens' scores
    are within a rounding error of each other.

    logits: float32, bfloat16 or float16 [M, vocabulary], columns contiguous. Nothing of it is copied; the legal tokens
        are the `num_columns` (V) from `first_token_id` on.
    rows, uncond_rows: int64 [N], into logits; not looked at by the host. An uncond row is read where scale is not 1.
    guidance_scale, temperature: float32 [N]; scale 1 is exactly the conditional row, temperature 0 is greedy.
    top_k: int64 [N]; exactly so many columns survive, the lowest among equals; <= 0 is all. There is no top-p.
    seeds, positions: int64 [N], keys of the noise.

    Raises ValueError for shapes, types and devices that do not fit, and on a CPU outside Triton's interpreter.
    """
    check_device(logits)
    if logits.dtype not in LOGIT_DTYPES or logits.dim() != 2 or logits.stride(1) != 1:
        raise ValueError(
            "logits must be float32, bfloat16 or float16 [M, vocabulary] with contiguous columns, "
            f"got {logits.dtype} {list(logits.shape)} of strides {logits.stride()}"
        )
    if num_columns < 1 or first_token_id < 0 or first_token_id + num_columns > logits.shape[1]:
        raise ValueError(f"no columns {first_token_id}..{first_token_id + num_columns} in {logits.shape[1]}")
    shape = (len(rows),)
    check_tensors(
        logits,
        rows=(rows, "int64", shape),
        uncond_rows=(uncond_rows, "int64", shape),
        guidance_scale=(guidance_scale, "float32", shape),
        temperature=(temperature, "float32", shape),
        top_k=(top_k, "int64", shape),
        seeds=(seeds, "int64", shape),
        positions=(positions, "int64", shape),
    )
    chosen = torch.empty_like(rows)
    if len(rows):
        _choose[(len(rows),)](
            logits,
            logits.stride(0),
            first_token_id,
            num_columns,
            rows,
            uncond_rows,
            guidance_scale,
            temperature,
            top_k,
            seeds,
            positions,
            chosen,
            BLOCK=block_size(num_columns),
            num_warps=8,
        )
    return chosen


@triton.jit
def _choose(
    logits_ptr,
    row_stride,
    first,
    num_columns,
    rows_ptr,
    uncond_rows_ptr,
    scale_ptr,
    temperature_ptr,
    top_k_ptr,
    seeds_ptr,
    positions_ptr,
    chosen_ptr,
    BLOCK: tl.constexpr,  # noqa: N803
):
    row = tl.program_id(0)
    cond_ptr = logits_ptr + tl.load(rows_ptr + row) * row_stride + first
    uncond_ptr = logits_ptr + tl.load(uncond_rows_ptr + row) * row_stride + first
    scale = tl.load(scale_ptr + row)
    temperature = tl.load(temperature_ptr + row)
    top_k = tl.load(top_k_ptr + row)
    is_greedy = temperature <= 0
    divisor = tl.where(is_greedy, 1.0, tl.maximum(temperature, 1e-30))
    key = gumbel_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    has_top_k = (top_k > 0) & (top_k < num_columns) & (temperature > 0)

    # the k-th highest, a digit of its key at a time
    threshold = tl.full((), 0, tl.uint32)
    num_tied = tl.full((), 0x7FFFFFFF, tl.int32)
    if has_top_k:
        num_tied = top_k.to(tl.int32)
        for digit in tl.static_range(4):
            counts = tl.zeros((256,), tl.int32)
            for start in range(0, num_columns, BLOCK):
                columns = start + tl.arange(0, BLOCK)
                is_in = columns < num_columns
                scaled = tl.math.div_rn(mixed_logits(cond_ptr, uncond_ptr, scale, columns, is_in), divisor)
                counts = count_digit(counts, order_key(scaled), threshold, 24 - 8 * digit, is_in)
            threshold, num_tied = take_digit(counts, threshold, num_tied)

    best = tl.full((), float("-inf"), tl.float32)
    best_at = tl.full((), -1, tl.int32)
    num_nan = tl.full((), 0, tl.int32)
    num_seen = tl.full((), 0, tl.int32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        is_in = columns < num_columns
        scaled = tl.math.div_rn(mixed_logits(cond_ptr, uncond_ptr, scale, columns, is_in), divisor)
        num_nan += tl.sum((scaled != scaled).to(tl.int32))
        is_kept = is_in
        if has_top_k:
            is_kept, num_seen = keep_top(order_key(scaled), threshold, num_tied, num_seen, is_in)
        noise = tl.where(is_greedy, 0.0, gumbel_noise(key, first + columns))
        score = tl.where(is_kept, scaled + noise, float("-inf"))
        score = tl.where(score != score, float("-inf"), score)
        highest = tl.max(score)
        # the lowest column among equals, in a block and, by the strict comparison, between blocks
        place = tl.min(tl.where(score == highest, columns, 0x7FFFFFFF))
        best_at = tl.where(highest > best, place, best_at)
        best = tl.maximum(highest, best)
    is_choice = (num_nan == 0) & (best_at >= 0)
    tl.store(chosen_ptr + row, tl.where(is_choice, first + best_at, -1).to(tl.int64))
