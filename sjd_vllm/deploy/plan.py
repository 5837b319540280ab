"""A capacity model: pictures a second and memory of a replica, from the time of a step, tokens, compression and batch.

    step     = fixed + per_row * rows + per_token * tokens        rows = batch * halves, tokens = rows * (1 + window)
    forwards = picture_tokens / (1 + gain * window / (window + 17))
    latency  = forwards * step                                    rate = batch / latency

The law of the forwards is the one that the engine's window controller starts from, fitted to the demo model
(benchmarks/results/forwards.csv). As the engine does, the model takes the window with the highest rate at each batch.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from sjd_vllm.config import MAX_WINDOW, ConfigError
from sjd_vllm.models.registry import load_family

WINDOWS = (0, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, MAX_WINDOW)
DEMO_GAIN = 5.2  # of an endless window, docs/performance.md
_HALF_WINDOW = 17.0
_PROMPT_TOKENS = 64  # of a prompt, where nobody says


@dataclass(frozen=True)
class ModelShape:
    """What of a model its cost depends on."""

    num_parameters: int
    num_layers: int
    num_kv_heads: int
    head_dim: int
    picture_tokens: int  # forwards of plain decoding

    @classmethod
    def read(cls, path: Path) -> ModelShape:
        """From a checkpoint of a known image family; no weight is loaded. Raises ConfigError."""
        family = load_family(path)
        if family is None:
            raise ConfigError("model", f"model must be a checkpoint of an image family; {str(path)!r} is none.")
        config = json.loads((path / "config.json").read_text())
        config = config.get("text_config", config)
        heads = config["num_attention_heads"]
        return cls(
            num_parameters=_num_parameters(path),
            num_layers=config["num_hidden_layers"],
            num_kv_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            picture_tokens=family.grammar(family.sizes[0]).num_tokens,
        )

    def kv_bytes(self, num_tokens: int, bytes_per_number: float) -> float:
        """Keys and values of so many tokens, all layers."""
        return 2.0 * self.num_layers * self.num_kv_heads * self.head_dim * bytes_per_number * num_tokens


@dataclass(frozen=True)
class StepCost:
    """Seconds of one step of an engine."""

    fixed: float
    per_row: float
    per_token: float

    def seconds(self, num_rows: float, num_tokens: float) -> float:
        """Of a step with so many sequences, and tokens in all of them together."""
        return self.fixed + self.per_row * num_rows + self.per_token * num_tokens

    @classmethod
    def of_hardware(
        cls,
        shape: ModelShape,
        *,
        bandwidth: float,
        flops: float,
        overhead: float,
        bytes_per_number: float,
        num_gpus: int,
    ) -> StepCost:
        """What the hardware's limits allow: the weights read once a step, each row's keys and values, the arithmetic.

        bandwidth: bytes a second of one GPU. flops: a second, of one GPU, that the kernels reach. overhead: seconds a
        step that are neither. num_gpus: tensor-parallel, taken to share all work evenly; their talk belongs into
        `overhead`.
        """
        kv = shape.kv_bytes(shape.picture_tokens // 2, bytes_per_number)  # halfway through the picture
        return cls(
            fixed=overhead + shape.num_parameters * bytes_per_number / bandwidth / num_gpus,
            per_row=kv / bandwidth / num_gpus,
            per_token=2.0 * shape.num_parameters / flops / num_gpus,
        )

    @classmethod
    def fitted(cls, steps: Sequence[tuple[float, float, float]]) -> StepCost:
        """The least squares of the relative errors over measured (rows, tokens, seconds), no cost below 0."""
        measured = np.array(steps, dtype=float)
        design = np.column_stack([np.ones(len(measured)), measured[:, 0], measured[:, 1]]) / measured[:, 2:]
        free = [0, 1, 2]
        while True:
            cost = np.zeros(3)
            cost[free] = np.linalg.lstsq(design[:, free], np.ones(len(measured)), rcond=None)[0]
            if (cost >= 0).all():
                return cls(*cost.tolist())
            free.remove(int(np.argmin(cost)))


@dataclass(frozen=True)
class Capacity:
    """What one engine gives with so many pictures at once."""

    batch: int
    window: int
    forwards: float
    step_seconds: float
    kv_bytes: float  # keys and values of all its pictures

    @property
    def latency(self) -> float:
        """Seconds from a picture's entering the engine to its last token."""
        return self.forwards * self.step_seconds

    @property
    def rate(self) -> float:
        """Pictures a second, of the engine."""
        return self.batch / self.latency


@dataclass(frozen=True)
class CapacityModel:
    """The model of one engine."""

    shape: ModelShape
    cost: StepCost
    gain: float = DEMO_GAIN  # tokens that an endless window adds to each forward
    is_guided: bool = True  # then a picture is two sequences
    prompt_tokens: int = _PROMPT_TOKENS
    bytes_per_number: float = 2

    @property
    def halves(self) -> int:
        """Sequences of a picture."""
        return 2 if self.is_guided else 1

    @property
    def kv_bytes_per_picture(self) -> float:
        """Keys and values of a finished picture, both halves."""
        tokens = self.shape.picture_tokens + self.prompt_tokens
        return self.halves * self.shape.kv_bytes(tokens, self.bytes_per_number)

    def forwards(self, window: int) -> float:
        """Of a picture with so many drafts in each window."""
        return self.shape.picture_tokens / (1 + self.gain * window / (window + _HALF_WINDOW))

    def at(self, batch: int, window: int) -> Capacity:
        """With a window given."""
        rows = batch * self.halves
        step = self.cost.seconds(rows, rows * (1 + window))
        return Capacity(batch, window, self.forwards(window), step, batch * self.kv_bytes_per_picture)

    def best(self, batch: int) -> Capacity:
        """With the window that gives the highest rate."""
        return max((self.at(batch, window) for window in WINDOWS), key=lambda capacity: capacity.rate)

    def largest_batch(self, free_bytes: float) -> int:
        """Pictures whose keys and values fit into the memory that weights and activations leave; may be 0."""
        return max(0, math.floor(free_bytes / self.kv_bytes_per_picture))


def smallest_batch_for(model: CapacityModel, rate: float, largest: int) -> Capacity | None:
    """The engine that gives a rate (pictures a second) with the fewest pictures at once, so with the least latency."""
    return next((c for c in map(model.best, range(1, largest + 1)) if c.rate >= rate), None)


def _num_parameters(path: Path) -> int:
    count = 0
    for file in sorted(path.glob("*.safetensors")):
        with safe_open(file, framework="np") as tensors:
            count += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    if not count:
        raise ConfigError("model", f"{str(path)!r} holds no safetensors.")
    return count
