"""The plugin: three patches of vLLM's edges, applied in every process that may start an engine.

1. `EngineArgs.add_cli_args`: the flags --speculative-model and --num-speculative-tokens, and "sjd" as a method.
2. `EngineArgs.create_engine_config`: rewrites method "sjd" to vLLM's "custom_class" with our worker and scheduler.
3. `InputProcessor.process_inputs`: admission, so that a request is refused where its caller can be told.

Workers and the engine core need none of these: they import our classes by name from the config.
"""

from __future__ import annotations

import functools
from typing import Any

from sjd_vllm.build import BUILD_KEY, installed_build
from sjd_vllm.config import ConfigError, SJDConfig
from sjd_vllm.models.registry import architectures, load_family

_METHOD = "sjd"
_PATCHED = "_sjd_vllm_patched"
_OWN_PATHS = {
    "proposer": "sjd_vllm.engine.proposer.SelfDraftingProposer",
    "scheduler": "sjd_vllm.engine.scheduler.SJDScheduler",
    "async_scheduler": "sjd_vllm.engine.scheduler.SJDAsyncScheduler",
    "cpu_worker": "sjd_vllm.engine.worker.SJDCPUWorker",
    "gpu_worker": "sjd_vllm.engine.worker.SJDGPUWorker",
}


def register() -> None:
    """Entry point of vLLM's general plugins; may be called any number of times.

    Beside the patches, it tells vLLM the model classes of the image families, by name only.
    """
    from vllm import ModelRegistry
    from vllm.engine.arg_utils import EngineArgs
    from vllm.v1.engine.input_processor import InputProcessor

    if getattr(EngineArgs, _PATCHED, False):
        return
    setattr(EngineArgs, _PATCHED, True)
    for name, model_class in architectures():
        ModelRegistry.register_model(name, model_class)
    _add_flags(EngineArgs)
    _rewrite_method(EngineArgs)
    _admit_requests(InputProcessor)


def _add_flags(engine_args: Any) -> None:
    original = engine_args.add_cli_args

    @functools.wraps(original)
    def add_cli_args(parser: Any) -> Any:
        parser = original(parser)
        for action in parser._actions:
            if "--spec-method" in action.option_strings and action.choices is not None:
                action.choices = [*action.choices, _METHOD]
        group = parser.add_argument_group("Speculative Jacobi decoding", "Flags of the sjd-vllm plugin.")
        group.add_argument(
            "--speculative-model",
            dest="spec_model",
            default=None,
            help="'[sjd]' makes the model draft for itself by speculative Jacobi decoding.",
        )
        group.add_argument(
            "--num-speculative-tokens",
            dest="spec_tokens",
            type=int,
            default=None,
            help="Draft tokens in the window; 0 is plain decoding.",
        )
        return parser

    engine_args.add_cli_args = staticmethod(add_cli_args)


def _rewrite_method(engine_args: Any) -> None:
    original = engine_args.create_engine_config

    @functools.wraps(original)
    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        if _asks_for_sjd(self):
            _configure(self)
            vllm_config = original(self, *args, **kwargs)
            _refuse_unsupported(vllm_config)
            if self.distributed_executor_backend is None:
                _keep_one_worker_inside(vllm_config.parallel_config)
            if vllm_config.scheduler_config.async_scheduling:
                vllm_config.scheduler_config.scheduler_cls = _OWN_PATHS["async_scheduler"]
            return vllm_config
        return original(self, *args, **kwargs)

    engine_args.create_engine_config = create_engine_config


def _admit_requests(input_processor: Any) -> None:
    original = input_processor.process_inputs

    @functools.wraps(original)
    def process_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        from sjd_vllm.engine.admission import admit

        request = original(self, *args, **kwargs)
        admit(request, self.vllm_config)
        return request

    input_processor.process_inputs = process_inputs


def _asks_for_sjd(args: Any) -> bool:
    given = args.speculative_config or {}
    method = args.spec_method or given.get("method")
    model = args.spec_model or given.get("model")
    return method == _METHOD or (isinstance(model, str) and model.strip("[]") == _METHOD)


