"""The benchmark of the Triton kernels at a tiny shape: it checks them, counts bytes and writes rows."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernel_cases import kernel_device

DEVICE = kernel_device()
PROGRAM = [sys.executable, "-m", "benchmarks.gpu.kernels"]
ROOT = Path(__file__).parents[2]


def test_a_row_a_kernel(tmp_path: Path) -> None:
    shape = ["--requests", "2", "--slots", "3", "--columns", "37", "--repeats", "1"]
    command = [*PROGRAM, "--small", *shape, "--output", str(tmp_path)]
    for _ in range(2):  # the second run finds that all is measured
        subprocess.run(command, cwd=ROOT, check=True, timeout=240)
    with (tmp_path / "gpu_kernels.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    rows = {row["kernel"]: row for row in found}
    assert len(found) == len(rows)
    assert set(rows) == {"gumbel_choices", "process_target", "verify_and_refresh"}
    assert int(rows["process_target"]["bytes"]) == 2 * 3 * 37 * (2 + 2 + 4)
    assert {row["device"] == "cpu-interpreter" for row in rows.values()} == {not torch.cuda.is_available()}


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU, figures belong there")
def test_no_figure_of_the_interpreter_among_the_results() -> None:
    run = subprocess.run(PROGRAM, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert run.returncode
    assert "no GPU" in run.stderr
