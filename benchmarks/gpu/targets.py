"""What was asked of the GPU's engine, and what the rows of this commit on this hardware say."""

from __future__ import annotations

import csv
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu.common import SAME_RUN, Run, parser, taken_on
from sjd_vllm.config import ConfigError

Row = dict[str, str]


@dataclass(frozen=True)
class Target:
    """A figure that is to be reached, asked of one H200 with the 7B shape, bfloat16 and guidance.

    Attributes:
        is_least: whether the bound is the least allowed, or the most.
        value: from the rows by part; None while one is missing.
    """

    name: str
    bound: float
    is_least: bool
    value: Callable[[dict[str, list[Row]]], float | None]

    def verdict(self, found: float | None) -> str:
        """In a word."""
        if found is None:
            return "not measured"
        return "reached" if (found >= self.bound) == self.is_least or found == self.bound else "missed"


def main() -> None:
    """Print a line a target."""
    run = Run.from_flags(parser(__doc__).parse_args())
    parts = {part: own_rows(run.file(part), run.commit) for part in ("steps", "latency", "kernels")}
    for target in TARGETS:
        found = target.value(parts)
        shown = "" if found is None else f"{found:.3g}"
        sign = ">=" if target.is_least else "<="
        print(f"{target.name:<72} {sign} {target.bound:<5g} {shown:>7}  {target.verdict(found)}")


def own_rows(file: Path, commit: str = "") -> list[Row]:
    """The rows of a file that are of this commit, hardware, versions and runner; the newest last."""
    if not file.exists():
        return []
    own = taken_on(commit)
    with file.open(newline="") as opened:
        rows = list(csv.DictReader(opened))
    return [row for row in rows if all(row[name] == own[name] for name in SAME_RUN)]


def _figure(rows: list[Row], name: str, **cell: object) -> float | None:
    found = [row for row in rows if all(row[key] == str(value) for key, value in cell.items())]
    return float(found[-1][name]) if found else None


def _ratio(over: float | None, under: float | None) -> float | None:
    return None if over is None or under is None else over / under


def _step_ratio(parts: dict[str, list[Row]]) -> float | None:
    with_window, without = (_figure(parts["steps"], "step_ms_p50", window=window, batch=1) for window in (32, 0))
    return _ratio(with_window, without)


def _outside(batch: int) -> Callable[[dict[str, list[Row]]], float | None]:
    return lambda parts: _figure(parts["steps"], "outside_forward_share", window=32, batch=batch)


def _latency(parts: dict[str, list[Row]]) -> float | None:
    plain, sjd = (_figure(parts["latency"], "latency_p50", contestant=name, concurrency=1) for name in ("plain", "sjd"))
    return _ratio(plain, sjd)


def _rate(concurrency: int) -> Callable[[dict[str, list[Row]]], float | None]:
    def ratio(parts: dict[str, list[Row]]) -> float | None:
        sjd, plain = (
            _figure(parts["latency"], "pictures_per_minute", contestant=name, concurrency=concurrency)
            for name in ("sjd", "plain")
        )
        return _ratio(sjd, plain)

    return ratio


def _times_floor(parts: dict[str, list[Row]]) -> float | None:
    """The worst of the shapes with a window and the codebook of the 7B shape."""
    found = [
        float(row["times_floor"])
        for row in parts["kernels"]
        if row["kernel"] == "gumbel_choices" and row["columns"] == "8192" and row["slots"] != "1"
    ]
    return max(found, default=None)


TARGETS = (
    Target("step at window 32 over window 0, batch 1", 1.15, False, _step_ratio),
    Target("share of the step outside the model's forward, window 32, batch 1", 0.05, False, _outside(1)),
    Target("share of the step outside the model's forward, window 32, batch 16", 0.05, False, _outside(16)),
    Target("latency, plain over SJD at the demo's acceptance, batch 1", 4.5, True, _latency),
    Target("pictures a minute, SJD over plain, 16 at once", 1.3, True, _rate(16)),
    Target("pictures a minute, SJD over plain, 64 at once", 1.0, True, _rate(64)),
    Target("gumbel_choices, times the floor of the copy bandwidth, worst shape", 3.0, False, _times_floor),
)


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"targets.py: error: {error}")
