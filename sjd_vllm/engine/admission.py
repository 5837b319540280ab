"""Admission: what a request may ask for, checked in the front-end process, where a refusal reaches its caller.

Runs right after vLLM's own processing of a request (offline and server alike). What cannot be honoured is refused
here with a reason; nothing is silently ignored.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.v1.engine import EngineCoreRequest

from sjd_vllm.config import ConfigError, SJDConfig, SJDParams
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.grammar import ImageGrammar
from sjd_vllm.models.registry import load_family
from sjd_vllm.runner_choice import check_redraft

CONFIG_KEY = "sjd"


def engine_config(vllm_config: Any) -> SJDConfig | None:
    """The engine's settings, or None if it was started without speculative Jacobi decoding."""
    given = (vllm_config.additional_config or {}).get(CONFIG_KEY)
    return None if given is None else SJDConfig.from_mapping(given)


@lru_cache(maxsize=4)
def family_of(model_path: str) -> ImageFamily | None:
    """The image family of a checkpoint, read once a process."""
    return load_family(model_path)


def admit(request: EngineCoreRequest, vllm_config: Any) -> None:
    """Check a request and fill in what follows from its settings (the number of tokens of a picture).

    Raises VLLMValidationError (HTTP 400) with the parameter's name.
    """
    sampling = request.sampling_params
    if sampling is None:
        return
    config = engine_config(vllm_config)
    if config is None:
        _refuse_without_sjd(sampling)
        return
    try:
        params = SJDParams.from_extra_args(sampling.extra_args)
        params.check_engine(config)
        check_redraft(params.redraft_of(config), vllm_config)
        _refuse_unsupported(sampling, request)
        _check_embeds(request, vllm_config.model_config)
        _apply_grammar(request, sampling, params, config, vllm_config)
        if params.is_guided:
            _check_companion(request, sampling, params, vllm_config)
    except ConfigError as error:
        raise VLLMValidationError(str(error), parameter=error.param) from error


def _refuse_without_sjd(sampling: SamplingParams) -> None:
    ours = SJDParams.names() & set(sampling.extra_args or ())
    if ours:
        name = sorted(ours)[0]
        raise VLLMValidationError(
            f"{name} needs an engine started with --speculative-model=[sjd]; this one decodes plainly and would "
            "ignore it.",
            parameter=name,
        )


def _refuse_unsupported(sampling: SamplingParams, request: EngineCoreRequest) -> None:
    refusals = {
        "logprobs": sampling.logprobs is not None,
        "prompt_logprobs": sampling.prompt_logprobs is not None,
        "presence_penalty": sampling.presence_penalty != 0,
        "frequency_penalty": sampling.frequency_penalty != 0,
        "repetition_penalty": sampling.repetition_penalty != 1,
        "bad_words": bool(sampling.bad_words),
        "min_p": sampling.min_p > 0,
        "min_tokens": sampling.min_tokens > 0,
        "logit_bias": bool(sampling.logit_bias),
        "structured_outputs": sampling.structured_outputs is not None,
        "thinking_token_budget": sampling.thinking_token_budget is not None,
        "logprob_token_ids": bool(getattr(sampling, "logprob_token_ids", None)),
        "resumable": request.resumable,
    }
    for name, is_asked in refusals.items():
        if is_asked:
            raise ConfigError(name, f"{name} is not supported with speculative Jacobi decoding; leave it out.")


def _check_embeds(request: EngineCoreRequest, model_config: Any) -> None:
    """Vectors come with ids that say what each stands for: the family's id for it where a vector is, and no other.

    An id without its vector would be read as a token that the model has never seen.
    """
    family = family_of(model_config.model)
    embedded_id = family.embedded_token_id if family is not None else None
    embeds, token_ids = request.prompt_embeds, request.prompt_token_ids
    if embedded_id is None:
        if embeds is not None:
            raise ConfigError(
                "prompt_embeds",
                "prompt_embeds is not supported with speculative Jacobi decoding of this model; leave it out.",
            )
        return
    is_token = [True] * len(token_ids or ())
    if embeds is not None:
        if token_ids is None or request.prompt_is_token_ids is None:
            raise ConfigError(
                "prompt_embeds",
                f"prompt_embeds needs prompt_token_ids beside it, {embedded_id} where a vector stands, and "
                "prompt_is_token_ids.",
            )
        if embeds.shape != (len(token_ids), model_config.get_hidden_size()):
            raise ConfigError(
                "prompt_embeds",
                f"prompt_embeds must have the shape {[len(token_ids), model_config.get_hidden_size()]}; got "
                f"{list(embeds.shape)}.",
            )
        is_token = request.prompt_is_token_ids
    vocab_size = model_config.get_vocab_size()
    for index, (token_id, has_id) in enumerate(zip(token_ids or (), is_token, strict=True)):
        if (token_id == embedded_id) == has_id or not 0 <= token_id < vocab_size:
            raise ConfigError(
                "prompt_embeds",
                f"of a prompt of this model the tokens with the id {embedded_id}, and no others, bring a vector; "
                f"token {index} has the id {token_id} and {'none' if has_id else 'one'}.",
            )


