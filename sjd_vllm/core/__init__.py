"""The algorithm and its law: exact speculative Jacobi decoding in torch, and nothing else.

`core` knows no engine, no image and no prompt. `gumbel_choices` and `sweep` (fixed noise), or `process_target` and
`jacobi_step` (rejection), are what the engine runs; `decode` is the executable specification around them;
docs/exactness.md says why both are exact.
"""

from __future__ import annotations

from .decode import GUMBEL, DecodeResult, decode
from .first_guess import FIRST_GUESS_NAMES, FirstGuess, get_first_guess
from .fixed_noise import gumbel_choices, sweep
from .martingale import MartingaleSum, martingale_sums, martingale_z_scores
from .randomness import CounterNoise, Purpose, Randomness, uniform_choice
from .redraft import REDRAFT_NAMES, Redraft, get_redraft
from .step import StepResult, jacobi_step
from .target import process_target, validate_legal
from .window import Context, DraftWindow, History

__all__ = [
    "FIRST_GUESS_NAMES",
    "GUMBEL",
    "REDRAFT_NAMES",
    "Context",
    "CounterNoise",
    "DecodeResult",
    "DraftWindow",
    "FirstGuess",
    "History",
    "MartingaleSum",
    "Purpose",
    "Randomness",
    "Redraft",
    "StepResult",
    "decode",
    "get_first_guess",
    "get_redraft",
    "gumbel_choices",
    "jacobi_step",
    "martingale_sums",
    "martingale_z_scores",
    "process_target",
    "sweep",
    "uniform_choice",
    "validate_legal",
]
