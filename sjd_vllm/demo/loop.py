"""The training loop that all three networks share: resumable, seeded, with a progress bar."""

from collections.abc import Callable
from pathlib import Path

import torch
from tqdm import trange

from sjd_vllm.demo import parallel

SAVE_EVERY = 100  # steps between two saves


def run_steps(
    name: str,
    path: Path,
    num_steps: int,
    parts: dict[str, object],
    step_fn: Callable[[int], dict[str, float]],
) -> None:
    """Call `step_fn` for each step that is still to do, saving state so that a killed run can go on.

    Args:
        name: label of the progress bar.
        path: where the state is kept; a finished run leaves it there, and running it again does nothing.
        num_steps: length of the whole run.
        parts: everything that changes during training; each has `state_dict` and `load_state_dict`.
        step_fn: takes the step index, trains on one batch and returns figures for the progress bar.
    """
    first_step = _restore(path, parts)
    is_first_worker = parallel.rank() == 0
    progress = trange(
        first_step,
        num_steps,
        desc=name,
        initial=first_step,
        total=num_steps,
        mininterval=5,
        disable=not is_first_worker,
    )
    means: dict[str, float] = {}
    for step in progress:
        for key, value in step_fn(step).items():
            means[key] = 0.98 * means.get(key, value) + 0.02 * value
        progress.set_postfix({key: f"{value:.4g}" for key, value in means.items()}, refresh=False)
        if is_first_worker and ((step + 1) % SAVE_EVERY == 0 or step + 1 == num_steps):
            state = {"step": step + 1} | {key: part.state_dict() for key, part in parts.items()}
            unfinished = path.with_suffix(".tmp")
            torch.save(state, unfinished)
            unfinished.rename(path)  # the old state stays whole until the new one is


def cosine_with_warmup(step: int, num_steps: int, num_warmup_steps: int) -> float:
    """Factor on the learning rate: linear rise from 0 to 1, then half a cosine down to 0."""
    if step < num_warmup_steps:
        return (step + 1) / num_warmup_steps
    position = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return 0.5 + 0.5 * float(torch.cos(torch.tensor(position * torch.pi)))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group of parameters."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate


def _restore(path: Path, parts: dict[str, object]) -> int:
    if not path.exists():
        return 0
    state = torch.load(path, weights_only=True)
    for key, part in parts.items():
        part.load_state_dict(state[key])
    return state["step"]
