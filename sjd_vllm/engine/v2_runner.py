"""Speculative Jacobi decoding on vLLM's Model Runner V2, the runner of its choice on GPUs.

A step: `prepare_inputs` writes each request's drafts to where the forward reads them, `sample` lets the fixed noise
choose at every scored position and puts the choices in the drafts' place. All of it is queued on the device; the host
waits for none of it, so the scheduler may prepare the next step meanwhile (asynchronous scheduling).

Only strategies whose tokens do not depend on windows can run so, which is `gumbel`; the others run on the V1 runner.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from vllm.v1.worker.cpu.model_runner import CPUModelRunner
from vllm.v1.worker.gpu.model_runner import GPUModelRunner
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.speculator import BaseSpeculator

from sjd_vllm.engine.admission import engine_config, family_of
from sjd_vllm.engine.device_states import DeviceStates
from sjd_vllm.engine.guidance_pairs import RunnerArgs

_LOGGER = logging.getLogger(__name__)


class SelfDraftingSpeculator(BaseSpeculator):
    """Stands where vLLM wants a speculator. The drafts are the runner's; what it proposes is never read."""

    supports_mm_inputs = False
    draft_logits = None

    def __init__(self, num_drafts: int, device: torch.device) -> None:
        self._num_drafts = num_drafts
        self._device = device

    def init_cudagraph_manager(self, cudagraph_mode: Any) -> None:
        """There is no model of its own to capture."""

    def capture(self) -> None:
        """There is no model of its own to capture."""

    def propose(self, input_batch: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Zeros [requests, W]; `DeviceStates.fill_inputs` writes the real drafts."""
        return torch.zeros(input_batch.num_reqs, self._num_drafts, dtype=torch.int64, device=self._device)


class SJDRunnerV2Mixin:
    """Placed before Model Runner V2. Adds no constructor: the CPU runner gets it after it is built."""

    @cached_property
    def _sjd(self) -> DeviceStates:
        config = engine_config(self.vllm_config)
        if config is None:
            raise RuntimeError("this runner needs an engine started with --speculative-model=[sjd]")
        return DeviceStates(
            config,
            family_of(self.model_config.model),
            vocab_size=self.vocab_size,
            max_num_reqs=self.max_num_reqs,
            max_num_tokens=self.max_model_len,
            device=self.device,
        )

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """As stock, with our speculator in place of the one that the method's name stands for."""
        self.speculator = SelfDraftingSpeculator(self.num_speculative_steps, self.device)
        super().load_model(*args, **kwargs)
        if self.batch_sharder is not None:
            raise RuntimeError("batch-sharded sampling splits guidance pairs; start the engine without it")

    def add_requests(self, scheduler_output: Any) -> None:
        """Take new and resumed requests; the runner's own, with which it warms up, are none of ours."""
        super().add_requests(scheduler_output)
        for request in scheduler_output.scheduled_new_reqs:
            runner_args = RunnerArgs.of(request.sampling_params)
            if runner_args is not None:
                slot = self.req_states.req_id_to_index[request.req_id]
                try:
                    self._sjd.add(request.req_id, slot, request.sampling_params, runner_args)
                except Exception:
                    # The others of the batch go on; the scheduler ends this one, which gets no token, with an error.
                    _LOGGER.exception("request %s cannot be decoded", request.req_id)

    def _remove_request(self, req_id: str) -> bool:
        self._sjd.remove(req_id)
        return super()._remove_request(req_id)

    def prepare_inputs(self, *args: Any, **kwargs: Any) -> Any:
        """As stock, with our drafts as the inputs of scored positions."""
        batch = super().prepare_inputs(*args, **kwargs)
        if batch.req_ids[0] in self._sjd:
            self._sjd.fill_inputs(batch, self.req_states)
        return batch

    def sample(
        self, hidden_states: Tensor, input_batch: Any, grammar_output: Any
    ) -> tuple[SamplerOutput, Tensor, Tensor]:
        """The tokens of the step, how many of them count, and how many scored ones do not, by row of the batch."""
        if input_batch.req_ids[0] not in self._sjd:
            return super().sample(hidden_states, input_batch, grammar_output)
        logits = self.model.compute_logits(hidden_states[input_batch.logits_indices])
        tokens, num_sampled, num_rejected = self._sjd.step(logits, input_batch, self.req_states)
        output = SamplerOutput(
            sampled_token_ids=tokens,
            logprobs_tensors=None,
            num_nans=None,
            num_sampled=num_sampled,
            num_rejected=num_rejected,
        )
        return output, num_sampled, num_rejected


class SJDGPUModelRunnerV2(SJDRunnerV2Mixin, GPUModelRunner):
    """Model Runner V2 on a GPU, with self-drafting."""


class SJDCPUModelRunnerV2(SJDRunnerV2Mixin, CPUModelRunner):
    """Model Runner V2 on a CPU, where it is for tests: its Triton kernels run under Triton's interpreter."""
