"""The settings of running requests as arrays, one slot a request, so that a step needs no loop over requests."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_INITIAL_SLOTS = 4
Array = NDArray[Any]


class SlotTable:
    """Columns of equal length; slots are reused, and the columns grow as needed.

    Attributes:
        seed: int64; key of the request's noise.
        guidance_scale, temperature, top_p: float32.
        top_k: int64; 0 is off.
        window: int64; the longest window that the request may have.
        num_tokens: int64; length of the finished sequence, given tokens included.
        num_given: int64; tokens of the sequence that the prompt holds, so the first one written has this position.
        iteration: int64; Jacobi steps taken so far.
        held_step: int64; the runner's last step that was held to bring the window back, or -1.
    """

    def __init__(self) -> None:
        self.seed = np.zeros(0, np.int64)
        self.guidance_scale = np.zeros(0, np.float32)
        self.temperature = np.zeros(0, np.float32)
        self.top_p = np.zeros(0, np.float32)
        self.top_k = np.zeros(0, np.int64)
        self.window = np.zeros(0, np.int64)
        self.num_tokens = np.zeros(0, np.int64)
        self.num_given = np.zeros(0, np.int64)
        self.iteration = np.zeros(0, np.int64)
        self.held_step = np.zeros(0, np.int64)
        self._free: list[int] = []
        self.num_used = 0

    def __len__(self) -> int:
        return len(self.seed)

    def take(self, **settings: float) -> int:
        """A free slot, with the settings given by name and the other columns at their start."""
        if not self._free:
            old = len(self)
            new = old + max(_INITIAL_SLOTS, old)
            for name, column in self._columns().items():
                setattr(self, name, np.resize(column, new))
            self._free.extend(range(new - 1, old - 1, -1))
        slot = self._free.pop()
        self.num_used += 1
        for name, value in {"iteration": 0, "held_step": -1, **settings}.items():
            getattr(self, name)[slot] = value
        return slot

    def free(self, slot: int) -> None:
        """Give a slot back."""
        self._free.append(slot)
        self.num_used -= 1

    def _columns(self) -> dict[str, Array]:
        return {name: value for name, value in vars(self).items() if isinstance(value, np.ndarray)}
