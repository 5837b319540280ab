"""The algorithm and its law: exact speculative Jacobi decoding in torch, and nothing else.

`core` knows no engine, no image and no prompt. `jacobi_step` is what the engine runs; `decode` is the
executable specification around it; docs/exactness.md says why it is exact.
"""

from __future__ import annotations

from .decode import DecodeResult, decode
from .first_guess import FIRST_GUESS_NAMES, FirstGuess, get_first_guess
from .martingale import martingale_z_scores
from .randomness import CounterNoise, Purpose, Randomness
from .redraft import REDRAFT_NAMES, Redraft, get_redraft
from .step import StepResult, jacobi_step
from .target import process_target, validate_legal
from .window import Context, DraftWindow, History

__all__ = [
    "FIRST_GUESS_NAMES",
    "REDRAFT_NAMES",
    "Context",
    "CounterNoise",
    "DecodeResult",
    "DraftWindow",
    "FirstGuess",
    "History",
    "Purpose",
    "Randomness",
    "Redraft",
    "StepResult",
    "decode",
    "get_first_guess",
    "get_redraft",
    "jacobi_step",
    "martingale_z_scores",
    "process_target",
    "validate_legal",
]
