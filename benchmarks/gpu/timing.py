"""Times of short calls on a device."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch


def times(call: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float, float]:
    """p20, p50 and p80 in seconds; on a GPU by its events, each time with a flushed L2."""
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


def copy_bandwidth(device: torch.device, repeats: int) -> float:
    """Bytes a second, those read and those written, of a plain copy that is larger than the caches."""
    source = torch.empty(2**29 if device.type == "cuda" else 2**20, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / times(lambda: target.copy_(source), device, repeats)[1]
