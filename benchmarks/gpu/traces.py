"""Acceptance traces of the demo model: how many tokens each forward of a picture gave, by window.

Run as a program, it records them on this machine with the real engine and the demo model, captions and seeds 0, 1, ...,
strategy `gumbel`, the model's own guidance and top-k, and writes traces.json beside itself. The counts depend on model,
seeds and windows alone, not on the hardware: under fixed noise a picture's forwards are a function of these.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd_vllm.config import ConfigError, check_int, check_window
from sjd_vllm.images.flags import Parser, int_list

TRACES = Path(__file__).parent / "traces.json"
# Those that the engine's controller picks among, up to its longest.
WINDOWS = [2, 4, 6, 8, 12, 16, 24, 32, 48, 64]


@dataclass(frozen=True)
class Traces:
    """Attributes:
    num_tokens: of each picture.
    windows: ascending; 0, where a forward gives one token, is left out.
    steps: by window and picture, the tokens of each forward in order; 1 to window + 1 each, num_tokens in all.
    """

    num_tokens: int
    steps: dict[int, list[list[int]]]

    def __post_init__(self) -> None:
        for window, pictures in self.steps.items():
            if len(pictures) != self.num_pictures:
                raise ValueError(f"the traces have {self.num_pictures} pictures; window {window} has {len(pictures)}")
            for steps in pictures:
                if sum(steps) != self.num_tokens or min(steps) < 1 or max(steps) > window + 1:
                    raise ValueError(f"a trace of window {window} is none of {self.num_tokens} tokens: {steps}")

    @property
    def windows(self) -> list[int]:
        return sorted(self.steps)

    @property
    def num_pictures(self) -> int:
        return len(next(iter(self.steps.values())))

    def tokens_per_forward(self, window: int) -> float:
        """Mean over all pictures; of the longest window recorded up to this one, 1 where none is."""
        recorded = [shorter for shorter in self.windows if shorter <= window]
        if not recorded:
            return 1.0
        window = recorded[-1]
        return self.num_pictures * self.num_tokens / sum(len(steps) for steps in self.steps[window])

    @classmethod
    def load(cls, file: Path = TRACES) -> Traces:
        """Raises ValueError for counts that cannot be."""
        content = json.loads(file.read_text())
        steps = {
            int(window): [[int(count) for count in line.split()] for line in lines]
            for window, lines in content["tokens_by_forward"].items()
        }
        return cls(content["num_tokens"], steps)


def record(pipeline: Any, num_pictures: int, windows: list[int]) -> Traces:
    """Decode the captions at each window with a pipeline whose engine has a window as long."""
    from sjd_vllm.demo.captions import captions

    steps: dict[int, list[list[int]]] = {}
    for window in windows:
        result = pipeline.generate(
            captions(num_pictures, 0), seed=list(range(num_pictures)), num_speculative_tokens=window
        )
        steps[window] = [list(picture.tokens_per_step) for picture in result.pictures]
    return Traces(len(result.pictures[0].token_ids), steps)


def main() -> None:
    """Record and write."""
    parser = Parser(description=__doc__)
    parser.add_argument("--pictures", type=int, default=64, help="captions to decode (64)")
    parser.add_argument("--windows", type=int_list, default=WINDOWS, help="comma-separated (those of the controller)")
    parser.add_argument("--output", type=Path, default=TRACES, help="file to write")
    args = parser.parse_args()
    check_int("pictures", args.pictures, 1, 10_000)
    for window in args.windows:
        check_window("windows", window)
    from sjd_vllm.images.environment import prepare_environment

    prepare_environment(is_quiet=True)
    from sjd_vllm.images.machine import provenance
    from sjd_vllm.images.pipeline import ImagePipeline

    taken_on = provenance()
    with ImagePipeline(num_speculative_tokens=max(args.windows), max_batch_size=8) as pipeline:
        traces = record(pipeline, args.pictures, sorted(args.windows))
        defaults = pipeline.family.defaults
    content = {
        **taken_on,
        "model": "demo",
        "guidance_scale": defaults.guidance_scale,
        "top_k": defaults.top_k,
        "temperature": defaults.temperature,
        "num_tokens": traces.num_tokens,
        "tokens_by_forward": {
            window: [" ".join(map(str, steps)) for steps in traces.steps[window]] for window in traces.windows
        },
    }
    args.output.write_text(json.dumps(content, indent=1) + "\n")
    for window in traces.windows:
        print(f"window {window}: {traces.tokens_per_forward(window):.3f} tokens a forward")


if __name__ == "__main__":
    try:
        main()
    except ConfigError as error:
        sys.exit(f"traces.py: error: {error}")
