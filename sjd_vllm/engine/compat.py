"""Every class and method inside vLLM that this package relies on, with the reason, checked on vLLM 0.32.

A contract test resolves each; when vLLM moves one, the test names it. Attributes that exist on instances only (queues,
the batch, the set of requests to be failed) cannot be resolved so; the engine's own tests go through all of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

SUPPORTED_VLLM = "0.32"


@dataclass(frozen=True)
class PrivateName:
    """One dotted name inside vLLM and why it is used."""

    module: str
    name: str
    reason: str

    def resolve(self) -> object:
        """The object itself. Raises AttributeError or ImportError if vLLM has moved it."""
        target: object = import_module(self.module)
        for part in self.name.split("."):
            target = getattr(target, part)
        return target


_RUNNER = "vllm.v1.worker.gpu_model_runner"
_SCHEDULER = "vllm.v1.core.sched.scheduler"
_LAUNCHERS = "vllm.entrypoints.launchers"
_V2 = "vllm.v1.worker.gpu"
PRIVATE_NAMES = (
    PrivateName("vllm.engine.arg_utils", "EngineArgs.add_cli_args", "patched: flags --speculative-model and kin"),
    PrivateName("vllm.engine.arg_utils", "EngineArgs.create_engine_config", "patched: rewrites the method sjd"),
    PrivateName("vllm.v1.engine.input_processor", "InputProcessor.process_inputs", "patched: admission of requests"),
    PrivateName(_RUNNER, "GPUModelRunner._sample", "overridden: scores drafts and makes the next window"),
    PrivateName(_RUNNER, "GPUModelRunner.propose_draft_token_ids", "overridden: hands the next window back"),
    PrivateName(
        _RUNNER,
        "GPUModelRunner._input_fits_in_drafter",
        "overridden: stock code zero-fills drafts near the end",
    ),
    PrivateName(_RUNNER, "GPUModelRunner._on_request_state_removed", "overridden: frees a request's window"),
    PrivateName(_V2 + ".model_runner", "GPUModelRunner.load_model", "extended: our speculator for that of ngram_gpu"),
    PrivateName(_V2 + ".model_runner", "GPUModelRunner.add_requests", "extended: takes requests into their slots"),
    PrivateName(_V2 + ".model_runner", "GPUModelRunner._remove_request", "extended: frees a request's slot"),
    PrivateName(_V2 + ".model_runner", "GPUModelRunner.prepare_inputs", "extended: writes drafts into the inputs"),
    PrivateName(_V2 + ".model_runner", "GPUModelRunner.sample", "overridden: scores drafts and refreshes them"),
    PrivateName(_V2 + ".sample.output", "SamplerOutput", "constructed: the tokens of a step"),
    PrivateName(_V2 + ".spec_decode.speculator", "BaseSpeculator", "base of what stands for a speculator"),
    PrivateName("vllm.utils.torch_utils", "async_tensor_h2d", "called: a step's one copy to the device"),
    PrivateName("vllm.v1.worker.cpu.model_runner", "CPUModelRunner", "base of our V2 runner on a CPU"),
    PrivateName("vllm.config.vllm", "VllmConfig.use_v2_model_runner", "read: which runner vLLM chose"),
    PrivateName(_SCHEDULER, "Scheduler._update_after_schedule", "extended: how many drafts the next step may have"),
    PrivateName("vllm.v1.core.sched.async_scheduler", "AsyncScheduler", "base of our scheduler beside V2"),
    PrivateName("vllm.v1.worker.gpu_worker", "Worker._make_model_runner", "overridden: builds our runner on a GPU"),
    PrivateName("vllm.v1.worker.cpu_worker", "CPUWorker.init_device", "extended: the CPU worker hard-codes its runner"),
    PrivateName(_RUNNER, "GPUModelRunner.execute_model", "extended on a CPU: threads by the size of the step"),
    PrivateName("vllm._custom_ops", "_supports_onednn", "set: float32 products on a CPU are PyTorch's"),
    PrivateName("vllm.v1.worker.cpu_model_runner", "CPUModelRunner", "base of our runner on a CPU"),
    PrivateName(
        "vllm.model_executor.kernels.linear.scaled_mm.cpu",
        "CPUInt8ScaledMMLinearKernel",
        "looked for: its products saturate on some CPUs",
    ),
    PrivateName("vllm.ir.op", "IrOp.register_impl", "called: normalisation on a CPU by vLLM's own kernels"),
    PrivateName("vllm.ir.op", "IrOp.set_default", "called: the same"),
    PrivateName("vllm.ir.ops.layernorm", "rms_norm", "its implementation on a CPU is ours"),
    PrivateName("vllm.ir.ops.layernorm", "fused_add_rms_norm", "the same"),
    PrivateName(_SCHEDULER, "Scheduler.schedule", "extended: both halves of a pair are preempted together"),
    PrivateName(_SCHEDULER, "Scheduler.update_from_output", "extended: rolls an unpaired half back by one token"),
    PrivateName(_SCHEDULER, "Scheduler.add_request", "extended: adds the unconditional companion"),
    PrivateName(_SCHEDULER, "Scheduler.finish_requests", "extended: finishes both halves"),
    PrivateName(_SCHEDULER, "Scheduler.make_stats", "extended: companions are not counted as requests"),
    PrivateName(_SCHEDULER, "Scheduler.make_spec_decoding_stats", "extended: companions' drafts are not counted"),
    PrivateName(_SCHEDULER, "Scheduler._preempt_request", "called: preempts the other half"),
    PrivateName(
        _SCHEDULER,
        "Scheduler.update_draft_token_ids",
        "extended: takes the next windows, ragged; the drafts that stand are counted",
    ),
    PrivateName("vllm.v1.request", "Request", "constructed: the companion"),
    PrivateName(_LAUNCHERS + ".cli_args", "make_arg_parser", "called: flags of vllm serve for a server without a port"),
    PrivateName(_LAUNCHERS + ".cli_args", "validate_parsed_serve_args", "called: the same"),
    PrivateName(_LAUNCHERS + ".api_server.entry", "build_async_engine_client", "called: the engine of such a server"),
    PrivateName(_LAUNCHERS + ".api_server.app_state", "init_app_state", "called: binds the routes to it"),
    PrivateName(_LAUNCHERS + ".app", "build_app", "called: all routes of vllm serve"),
)


def require_supported_vllm() -> None:
    """Raise RuntimeError, saying what to install, unless vLLM is of the release this package was checked on."""
    import vllm

    if not vllm.__version__.startswith(SUPPORTED_VLLM + "."):
        raise RuntimeError(
            f"sjd-vllm works with vLLM {SUPPORTED_VLLM}.x; found {vllm.__version__}. "
            f"Install 'vllm=={SUPPORTED_VLLM}.*'."
        )
