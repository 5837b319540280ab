"""Time of each Triton kernel on a GPU against the bytes that it must move, its launches, and the core beside it.

Needs torch, triton and this repository. Inputs are read once and outputs written once in the count of bytes; the floor
is those bytes at the copy bandwidth that is measured first, on the same device.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.common import Run, parser
from benchmarks.gpu.timing import copy_bandwidth, times
from sjd_kernels.gumbel_choices import gumbel_choices
from sjd_kernels.process_target import process_target_fused
from sjd_kernels.verify_and_refresh import verify_and_refresh
from sjd_vllm.config import ConfigError
from sjd_vllm.core import CounterNoise, DraftWindow, get_first_guess, get_redraft, jacobi_step, process_target
from sjd_vllm.core import gumbel_choices as core_choices
from sjd_vllm.images.flags import int_list
from sjd_vllm.images.rows import rounded

KERNELS = ("gumbel_choices", "process_target", "verify_and_refresh")
TOP_K, SCALE = 2000, 3.0
Call = Callable[[], object]


def main() -> None:
    """One row a kernel and shape."""
    made = parser(__doc__)
    made.add_argument("--requests", type=int_list, default=[1, 4, 16, 64], help="R, pictures in a batch")
    made.add_argument("--slots", type=int_list, default=[1, 33, 65], help="S, scored positions of each")
    made.add_argument("--columns", type=int_list, default=[8192, 16384, 65536], help="V, columns of the codebook")
    made.add_argument("--repeats", type=int, default=50, help="times that each is measured (50)")
    args = made.parse_args()
    run = Run.from_flags(args)
    rows = run.rows("kernels", "kernel", "requests", "slots", "columns")
    is_gpu = run.device.type == "cuda"
    bandwidth = copy_bandwidth(run.device, args.repeats)
    for r, s, v in itertools.product(args.requests, args.slots, args.columns):
        shape = {"requests": r, "slots": s, "columns": v}
        if all(rows.has(kernel=name, **shape) for name in KERNELS):
            continue
        for name, kernel, core, num_bytes in cases(r, s, v, run.device):
            if rows.has(kernel=name, **shape):
                continue
            p20, p50, p80 = times(kernel, run.device, args.repeats)
            core_p50 = times(core, run.device, args.repeats)[1]
            rows.append(
                {
                    "triton": version("triton"),
                    "device": torch.cuda.get_device_name() if is_gpu else "cpu-interpreter",
                    "kernel": name,
                    **shape,
                    "bytes": num_bytes,
                    "p20_us": rounded(1e6 * p20),
                    "p50_us": rounded(1e6 * p50),
                    "p80_us": rounded(1e6 * p80),
                    "core_p50_us": rounded(1e6 * core_p50),
                    "gb_per_s": rounded(num_bytes / p50 / 1e9),
                    "copy_gb_per_s": rounded(bandwidth / 1e9),
                    "times_floor": rounded(p50 * bandwidth / num_bytes),
                    "launches": launches(kernel) if is_gpu else "",
                }
            )


def cases(r: int, s: int, v: int, device: torch.device) -> list[tuple[str, Call, Call, int]]:
    """Name, kernel, core and bytes; raises AssertionError where kernel and core disagree beyond near-ties."""
    random = torch.Generator(device).manual_seed(0)
    n = r * s
    logits = (3 * torch.randn(2 * n, v, device=device, generator=random)).bfloat16()
    cond, uncond = logits[:n], logits[n:]
    rows = torch.arange(n, device=device)

    def full(count: int, value: float, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.full((count,), value, dtype=dtype, device=device)

    seeds, top_k = full(n, 7, torch.long), min(TOP_K, v)
    per_row = {"guidance_scale": full(n, SCALE), "temperature": full(n, 1), "seeds": seeds, "positions": rows}
    choose = partial(
        gumbel_choices, logits, 0, v, rows=rows, uncond_rows=rows + n, top_k=full(n, top_k, torch.long), **per_row
    )

    def choose_core() -> Tensor:
        return core_choices(
            cond.float(), torch.arange(v, device=device), uncond_logits=uncond.float(), top_k=top_k, **per_row
        )

    shaped, shaped_uncond = cond.view(r, s, v), uncond.view(r, s, v)
    per_request = {"guidance_scale": full(r, SCALE), "temperature": full(r, 1)}
    process = partial(
        process_target_fused, shaped, uncond_logits=shaped_uncond, top_k=full(r, top_k, torch.long), **per_request
    )

    def process_core() -> Tensor:
        return process_target(shaped.float(), uncond_logits=shaped_uncond.float(), top_k=top_k, **per_request)

    probs = process_core()
    draft_probs = probs[:, :-1].contiguous()
    tokens = draft_probs.argmax(-1)
    lengths, zeros = full(r, s - 1, torch.long), full(r, 0, torch.long)
    keys = {"positions": zeros, "next_lengths": lengths}
    verify = partial(verify_and_refresh, probs, tokens, draft_probs, lengths, seeds=seeds[:r], iterations=zeros, **keys)

    def verify_core() -> object:
        return jacobi_step(
            probs,
            DraftWindow(tokens, draft_probs, lengths),
            next_width=s - 1,
            redraft=get_redraft("coupled"),
            first_guess=get_first_guess("uniform"),
            randomness=CounterNoise(seeds[:r], zeros),
            **keys,
        )

    assert (choose() == choose_core()).float().mean() > 0.99
    assert torch.allclose(process(), probs, atol=1e-6, rtol=1e-3)
    both_halves = 2 * n * v * logits.element_size()
    # the drafts' q is p, so all are accepted and one row a request, the bonus token's, is read
    return [
        (KERNELS[0], choose, choose_core, both_halves + n * 64),
        (KERNELS[1], process, process_core, both_halves + n * v * 4),
        (KERNELS[2], verify, verify_core, r * v * 4 + n * 40),
    ]


def launches(call: Call) -> int:
    """Kernels of the device that one call starts."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"kernels.py: error: {error}")
