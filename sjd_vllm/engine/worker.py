"""Workers that run our model runner. vLLM imports them by name in every worker process."""

from __future__ import annotations

import logging
import time
from functools import cached_property
from typing import Any

import torch
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from sjd_kernels import gumbel_choices_cpu, sweep_cpu
from sjd_vllm.build import BUILD_KEY, require_build
from sjd_vllm.engine import cpu_forward
from sjd_vllm.engine.cpu_threads import ThreadControl
from sjd_vllm.engine.v1_runner import SJDRunnerMixin

_LOGGER = logging.getLogger("vllm.sjd_vllm")  # below vLLM's own logger, whose handler and level it shares


class SJDGPUModelRunner(SJDRunnerMixin, GPUModelRunner):
    """vLLM's V1 runner on a GPU, with self-drafting."""


class SJDCPUModelRunner(SJDRunnerMixin, CPUModelRunner):
    """vLLM's V1 runner on a CPU, with self-drafting, and as many threads a step as pay."""

    @cached_property
    def _threads(self) -> ThreadControl:
        few = torch.get_num_threads()
        # Ranks that share the cores would judge by each other's waiting.
        is_alone = self.parallel_config.world_size == 1
        return ThreadControl(few, max(few, self._sjd.config.max_cpu_threads) if is_alone else few)

    def execute_model(self, scheduler_output: Any, *args: Any, **kwargs: Any) -> Any:
        """The forward, with threads by its number of tokens."""
        num_tokens = scheduler_output.total_num_scheduled_tokens
        num_threads = self._threads.choose(num_tokens)
        if num_threads != torch.get_num_threads():
            # vLLM's CPU worker replaces torch.set_num_threads by a warning, because it pins threads to cores; a front
            # door that asks for more threads has switched that off (VLLM_CPU_OMP_THREADS_BIND=nobind).
            torch._C.set_num_threads(num_threads)
        started = time.perf_counter()
        output = super().execute_model(scheduler_output, *args, **kwargs)
        self._threads.observe(num_tokens, num_threads, time.perf_counter() - started)
        return output


def _require_same_build(vllm_config: Any) -> None:
    """Workers may run on other nodes than their engine. Raises OtherBuildError."""
    require_build(vllm_config.additional_config[BUILD_KEY], vllm_config.model_config.model)


def _say_which_runner(vllm_config: Any) -> None:
    runner = "V2" if vllm_config.use_v2_model_runner else "V1"
    scheduling = "asynchronous" if vllm_config.scheduler_config.async_scheduling else "synchronous"
    _LOGGER.info("speculative Jacobi decoding on Model Runner %s, %s scheduling", runner, scheduling)


class SJDGPUWorker(Worker):
    """A GPU worker whose runner drafts for itself."""

    def init_device(self) -> None:
        _require_same_build(self.vllm_config)
        super().init_device()

    def _make_model_runner(self) -> Any:
        _say_which_runner(self.vllm_config)
        if self.use_v2_model_runner:
            from sjd_vllm.engine.v2_runner import SJDGPUModelRunnerV2  # wants Triton

            return SJDGPUModelRunnerV2(self.vllm_config, self.device)
        return SJDGPUModelRunner(self.vllm_config, self.device)


class SJDCPUWorker(CPUWorker):
    """A CPU worker whose runner drafts for itself."""

    def init_device(self) -> None:
        _require_same_build(self.vllm_config)
        if self._is_float32:
            cpu_forward.use_pytorchs_products()
        super().init_device()
        cpu_forward.use_kernels_for_norms(self.vllm_config)
        _say_which_runner(self.vllm_config)
        # CPUWorker builds its runner by a fixed name; ours add methods only, so the class can be swapped.
        if self.use_v2_model_runner:
            from sjd_vllm.engine.v2_runner import SJDCPUModelRunnerV2  # wants Triton

            self.model_runner.__class__ = SJDCPUModelRunnerV2
        else:
            self.model_runner.__class__ = SJDCPUModelRunner
        gumbel_choices_cpu.compile_now()
        sweep_cpu.compile_now()

    def load_model(self, **kwargs: Any) -> None:
        super().load_model(**kwargs)
        if self._is_float32:
            cpu_forward.turn_weights(self.model_runner.model)
        cpu_forward.warn_of_saturation(self.model_runner.model)

    @property
    def _is_float32(self) -> bool:
        return bool(self.model_config.dtype == torch.float32)
