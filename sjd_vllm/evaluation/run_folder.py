"""The folder of one evaluation: what was asked for, and a line for each picture that is done.

run.json                    settings; a run is only gone on with under the same ones
records.jsonl               a `Record` a line, appended when its picture lies on the disk
pictures/METHOD/00012-0.png prompt 12, its first picture
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sjd_vllm.config import ConfigError
from sjd_vllm.evaluation.methods import Method
from sjd_vllm.evaluation.suites import SuitePrompt

_SETTINGS = "run.json"
_RECORDS = "records.jsonl"
# May differ between two starts of one run: where and when, not what.
_FREE = ("provenance",)


@dataclass(frozen=True)
class Record:
    """One picture.

    Attributes:
        method: label of the method.
        prompt_index: place of the prompt in its suite.
        image_index: which of the prompt's pictures, from 0.
        seed: its own.
        token_ids: the tokens that the model wrote.
        tokens_per_step: tokens that each forward gave.
        seconds: from entering the engine to the last token.
        path: of the PNG, relative to the folder.
    """

    method: str
    prompt_index: int
    image_index: int
    seed: int
    token_ids: list[int]
    tokens_per_step: list[int]
    seconds: float
    path: str

    @property
    def num_steps(self) -> int:
        """Forwards that gave tokens."""
        return len(self.tokens_per_step)

    @property
    def key(self) -> tuple[int, int]:
        """What two methods' pictures of the same prompt and seed share."""
        return self.prompt_index, self.image_index


class RunFolder:
    """Reads and appends; made by `create` or `open`."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        self.settings = settings

    @classmethod
    def create(cls, path: str | Path, settings: dict[str, Any]) -> RunFolder:
        """Start a run, or go on with one of the same settings.

        Raises ConfigError if the folder holds a run with others (it names them), or cannot be written.
        """
        path = Path(path)
        settings = json.loads(json.dumps(settings))
        file = path / _SETTINGS
        try:
            if file.is_file():
                run = cls.open(path)
                differing = [
                    name
                    for name in sorted({*settings, *run.settings} - {*_FREE})
                    if settings.get(name) != run.settings.get(name)
                ]
                if differing:
                    was = ", ".join(f"{name} was {_short(run.settings.get(name))}" for name in differing)
                    raise ConfigError("output", f"{path} holds a run with other settings: {was}. Name another folder.")
                return run
            path.mkdir(parents=True, exist_ok=True)
            _write(file, settings)
        except OSError as error:
            raise ConfigError("output", f"cannot write to {str(path)!r}: {error.strerror}.") from error
        return cls(path, settings)

    @classmethod
    def open(cls, path: str | Path) -> RunFolder:
        """Read a run. Raises ConfigError if the folder holds none."""
        path = Path(path)
        try:
            return cls(path, json.loads((path / _SETTINGS).read_text()))
        except (OSError, ValueError) as error:
            raise ConfigError("run", f"{str(path)!r} holds no run of `sjd-vllm eval`: {error}.") from error

    @property
    def methods(self) -> list[Method]:
        """In the order asked for."""
        return [Method(**method) for method in self.settings["methods"]]

    @property
    def prompts(self) -> dict[int, SuitePrompt]:
        """By their index."""
        return {prompt["index"]: SuitePrompt(**prompt) for prompt in self.settings["prompts"]}

    def records(self) -> list[Record]:
        """All pictures that are done. A last line that a crash tore off is cut from the file."""
        file = self.path / _RECORDS
        if not file.is_file():
            return []
        text = file.read_bytes()
        whole = text[: text.rfind(b"\n") + 1]
        if len(whole) < len(text):
            with file.open("r+b") as stream:
                stream.truncate(len(whole))
        return [Record(**json.loads(line)) for line in whole.splitlines()]

    def by_method(self) -> dict[str, list[Record]]:
        """The records of each method, in the order of prompts and pictures."""
        found: dict[str, list[Record]] = {method.label: [] for method in self.methods}
        for record in self.records():
            found[record.method].append(record)
        return {label: sorted(records, key=lambda record: record.key) for label, records in found.items()}

    def append(self, records: Iterable[Record]) -> None:
        """Add pictures; they are on the disk when this returns."""
        with (self.path / _RECORDS).open("a") as stream:
            stream.writelines(json.dumps(asdict(record)) + "\n" for record in records)
            stream.flush()
            os.fsync(stream.fileno())

    def picture_path(self, method: str, prompt_index: int, image_index: int) -> Path:
        """Where a picture lies; makes its folder."""
        path = self.path / "pictures" / method / f"{prompt_index:05d}-{image_index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def read(self, name: str) -> Any:
        """A result file of this run, or None."""
        file = self.path / name
        return json.loads(file.read_text()) if file.is_file() else None

    def write(self, name: str, content: Any) -> None:
        """Write a result file, whole or not at all."""
        _write(self.path / name, content)


def pairs(first: Iterable[Record], second: Iterable[Record]) -> Iterator[tuple[Record, Record]]:
    """Pictures of the same prompt and seed by two methods, where both are done."""
    by_key = {record.key: record for record in second}
    return ((record, by_key[record.key]) for record in first if record.key in by_key)


def _write(file: Path, content: Any) -> None:
    draft = file.with_suffix(file.suffix + ".part")
    draft.write_text(json.dumps(content, indent=1) + "\n")
    draft.replace(file)


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) < 60 else text[:57] + "..."