def _apply_grammar(
    request: EngineCoreRequest,
    sampling: SamplingParams,
    params: SJDParams,
    config: SJDConfig,
    vllm_config: Any,
) -> None:
    if params.image_size is None:
        guess = params.first_guess_of(config)
        if guess in ("repeat_above", "above_probs"):
            raise ConfigError(
                "first_guess", f"first_guess {guess!r} looks at the image row above, so it needs image_size."
            )
        return
    model = vllm_config.model_config.model
    family = family_of(model)
    if family is None:
        raise ConfigError("image_size", f"image_size needs an image model; {model} is none that is known.")
    try:
        grammar = family.grammar(family.size(params.image_size))
    except ValueError as error:
        raise ConfigError("image_size", f"image_size: {error}") from error
    if sampling.allowed_token_ids is not None:
        raise ConfigError(
            "allowed_token_ids",
            "allowed_token_ids and image_size exclude each other: the picture's grammar says which ids are legal.",
        )
    num_new_tokens = grammar.num_tokens - params.num_given_tokens
    if params.num_given_tokens:
        _check_given_tokens(grammar, params, request.prompt_token_ids or [])
    room = vllm_config.model_config.max_model_len - len(request.prompt_token_ids or ())
    if room < num_new_tokens:
        raise ConfigError(
            "prompt",
            f"the prompt has {len(request.prompt_token_ids or ())} tokens and a picture {num_new_tokens}; together "
            f"they exceed the model's length of {vllm_config.model_config.max_model_len}.",
        )
    sampling.max_tokens = num_new_tokens


def _check_given_tokens(grammar: ImageGrammar, params: SJDParams, prompt_token_ids: list[int]) -> None:
    """The picture's first tokens must end both prompts, be legal, and leave something to write."""
    given = prompt_token_ids[-params.num_given_tokens :]
    if not params.num_given_tokens < min(len(prompt_token_ids), grammar.num_tokens):
        raise ConfigError(
            "num_given_tokens",
            f"num_given_tokens must be less than a picture's {grammar.num_tokens} tokens and the prompt's "
            f"{len(prompt_token_ids)}; got {params.num_given_tokens}.",
        )
    if params.is_guided and list(params.negative_prompt_token_ids[-params.num_given_tokens :]) != given:
        raise ConfigError("num_given_tokens", "the given tokens must end the negative prompt as they end the prompt.")
    try:
        grammar.codes(given)
    except ValueError as error:
        raise ConfigError("num_given_tokens", f"num_given_tokens: {error}.") from error


def _check_companion(request: EngineCoreRequest, sampling: SamplingParams, params: SJDParams, vllm_config: Any) -> None:
    """The companion must fit: as a second sequence, in length and in KV blocks; else it could never advance."""
    model_config, cache = vllm_config.model_config, vllm_config.cache_config
    if vllm_config.scheduler_config.max_num_seqs < 2:
        raise ConfigError(
            "guidance_scale",
            "guidance needs two sequence slots; start the engine with --max-num-seqs of at least 2.",
        )
    negative = params.negative_prompt_token_ids
    vocab_size = model_config.get_vocab_size()
    family = family_of(model_config.model)
    if family is not None and family.embedded_token_id in negative:
        raise ConfigError(
            "negative_prompt_token_ids",
            f"negative_prompt_token_ids must not hold {family.embedded_token_id}, which stands for a vector.",
        )
    if max(negative) >= vocab_size:
        raise ConfigError(
            "negative_prompt_token_ids",
            f"negative_prompt_token_ids must be below {vocab_size}; got {max(negative)}.",
        )
    room = model_config.max_model_len - len(negative)
    max_tokens = sampling.max_tokens or 0
    if room < (max_tokens if params.image_size is not None else 1):
        raise ConfigError(
            "negative_prompt_token_ids",
            f"the negative prompt has {len(negative)} tokens; that leaves too little of the model's length of "
            f"{model_config.max_model_len}.",
        )
    # A companion with the longer prompt would reach the model's length first.
    sampling.max_tokens = max_tokens = min(max_tokens, room)
    if cache.num_gpu_blocks:
        blocks = sum(
            -(-(length + max_tokens) // cache.block_size)
            for length in (len(request.prompt_token_ids or ()), len(negative))
        )
        usable = cache.num_gpu_blocks - 1  # vLLM keeps block 0 for itself
        if blocks > usable:
            raise ConfigError(
                "guidance_scale",
                f"this guided request needs {blocks} KV blocks for its two halves, and the engine has {usable}; "
                "give it more KV cache memory or ask for fewer tokens.",
            )
