"""Data-parallel training on the cores of one machine: one single-threaded process each.

On a small model, processes that meet once a step waste far less time than threads that meet at every operation,
above all when other programs use the same cores.
"""

import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import distributed
from torch.multiprocessing import spawn


def run_workers(function: Callable[..., None], num_workers: int, *arguments: object) -> None:
    """Call `function(*arguments)` in `num_workers` processes that talk to each other through the functions below.

    With one worker it is called in this process, with torch's own threads.
    """
    if num_workers == 1:
        function(*arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting_point = (Path(folder) / "meeting-point").as_uri()
        spawn(_worker, (num_workers, meeting_point, function, arguments), nprocs=num_workers)


def rank() -> int:
    """Index of this process; 0 outside `run_workers`."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def num_workers() -> int:
    """Number of processes; 1 outside `run_workers`."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


def average_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Replace each gradient by its mean over the processes."""
    if num_workers() == 1:
        return
    gradients = [parameter.grad for parameter in parameters]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    add_up(flat).div_(num_workers())
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def add_up(tensor: torch.Tensor) -> torch.Tensor:
    """Sum of a tensor over the processes, in place."""
    if num_workers() > 1:
        distributed.all_reduce(tensor)
    return tensor


def from_first_worker(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's tensor, in all of them; in place."""
    if num_workers() > 1:
        distributed.broadcast(tensor, src=0)
    return tensor


def _worker(
    rank: int, num_workers: int, meeting_point: str, function: Callable[..., None], arguments: tuple[object, ...]
) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=meeting_point, rank=rank, world_size=num_workers)
    try:
        function(*arguments)
    finally:
        distributed.destroy_process_group()
