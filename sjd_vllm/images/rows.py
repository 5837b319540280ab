"""Rows of results in CSV files."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

from sjd_vllm.config import ConfigError


def check_rows_file(path: str | Path, columns: Sequence[str]) -> None:
    """Raise ConfigError unless rows with these columns can be appended to the file."""
    path = Path(path)
    try:
        if path.exists() and path.stat().st_size:
            with path.open(newline="") as file:
                found = next(csv.reader(file))
            if found != list(columns):
                raise ConfigError("output_row", f"{path} holds other columns: {', '.join(found)}.")
        with path.open("a"):
            pass
    except OSError as error:
        raise ConfigError("output_row", f"cannot write rows to {str(path)!r}: {error.strerror}.") from error


def append_rows(path: str | Path, rows: Sequence[Mapping[str, object]]) -> None:
    """Append rows of the same columns, with a header if the file is new."""
    path = Path(path)
    columns = list(rows[0])
    check_rows_file(path, columns)
    is_new = not path.stat().st_size
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)


def measured_cells(path: str | Path, columns: Sequence[str]) -> set[tuple[str, ...]]:
    """What a file's rows say in some columns; nothing for a file that is not there. A column it lacks is empty."""
    path = Path(path)
    if not path.exists():
        return set()
    with path.open(newline="") as file:
        return {tuple(row.get(name) or "" for name in columns) for row in csv.DictReader(file)}


def rounded(value: float, digits: int = 4) -> float:
    """A measured number with as many digits as it deserves.

    >>> rounded(2.34567), rounded(1234.567, digits=2)
    (2.346, 1200.0)
    """
    return float(f"{value:.{digits}g}")
