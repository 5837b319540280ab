"""Time of each Triton kernel on a GPU against the bytes that it must move, its launches, and the core beside it.

Needs torch, triton and this repository. Inputs are read once and outputs written once in the count of bytes; the floor
is those bytes at the copy bandwidth that is measured first, on the same device.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sjd_kernels.gumbel_choices import gumbel_choices
from sjd_kernels.process_target import process_target_fused
from sjd_kernels.verify_and_refresh import verify_and_refresh
from sjd_vllm.core import CounterNoise, DraftWindow, get_first_guess, get_redraft, jacobi_step, process_target
from sjd_vllm.core import gumbel_choices as core_choices
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, rounded

RESULTS = Path(__file__).parent.parent / "results" / "kernels.csv"
TOP_K, SCALE = 2000, 3.0
Call = Callable[[], object]


def main() -> None:
    """One row a kernel and shape."""
    args = _parse_args()
    has_gpu = torch.cuda.is_available()
    if not has_gpu and args.output == RESULTS:
        raise SystemExit("no GPU: figures of the interpreter do not belong in results/; name another --output")
    device = torch.device("cuda" if has_gpu else "cpu")
    bandwidth = _copy_bandwidth(device, args.repeats)
    for r, s, v in itertools.product(args.requests, args.slots, args.columns):
        for name, kernel, core, num_bytes in cases(r, s, v, device):
            p20, p50, p80 = times(kernel, device, args.repeats)
            core_p50 = times(core, device, args.repeats)[1]
            row: dict[str, object] = {
                **provenance(),
                "triton": version("triton"),
                "device": torch.cuda.get_device_name() if has_gpu else "cpu-interpreter",
                "kernel": name,
                "requests": r,
                "slots": s,
                "columns": v,
                "bytes": num_bytes,
                "p20_us": rounded(1e6 * p20),
                "p50_us": rounded(1e6 * p50),
                "p80_us": rounded(1e6 * p80),
                "core_p50_us": rounded(1e6 * core_p50),
                "gb_per_s": rounded(num_bytes / p50 / 1e9),
                "copy_gb_per_s": rounded(bandwidth / 1e9),
                "times_floor": rounded(p50 * bandwidth / num_bytes),
                "launches": launches(kernel) if has_gpu else "",
            }
            append_rows(args.output, [row])
            print(f"{name} R={r} S={s} V={v}: {row['p50_us']} us, {row['times_floor']} x floor", flush=True)


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
        ("gumbel_choices", choose, choose_core, both_halves + n * 64),
        ("process_target", process, process_core, both_halves + n * v * 4),
        ("verify_and_refresh", verify, verify_core, r * v * 4 + n * 40),
    ]


def times(call: Call, device: torch.device, repeats: int) -> tuple[float, float, float]:
    """p20, p50 and p80 in seconds; on a GPU by its events, each time with a flushed L2."""
    import time

    call()
    taken = []
    flush = torch.empty(2**28 if device.type == "cuda" else 1, dtype=torch.int8, device=device)
    for _ in range(repeats):
        flush.zero_()
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            taken.append(start.elapsed_time(end) / 1e3)
        else:
            began = time.perf_counter()
            call()
            taken.append(time.perf_counter() - began)
    p20, p50, p80 = torch.tensor(taken, dtype=torch.double).quantile(torch.tensor([0.2, 0.5, 0.8]).double()).tolist()
    return p20, p50, p80


def launches(call: Call) -> int:
    """Kernels of the device that one call starts."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profiled.events())


def _copy_bandwidth(device: torch.device, repeats: int) -> float:
    source = torch.empty(2**29 if device.type == "cuda" else 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / times(lambda: target.copy_(source), device, repeats)[1]


def _parse_args() -> argparse.Namespace:
    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(",")]

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=numbers, default=[1, 4, 16, 64], help="R, pictures in a batch")
    parser.add_argument("--slots", type=numbers, default=[1, 33, 65], help="S, scored positions of each")
    parser.add_argument("--columns", type=numbers, default=[8192, 16384, 65536], help="V, columns of the codebook")
    parser.add_argument("--repeats", type=int, default=50)
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