def _configure(args: Any) -> None:
    """Move the engine's settings to additional_config and name our classes. Raises ConfigError or ValueError."""
    from vllm.platforms import current_platform

    from sjd_vllm.engine.compat import require_supported_vllm
    from sjd_vllm.runner_choice import speculative_config, uses_v2

    require_supported_vllm()
    settings = {key.replace("-", "_"): value for key, value in (args.speculative_config or {}).items()}
    settings.pop("method", None)
    settings.pop("model", None)
    if args.spec_tokens is not None:
        settings["num_speculative_tokens"] = args.spec_tokens
    config = SJDConfig.from_mapping(settings)
    for option, taken in (
        ("worker_cls", args.worker_cls != "auto"),
        ("scheduler_cls", args.scheduler_cls is not None),
    ):
        if taken and getattr(args, option) not in _OWN_PATHS.values():
            raise ConfigError(
                option, f"{option} cannot be combined with speculative Jacobi decoding, which brings its own."
            )
    is_v2 = uses_v2(config)
    if args.async_scheduling and not is_v2:
        raise ConfigError(
            "async_scheduling",
            "async_scheduling cannot be combined with speculative Jacobi decoding on vLLM's V1 model runner; leave it "
            "out.",
        )
    family = load_family(args.model)
    for name, value in (family.engine_args if family is not None else {}).items():
        if getattr(args, name) == type(args).__dataclass_fields__[name].default:
            setattr(args, name, value)
    args.spec_method = args.spec_model = args.spec_tokens = None
    args.speculative_config = speculative_config(config, is_v2=is_v2, proposer=_OWN_PATHS["proposer"])
    args.worker_cls = _OWN_PATHS["cpu_worker" if current_platform.is_cpu() else "gpu_worker"]
    args.scheduler_cls = _OWN_PATHS["scheduler"]
    args.additional_config = {
        **(args.additional_config or {}),
        "sjd": config.to_mapping(),
        BUILD_KEY: installed_build(args.model),
    }
    # The images API tells what each forward of a picture gave.
    args.per_request_spec_decode_metrics = "detailed"


def _keep_one_worker_inside(parallel_config: Any) -> None:
    """On a CPU, let a worker that is alone run in the engine's process, as vLLM does it on a GPU.

    Beside an engine in a process of its own, vLLM starts one more for the worker, to have its threads bound to cores by
    the environment it starts with; the two wait for each other by spinning, which takes a core from the threads. Where
    threads are not bound there is nothing to set.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    is_alone = parallel_config.world_size == 1 and parallel_config.distributed_executor_backend == "mp"
    if is_alone and current_platform.is_cpu() and envs.VLLM_CPU_OMP_THREADS_BIND == "nobind":
        parallel_config.distributed_executor_backend = "uni"


def _refuse_unsupported(vllm_config: Any) -> None:
    """Raise ConfigError for engine settings under which guidance pairs could starve or ranks could disagree."""
    refusals = {
        "model_runner": (
            vllm_config.use_v2_model_runner != (vllm_config.speculative_config.method == "ngram_gpu"),
            "vLLM chose another of its runners than this plugin had expected; set VLLM_USE_V2_MODEL_RUNNER=0",
        ),
        "scheduling_policy": (
            vllm_config.scheduler_config.policy != "fcfs",
            "only the policy 'fcfs' keeps the halves of a guidance pair side by side",
        ),
        "kv_transfer_config": (
            vllm_config.kv_transfer_config is not None,
            "KV connectors do not know of guidance pairs",
        ),
        "pipeline_parallel_size": (
            vllm_config.parallel_config.pipeline_parallel_size > 1,
            "the window is made where the logits are, which earlier pipeline stages never see",
        ),
        "data_parallel_size": (
            vllm_config.parallel_config.data_parallel_size > 1,
            "run one engine a replica instead",
        ),
    }
    for name, (is_asked, reason) in refusals.items():
        if is_asked:
            raise ConfigError(name, f"{name} is not supported with speculative Jacobi decoding: {reason}.")
