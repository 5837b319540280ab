"""Workers that run our model runner. vLLM imports them by name in every worker process."""

from __future__ import annotations

from typing import Any

import torch
from vllm import _custom_ops
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from sjd_kernels.gumbel_choices_cpu import compile_now
from sjd_vllm.engine.v1_runner import SJDRunnerMixin


class SJDGPUModelRunner(SJDRunnerMixin, GPUModelRunner):
    """vLLM's V1 runner on a GPU, with self-drafting."""


class SJDCPUModelRunner(SJDRunnerMixin, CPUModelRunner):
    """vLLM's V1 runner on a CPU, with self-drafting."""


class SJDGPUWorker(Worker):
    """A GPU worker whose runner drafts for itself."""

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            raise RuntimeError("sjd runs on vLLM's V1 model runner; unset VLLM_USE_V2_MODEL_RUNNER")
        return SJDGPUModelRunner(self.vllm_config, self.device)


class SJDCPUWorker(CPUWorker):
    """A CPU worker whose runner drafts for itself."""

    def init_device(self) -> None:
        if self.model_config.dtype == torch.float32:
            # vLLM's own matrix product on a CPU compiles a kernel for every new number of tokens, and memory grows with
            # each. Windows make that number change from step to step; PyTorch's product takes any at the same speed.
            _custom_ops._supports_onednn = False
        super().init_device()
        if type(self.model_runner) is not CPUModelRunner:
            raise RuntimeError(
                f"sjd runs on vLLM's V1 model runner; found {type(self.model_runner).__name__}. "
                "Unset VLLM_USE_V2_MODEL_RUNNER."
            )
        # CPUWorker builds its runner by a fixed name; ours adds methods only, so the class can be swapped.
        self.model_runner.__class__ = SJDCPUModelRunner
        compile_now()
