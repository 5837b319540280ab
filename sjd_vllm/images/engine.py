"""A vLLM engine in this process, as the pipeline uses it: picture requests in, tokens out."""

from __future__ import annotations

import gc
import itertools
import os
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sjd_vllm.config import SJDConfig
from sjd_vllm.images.environment import max_cpu_threads, prepare_environment
from sjd_vllm.images.request import PictureRequest
from sjd_vllm.models.family import ImageFamily

# Called with the index of a picture that got tokens and how many it has by now.
TokenProgress = Callable[[int, int], None]
# Called with the index of a picture that is finished, and the picture.
Finished = Callable[[int, "DecodedPicture"], None]

_KV_BLOCK_SIZE = 128  # tokens in a KV block of vLLM's CPU build
_GPU_SHARE_BESIDE_PIXELS = 0.85  # of its GPU's memory that vLLM takes, 0.92 by itself


@dataclass
class DecodedPicture:
    """Tokens of one picture while and after it is decoded; the fields as in `Picture`."""

    token_ids: list[int]
    started: float
    tokens_per_step: list[int] = field(default_factory=list)
    seconds: float = 0.0


def engine_settings(family: ImageFamily, config: SJDConfig, max_batch_size: int, max_model_len: int) -> dict[str, Any]:
    """Fields of `vllm.EngineArgs` for decoding so many pictures at once; the arguments as in `PictureEngine`."""
    from vllm.platforms import current_platform

    max_num_seqs = 2 * max_batch_size
    # Every window of a full batch must fit into one step, beside the two prompts of a guided newcomer: a window
    # that the scheduler cuts wastes drafts, and makes the picture depend on what is decoded beside it.
    step_tokens = max_num_seqs * (config.num_speculative_tokens + 1) + 2 * max_model_len
    settings: dict[str, Any] = {
        "speculative_config": {"method": "sjd", **config.to_mapping()},
        "max_num_seqs": max_num_seqs,
        "max_num_batched_tokens": max(2048, step_tokens),
        "max_model_len": max_model_len,
    }
    if current_platform.is_cpu():
        if not config.max_cpu_threads:
            settings["speculative_config"]["max_cpu_threads"] = max_cpu_threads()
        settings["dtype"] = "float32"
        settings["enforce_eager"] = True
        settings["kv_cache_memory_bytes"] = _kv_cache_bytes(family, max_num_seqs, max_model_len)
    elif config.pixel_device != "cpu":
        settings["gpu_memory_utilization"] = _GPU_SHARE_BESIDE_PIXELS
    return settings


class PictureEngine:
    """Starts vLLM with method "sjd" and drives it step by step.

    Args:
        family: of the checkpoint.
        config: window and strategies.
        max_batch_size: how many pictures are decoded at once; each takes two sequences of vLLM's under guidance.
        max_model_len: tokens of the longest sequence.
        engine_args: anything else that `vllm.EngineArgs` takes; goes before our own choices.
    """

    def __init__(
        self,
        family: ImageFamily,
        config: SJDConfig,
        max_batch_size: int,
        max_model_len: int,
        engine_args: dict[str, Any],
    ) -> None:
        prepare_environment()
        from vllm import EngineArgs, LLMEngine
        from vllm.platforms import current_platform

        from sjd_vllm.plugin import register

        # vLLM finds the plugin by itself, unless VLLM_PLUGINS names others or the package runs uninstalled.
        register()
        settings = {
            **engine_settings(family, config, max_batch_size, max_model_len),
            "per_request_spec_decode_metrics": "detailed",
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
        }
        if current_platform.is_cpu():
            # The variable alone would be too late if torch was imported before us.
            torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        self._llm = LLMEngine.from_engine_args(EngineArgs(model=str(family.path), **{**settings, **engine_args}))
        self._next_id = itertools.count()
        self.max_batch_size = max_batch_size

    def decode(
        self,
        requests: Sequence[PictureRequest],
        *,
        batch_size: int | None = None,
        on_tokens: TokenProgress | None = None,
        on_finished: Finished | None = None,
    ) -> list[DecodedPicture]:
        """Decode the pictures, at most `batch_size` of them at a time, and return them in the order given."""
        waiting = deque(enumerate(requests))
        running: dict[str, int] = {}
        decoded: dict[int, DecodedPicture] = {}
        slots = min(batch_size or self.max_batch_size, self.max_batch_size)
        try:
            while waiting or running:
                while waiting and len(running) < slots:
                    index, request = waiting.popleft()
                    decoded[index] = DecodedPicture(list(request.given_token_ids), time.perf_counter())
                    running[self._submit(request)] = index
                for output in self._llm.step():
                    index = running[output.request_id]
                    _record(decoded[index], requests[index], output)
                    if on_tokens is not None:
                        on_tokens(index, len(decoded[index].token_ids))
                    if output.finished:
                        del running[output.request_id]
                        if on_finished is not None:
                            on_finished(index, decoded[index])
        finally:
            # After an error or Ctrl-C; the engine stays usable.
            if running:
                self._llm.abort_request(list(running))
        return [decoded[index] for index in range(len(requests))]

    def close(self) -> None:
        """Stop the engine and free what it holds; a new one may be started in the same process."""
        from vllm.distributed import cleanup_dist_env_and_memory

        self._llm.engine_core.shutdown()
        del self._llm
        gc.collect()
        cleanup_dist_env_and_memory()

    def _submit(self, request: PictureRequest) -> str:
        request_id = str(next(self._next_id))
        self._llm.add_request(request_id, request.engine_prompt, request.sampling_params())
        return request_id


def _record(picture: DecodedPicture, request: PictureRequest, output: Any) -> None:
    completion = output.outputs[0]
    picture.token_ids.extend(completion.token_ids)
    if output.finished:
        picture.seconds = time.perf_counter() - picture.started
        metrics = completion.spec_decode_metrics
        # A forward gives one more than the drafts it accepted.
        accepted = metrics.per_step_accepted if metrics else [0] * request.num_new_tokens
        picture.tokens_per_step = [count + 1 for count in accepted]


def _kv_cache_bytes(family: ImageFamily, num_sequences: int, max_model_len: int) -> int:
    """Memory for the keys and values of so many full sequences in float32, and no more: nothing else is cached."""
    blocks = num_sequences * -(-max_model_len // _KV_BLOCK_SIZE) + 1  # vLLM keeps one block for itself
    return blocks * _KV_BLOCK_SIZE * family.shape.kv_bytes_per_token(4)
