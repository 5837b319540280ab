"""What the engine's process counts and the server's process shows: a few numbers in a file that both map into memory.

Counting costs the engine an addition, reading never waits for it, and a dead engine leaves its last values. The file is
named after vLLM's instance id, which both processes know, and belongs to this user alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import tempfile
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

# name -> help text; those that end in _total only ever grow
ENGINE_COUNTERS = {
    "steps_total": "Steps that the engine has taken.",
    "drafts_scored_total": "Draft tokens that were scored, companions not counted.",
    "drafts_accepted_total": "Draft tokens that became tokens of the output.",
    "drafts_refreshed_total": "Draft tokens that were scored, not accepted, and had a place in the next window.",
    "drafts_kept_total": "Those of the refreshed ones that stayed the same token.",
    "guidance_stalls_total": "Halves of guidance pairs, or single requests, that waited a step.",
    "guidance_preemptions_total": "Halves that were preempted because their other half was.",
    "model_runner": "vLLM's model runner that decodes: 1 or 2.",
    "window": "Draft tokens in the window that the load allows.",
    "guidance_pairs": "Pairs of requests under classifier-free guidance.",
}
_INDEX = {name: index for index, name in enumerate(ENGINE_COUNTERS)}


class EngineCounters:
    """The numbers of one engine.

    Args:
        instance_id: vLLM's, of the engine.
        is_writer: whether this is the engine's process, which starts them at 0 and removes the file at its end.

    Raises OSError where a reader finds no file of its own.
    """

    def __init__(self, instance_id: str, *, is_writer: bool = False) -> None:
        path = Path(tempfile.gettempdir()) / f"sjd-vllm-{os.getuid()}-{instance_id}"
        flags = os.O_RDWR | os.O_NOFOLLOW | (os.O_CREAT if is_writer else 0)
        descriptor = os.open(path, flags, 0o600)
        try:
            if os.fstat(descriptor).st_uid != os.getuid():
                raise PermissionError(f"{path} belongs to somebody else")
            if is_writer:
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, 8 * len(_INDEX))
                atexit.register(_remove, path)
            with os.fdopen(os.dup(descriptor), "r+b") as file:
                self._values: NDArray[np.int64] = np.memmap(file, np.int64, shape=(len(_INDEX),))
        finally:
            os.close(descriptor)

    def add(self, name: str, amount: int = 1) -> None:
        """Count."""
        self._values[_INDEX[name]] += amount

    def put(self, name: str, value: int) -> None:
        """Set a number that goes up and down."""
        self._values[_INDEX[name]] = value

    def read(self) -> dict[str, int]:
        """All numbers by name."""
        return dict(zip(_INDEX, self._values.tolist(), strict=True))


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
