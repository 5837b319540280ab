"""Workers that run our model runner. vLLM imports them by name in every worker process."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.cpu_worker import CPUWorker
from vllm.v1.worker.gpu_model_runner import GPUModelRunner
from vllm.v1.worker.gpu_worker import Worker

from sjd_kernels.gumbel_choices_cpu import compile_now
from sjd_vllm.build import BUILD_KEY, require_build
from sjd_vllm.engine.v1_runner import SJDRunnerMixin


class SJDGPUModelRunner(SJDRunnerMixin, GPUModelRunner):
    """vLLM's V1 runner on a GPU, with self-drafting."""


class SJDCPUModelRunner(SJDRunnerMixin, CPUModelRunner):
    """vLLM's V1 runner on a CPU, with self-drafting."""


def _require_same_build(vllm_config: Any) -> None:
    """Workers may run on other nodes than their engine. Raises OtherBuildError."""
    require_build(vllm_config.additional_config[BUILD_KEY], vllm_config.model_config.model)


class SJDGPUWorker(Worker):
    """A GPU worker whose runner drafts for itself."""

    def init_device(self) -> None:
        _require_same_build(self.vllm_config)
        super().init_device()

    def _make_model_runner(self) -> Any:
        if self.use_v2_model_runner:
            raise RuntimeError("sjd runs on vLLM's V1 model runner; unset VLLM_USE_V2_MODEL_RUNNER")
        return SJDGPUModelRunner(self.vllm_config, self.device)


class SJDCPUWorker(CPUWorker):
    """A CPU worker whose runner drafts for itself."""

    def init_device(self) -> None:
        _require_same_build(self.vllm_config)
        super().init_device()
        if type(self.model_runner) is not CPUModelRunner:
            raise RuntimeError(
                f"sjd runs on vLLM's V1 model runner; found {type(self.model_runner).__name__}. "
                "Unset VLLM_USE_V2_MODEL_RUNNER."
            )
        # CPUWorker builds its runner by a fixed name; ours adds methods only, so the class can be swapped.
        self.model_runner.__class__ = SJDCPUModelRunner
        compile_now()
