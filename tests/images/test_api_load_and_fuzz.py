"""Short runs of the load and the fuzz script in benchmarks/, which check what they promise by themselves."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


def run(script: str, output: Path, **settings: int) -> dict[str, str]:
    """The script's row; fails with what it said if a promise was broken."""
    flags = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, str(BENCHMARKS / script), "--output", str(output), *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    with output.open() as file:
        (row,) = csv.DictReader(file)
    return row


def test_load(tmp_path: Path) -> None:
    row = run("load_server.py", tmp_path / "rows.csv", clients=30, seconds=30, compare=10)
    assert int(row["pictures"]) > 10
    assert int(row["aborted"]) > 0


def test_fuzz(tmp_path: Path) -> None:
    row = run("fuzz_server.py", tmp_path / "rows.csv", inputs=300, examples=10)
    assert "400" in row["answers"]
