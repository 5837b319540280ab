"""Which of vLLM's two model runners an engine decodes on: V2 on GPUs, V1 on CPUs and for what V2 cannot do."""

from __future__ import annotations

from typing import Any

from sjd_vllm.config import GUMBEL, ConfigError, SJDConfig

_FLAG = "VLLM_USE_V2_MODEL_RUNNER"


def uses_v2(config: SJDConfig) -> bool:
    """Whether an engine with these settings decodes on Model Runner V2, on this machine and in this environment.

    Raises ConfigError where the environment asks for V2 and the settings for what it cannot do.
    """
    from vllm import envs
    from vllm.platforms import current_platform
    from vllm.triton_utils import HAS_TRITON

    asked: bool | None = envs.VLLM_USE_V2_MODEL_RUNNER
    if config.redraft != GUMBEL:
        if asked:
            raise ConfigError(
                "redraft",
                f"redraft {config.redraft!r} runs on vLLM's V1 model runner only, and {_FLAG}=1 asks for V2; unset it.",
            )
        return False
    if asked is None:
        return bool(HAS_TRITON) and not current_platform.is_cpu()
    return asked


def runner_name(config: SJDConfig) -> str:
    """ "V1" or "V2", as `uses_v2` says."""
    return "V2" if uses_v2(config) else "V1"


def check_redraft(redraft: str, vllm_config: Any) -> None:
    """Raise ConfigError for a request whose strategy the engine's runner cannot do."""
    if redraft != GUMBEL and vllm_config.use_v2_model_runner:
        raise ConfigError(
            "redraft",
            f"redraft {redraft!r} runs on vLLM's V1 model runner only, and this engine has V2; start it with "
            f"that redraft, or with {_FLAG}=0.",
        )


def speculative_config(config: SJDConfig, *, is_v2: bool, proposer: str) -> dict[str, Any]:
    """What vLLM is told: a method that has no draft model and that the runner accepts.

    proposer: dotted path of the class that stands for the drafts on V1.
    """
    # vLLM wants at least 1 here; how many drafts are made is ours to say
    num_speculative_tokens = max(1, config.num_speculative_tokens)
    if is_v2:
        # of the methods that V2 knows, the one without a model; our runner puts its own speculator in its place
        return {
            "method": "ngram_gpu",
            "num_speculative_tokens": num_speculative_tokens,
            "prompt_lookup_min": 1,
            "prompt_lookup_max": 1,
        }
    return {"method": "custom_class", "model": proposer, "num_speculative_tokens": num_speculative_tokens}
