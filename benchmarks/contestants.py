"""Engines in processes of their own that decode pictures on demand, so that several can take turns in one run.

`stock` is vLLM as it is installed, without this plugin: a guided picture costs it two sequences, which it decodes
without guidance, since it has none. `ours` is this plugin's engine, for plain decoding and for SJD.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ENGINES = ("stock", "ours")


@dataclass(frozen=True)
class Turn:
    """What one turn of decoding took: seconds of each picture and of all, and the forwards of each picture."""

    latencies: list[float]
    seconds: float
    forwards: list[int]


# method, seeds and pictures at once
Decode = Callable[[str, list[int], int], Turn]


class Contestant:
    """A child process with an engine for so many pictures at once.

    Attributes:
        start_seconds: from the start of the process to an engine that has decoded its first picture.
    """

    def __init__(self, engine: str, max_batch_size: int, window: int) -> None:
        started = time.perf_counter()
        command = [sys.executable, str(Path(__file__)), engine, str(max_batch_size), str(window)]
        # compiled sources stay, as those of installed packages do
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self.decode("none", [0], 1)
        self.start_seconds = time.perf_counter() - started

    def decode(self, method: str, seeds: list[int], concurrency: int) -> Turn:
        """One picture a seed, by "none" or "sjd", so many at once; caption i belongs to seed i."""
        assert self._process.stdin is not None and self._process.stdout is not None
        print(json.dumps([method, seeds, concurrency]), file=self._process.stdin, flush=True)
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("an engine's process has ended")
        return Turn(**json.loads(line))

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)


def main() -> None:
    """The child: a turn for each line of standard input."""
    engine, max_batch_size, window = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    from sjd_vllm.images.environment import prepare_environment
    from sjd_vllm.images.streams import reserved_stdout

    prepare_environment(is_quiet=True)
    with reserved_stdout() as stdout:
        _, decode = {"stock": stock, "ours": ours}[engine](max_batch_size, window)
        for line in sys.stdin:
            print(json.dumps(vars(decode(*json.loads(line)))), file=stdout, flush=True)


def _pictures(pipeline: Any, method: str, seeds: list[int]) -> list[Any]:
    from sjd_vllm.demo.captions import captions
    from sjd_vllm.images.request import ImageRequest

    prompts = captions(max(seeds) + 1, 0)
    return list(pipeline.plan([ImageRequest(prompts[seed], seed=seed, method=method) for seed in seeds]))


def ours(max_batch_size: int, window: int, model: str | Path | None = None, **engine_args: Any) -> tuple[Any, Decode]:
    """This plugin's engine, and what decodes with it; the demo model if no other is named."""
    from sjd_vllm.images.pipeline import ImagePipeline

    pipeline = ImagePipeline(model, num_speculative_tokens=window, max_batch_size=max_batch_size, **engine_args)
    pipeline.start()
    assert pipeline._engine is not None

    def decode(method: str, seeds: list[int], concurrency: int) -> Turn:
        assert pipeline._engine is not None
        started = time.perf_counter()
        decoded = pipeline._engine.decode(_pictures(pipeline, method, seeds), batch_size=concurrency)
        seconds = time.perf_counter() - started
        return Turn(
            [picture.seconds for picture in decoded], seconds, [len(picture.tokens_per_step) for picture in decoded]
        )

    return pipeline._engine._llm, decode


def stock(max_batch_size: int, window: int, model: str | Path | None = None, **engine_args: Any) -> tuple[Any, Decode]:
    """The settings of our engine, but for those that name the plugin; the family's model class is known to it."""
    from vllm import EngineArgs, LLMEngine, ModelRegistry, SamplingParams
    from vllm.sampling_params import RequestOutputKind

    from sjd_vllm.images.engine import engine_settings
    from sjd_vllm.images.pipeline import ImagePipeline
    from sjd_vllm.models.registry import architectures

    for name, model_class in architectures():
        ModelRegistry.register_model(name, model_class)
    max_model_len = engine_args.pop("max_model_len", None)
    pipeline = ImagePipeline(
        model, num_speculative_tokens=window, max_batch_size=max_batch_size, max_model_len=max_model_len
    )
    settings = engine_settings(pipeline.family, pipeline.config, max_batch_size, pipeline.max_model_len)
    del settings["speculative_config"]
    settings |= {"skip_tokenizer_init": True, "disable_log_stats": True, **engine_args}
    llm = LLMEngine.from_engine_args(EngineArgs(model=str(pipeline.model), **settings))

    def submit(picture: Any, name: str) -> None:
        halves = (picture.prompt_token_ids, list(picture.sjd.negative_prompt_token_ids))
        for half, prompt in enumerate(halves):
            sampling = SamplingParams(
                temperature=picture.temperature,
                top_k=picture.top_k,
                top_p=picture.top_p,
                max_tokens=picture.num_tokens,
                ignore_eos=True,
                detokenize=False,
                output_kind=RequestOutputKind.DELTA,
            )
            llm.add_request(f"{name}/{half}", {"prompt_token_ids": prompt}, sampling)

    def decode(method: str, seeds: list[int], concurrency: int) -> Turn:
        pictures = _pictures(pipeline, "none", seeds)
        num_tokens = pictures[0].num_tokens
        begun: dict[str, float] = {}
        left: dict[str, int] = {}
        latencies = []
        started = time.perf_counter()
        while pictures or left:
            while pictures and len(left) < concurrency:
                picture = pictures.pop(0)
                name = str(picture.seed)
                begun[name], left[name] = time.perf_counter(), 2
                submit(picture, name)
            for output in llm.step():
                if output.finished:
                    name = output.request_id.split("/")[0]
                    left[name] -= 1
                    if not left[name]:
                        del left[name]
                        latencies.append(time.perf_counter() - begun[name])
        return Turn(latencies, time.perf_counter() - started, [num_tokens] * len(latencies))

    return llm, decode


if __name__ == "__main__":
    main()
