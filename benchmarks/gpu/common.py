"""What the parts share: flags, files of rows, engines of the 7B shape with random weights."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.shape import LARGE, SMALL, Shape, write_checkpoint
from sjd_vllm.config import ConfigError
from sjd_vllm.images.flags import Parser
from sjd_vllm.images.machine import provenance
from sjd_vllm.images.rows import append_rows, measured_cells

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
SMALL_OUTPUT = ROOT / "out" / "gpu-small"
WORK = ROOT / "out" / "gpu"
# vLLM's own switch between its model runners; unset, vLLM decides
RUNNER_SWITCH = "VLLM_USE_V2_MODEL_RUNNER"
# Rows that agree in these columns may be compared.
SAME_RUN = ("commit", "hardware", "versions", "runner_switch")
# Of prompts; a picture's own tokens come on top.
_PROMPT_TOKENS = 128


@dataclass(frozen=True)
class Run:
    """How a part is run.

    Attributes:
        is_small: a small shape, as a check that the part works; on a CPU too.
        output: folder of the files of rows.
        work: folder for what is made on the way; may be deleted.
        commit: of the files, where git does not know it.
    """

    is_small: bool
    output: Path
    work: Path
    commit: str = ""

    @classmethod
    def from_flags(cls, args: argparse.Namespace) -> Run:
        """Raises ConfigError for a machine without a GPU, and for figures that do not belong among the results."""
        output = Path(args.output or (SMALL_OUTPUT if args.small else RESULTS)).resolve()
        if not args.small and not torch.cuda.is_available():
            raise ConfigError("small", "no GPU was found; --small runs the parts in a small form, on a CPU too.")
        if args.small and output.is_relative_to(RESULTS):
            raise ConfigError("output", "rows of small runs do not belong in benchmarks/results; name another folder.")
        output.mkdir(parents=True, exist_ok=True)
        return cls(args.small, output, Path(args.work).resolve(), args.commit)

    @property
    def shape(self) -> Shape:
        """Of the model that engines run."""
        return SMALL if self.is_small else LARGE

    @property
    def device(self) -> torch.device:
        """Of everything that is measured."""
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @cached_property
    def checkpoint(self) -> Path:
        """The folder of the shape, written if it is not there."""
        return write_checkpoint(self.work / self.shape.name, self.shape)

    def engine_args(self) -> dict[str, Any]:
        """Of every engine, whoever's it is: fields of `ImagePipeline` and `vllm.EngineArgs`."""
        settings: dict[str, Any] = {
            "model": self.checkpoint,
            "load_format": "dummy",
            "max_model_len": self.shape.num_tokens + _PROMPT_TOKENS,
        }
        if self.device.type == "cuda":
            settings["dtype"] = "bfloat16"
        return settings

    def file(self, part: str) -> Path:
        """Of the rows of a part."""
        return self.output / f"gpu_{part}.csv"

    def rows(self, part: str, *cell: str) -> Rows:
        """The file of a part; `cell` are the columns that say which cell of its table a row is."""
        return Rows(self.file(part), cell, self.commit)


def taken_on(commit: str = "") -> dict[str, str]:
    """The first columns of every row; `commit` is for files that git knows nothing of."""
    found = provenance()
    return {**found, "commit": found["commit"] or commit, "runner_switch": os.environ.get(RUNNER_SWITCH, "")}


class Rows:
    """Rows of one part. A cell that has one of this commit, hardware, versions and runner is not measured again."""

    def __init__(self, path: Path, cell: tuple[str, ...], commit: str = "") -> None:
        self._path = path
        self._columns = (*SAME_RUN, *cell)
        self._taken_on = taken_on(commit)

    def has(self, **cell: object) -> bool:
        """Whether the file has this cell."""
        wanted = {**self._taken_on, **cell}
        return tuple(str(wanted[name]) for name in self._columns) in measured_cells(self._path, self._columns)

    def append(self, row: dict[str, object]) -> None:
        """Add a row, and show it."""
        append_rows(self._path, [{**self._taken_on, **row}])
        print("  ".join(f"{name} {value}" for name, value in row.items()), flush=True)


def parser(description: str | None) -> Parser:
    """With the flags that every part has."""
    made = Parser(description=description)
    made.add_argument("--small", action="store_true", help="a small shape, on a CPU too; no row goes to results/")
    made.add_argument("--output", help=f"folder of the rows ({RESULTS.relative_to(ROOT)})")
    made.add_argument("--work", default=str(WORK), help=f"folder for the rest ({WORK.relative_to(ROOT)})")
    made.add_argument("--commit", default="", help="of the files, where they are a copy without git")
    return made


def runner_of(llm_engine: Any) -> Any:
    """The model runner of an engine that lives in this process."""
    return llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def runner_name(llm_engine: Any) -> str:
    """Its class, and which of vLLM's runners it is."""
    kind = type(runner_of(llm_engine))
    version = "V2" if any(base.__module__.startswith("vllm.v1.worker.gpu.") for base in kind.__mro__) else "V1"
    return f"{version} {kind.__name__}"


@torch.no_grad()
def fill_weights(llm_engine: Any) -> None:
    """Weights as a fresh model has them, in place: normal with deviation 0.02, norms 1, biases 0; the same each time.

    vLLM's dummy weights lie within 0.001, norms too, so all logits would nearly be equal: the choice among them would
    be among ties, and attention would look at all positions alike.
    """
    for index, (name, parameter) in enumerate(runner_of(llm_engine).get_model().named_parameters()):
        if not parameter.is_floating_point():
            continue
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name:
            parameter.fill_(1.0)
        else:
            parameter.normal_(std=0.02, generator=torch.Generator(parameter.device).manual_seed(index))
