"""Configuration: one frozen dataclass for the engine, one for a request.

The engine's travels as ``additional_config["sjd"]`` to every process of vLLM; a request's travels in
``SamplingParams.extra_args`` (over HTTP: ``vllm_xargs``), flat, under the field names below.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

GUMBEL = "gumbel"
REDRAFT_NAMES = (GUMBEL, "coupled", "resample", "reuse", "reuse_biased")
FIRST_GUESS_NAMES = ("uniform", "repeat_left", "repeat_above", "left_probs", "above_probs")
# vLLM's own rejection sampler, which a GPU runs while it profiles memory, asserts at most 128 drafts.
MAX_WINDOW = 128
MAX_GUIDANCE_SCALE = 100.0


class ConfigError(ValueError):
    """A setting is unknown or out of range; the message names it, what was given and what is allowed.

    Attributes:
        param: the setting's name, for callers that report it apart (HTTP's ``param``).
    """

    def __init__(self, param: str, message: str) -> None:
        super().__init__(message)
        self.param = param


def nearest_name(given: str, known: Iterable[str]) -> str:
    """`` Did you mean 'x'?`` for the closest of the known names, else an empty string.

    >>> nearest_name("couple", REDRAFT_NAMES), nearest_name("xyz", REDRAFT_NAMES)
    (" Did you mean 'coupled'?", '')
    """
    match = difflib.get_close_matches(given, list(known), n=1, cutoff=0.5)
    return f" Did you mean {match[0]!r}?" if match else ""


def check_choice(param: str, value: object, known: tuple[str, ...]) -> None:
    """Raise ConfigError unless value is one of the known names."""
    if value not in known:
        hint = nearest_name(str(value), known)
        raise ConfigError(param, f"{param} must be one of {', '.join(known)}; got {value!r}.{hint}")


def check_int(param: str, value: object, low: int, high: int) -> None:
    """Raise ConfigError unless value is an int (not a bool) in low..high."""
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise ConfigError(param, f"{param} must be a whole number from {low} to {high}; got {value!r}.")


def check_window(param: str, value: object) -> None:
    """Raise ConfigError unless value is a legal number of draft tokens; 0 is plain decoding."""
    check_int(param, value, 0, MAX_WINDOW)


def check_guidance_scale(value: object) -> None:
    """Raise ConfigError unless value is a finite number in (0, 100]; 1 is no guidance."""
    ok = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not ok or not math.isfinite(value) or not 0 < value <= MAX_GUIDANCE_SCALE:  # type: ignore[arg-type, operator]
        raise ConfigError(
            "guidance_scale",
            f"guidance_scale must be a number greater than 0 and at most {MAX_GUIDANCE_SCALE:g} "
            f"(1 is no guidance); got {value!r}.",
        )


def _check_first_guess(redraft: str, first_guess: str) -> None:
    if redraft == GUMBEL and first_guess != FIRST_GUESS_NAMES[0]:
        others = ", ".join(name for name in REDRAFT_NAMES if name != GUMBEL)
        raise ConfigError(
            "first_guess",
            f"first_guess {first_guess!r} is for the redrafts {others}; {GUMBEL} makes its first drafts "
            f"{FIRST_GUESS_NAMES[0]}.",
        )


def _reject_unknown(cls: type, given: Iterable[str]) -> None:
    known = [field.name for field in dataclasses.fields(cls)]
    for key in given:
        if key not in known:
            hint = nearest_name(key, known)
            raise ConfigError(key, f"unknown setting {key!r}; known are {', '.join(known)}.{hint}")


@dataclass(frozen=True)
class SJDConfig:
    """Settings of one engine; each is the default of the request setting of the same name."""

    num_speculative_tokens: int = 64  # draft tokens in the window, 0..128; 0 is plain decoding
    redraft: str = GUMBEL  # how uncommitted drafts are refreshed, one of REDRAFT_NAMES
    first_guess: str = "uniform"  # how drafts for new slots are made, one of FIRST_GUESS_NAMES
    adaptive_window: bool = True  # under `gumbel`, shorten the window where load makes drafts cost more than they gain
    # on a CPU, threads that a large step may take where they make it faster; 0: no more than OMP_NUM_THREADS says
    max_cpu_threads: int = 0
    reuse_threshold: float = 0.8  # of `reuse` and `reuse_biased`: keep a draft x when p(x)/q(x) exceeds this; > 0

    def __post_init__(self) -> None:
        check_window("num_speculative_tokens", self.num_speculative_tokens)
        check_choice("redraft", self.redraft, REDRAFT_NAMES)
        check_choice("first_guess", self.first_guess, FIRST_GUESS_NAMES)
        if not isinstance(self.adaptive_window, bool):
            raise ConfigError(
                "adaptive_window", f"adaptive_window must be true or false; got {self.adaptive_window!r}."
            )
        check_int("max_cpu_threads", self.max_cpu_threads, 0, 4096)
        _check_first_guess(self.redraft, self.first_guess)
        threshold = self.reuse_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, (int, float)) or not 0 < threshold < math.inf:
            raise ConfigError("reuse_threshold", f"reuse_threshold must be a number above 0; got {threshold!r}.")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> SJDConfig:
        """Build from JSON-like settings. Raises ConfigError for an unknown key or a bad value."""
        _reject_unknown(cls, given)
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """The same as plain JSON types, as vLLM's additional_config wants it."""
        return dataclasses.asdict(self)


@dataclass(frozen=True)
class SJDParams:
    """Settings of one request, read from ``SamplingParams.extra_args``; None means the engine's default."""

    guidance_scale: float = 1.0  # classifier-free guidance, uncond + s * (cond - uncond); > 0, 1 is off
    negative_prompt_token_ids: tuple[int, ...] = ()  # the unconditional prompt; required when guidance is on
    image_size: str | None = None  # "WIDTHxHEIGHT" of an image family's grammar; None is free text
    num_given_tokens: int = 0  # how many of the picture's first tokens stand at the end of both prompts
    num_speculative_tokens: int | None = None  # draft tokens in the window, 0..the engine's
    redraft: str | None = None  # one of REDRAFT_NAMES
    first_guess: str | None = None  # one of FIRST_GUESS_NAMES

    def __post_init__(self) -> None:
        check_guidance_scale(self.guidance_scale)
        for token_id in self.negative_prompt_token_ids:
            if isinstance(token_id, bool) or not isinstance(token_id, int) or token_id < 0:
                raise ConfigError(
                    "negative_prompt_token_ids",
                    f"negative_prompt_token_ids must be a list of token ids; got {token_id!r} in it.",
                )
        if self.is_guided and not self.negative_prompt_token_ids:
            raise ConfigError(
                "negative_prompt_token_ids",
                "guidance_scale other than 1 needs negative_prompt_token_ids, the unconditional prompt; got none.",
            )
        if self.image_size is not None and not isinstance(self.image_size, str):
            raise ConfigError("image_size", f"image_size must be text such as '96x96'; got {self.image_size!r}.")
        check_int("num_given_tokens", self.num_given_tokens, 0, 2**31 - 1)
        if self.num_given_tokens and self.image_size is None:
            raise ConfigError("num_given_tokens", "num_given_tokens is about a picture, so it needs image_size.")
        if self.num_speculative_tokens is not None:
            check_window("num_speculative_tokens", self.num_speculative_tokens)
        if self.redraft is not None:
            check_choice("redraft", self.redraft, REDRAFT_NAMES)
        if self.first_guess is not None:
            check_choice("first_guess", self.first_guess, FIRST_GUESS_NAMES)

    @property
    def is_guided(self) -> bool:
        """Whether the request needs an unconditional companion."""
        return self.guidance_scale != 1.0

    @classmethod
    def names(cls) -> frozenset[str]:
        """The keys of ``extra_args`` that are ours."""
        return frozenset(field.name for field in dataclasses.fields(cls))

    @classmethod
    def from_extra_args(cls, extra_args: Mapping[str, Any] | None) -> SJDParams:
        """Read a request's settings; keys of other extensions are left alone. Raises ConfigError."""
        given = {key: value for key, value in (extra_args or {}).items() if key in cls.names()}
        ids = given.get("negative_prompt_token_ids")
        if ids is not None:
            if isinstance(ids, str) or not isinstance(ids, (list, tuple)):
                raise ConfigError(
                    "negative_prompt_token_ids",
                    f"negative_prompt_token_ids must be a list of token ids; got {ids!r}.",
                )
            given["negative_prompt_token_ids"] = tuple(ids)
        return cls(**given)

    def to_extra_args(self) -> dict[str, Any]:
        """The settings that differ from the defaults, as ``extra_args`` carries them."""
        out = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        }
        if "negative_prompt_token_ids" in out:
            out["negative_prompt_token_ids"] = list(out["negative_prompt_token_ids"])
        return out

    def redraft_of(self, config: SJDConfig) -> str:
        """The refresh in force on an engine."""
        return self.redraft or config.redraft

    def first_guess_of(self, config: SJDConfig) -> str:
        """The first guess in force on an engine."""
        if self.redraft_of(config) == GUMBEL:
            return FIRST_GUESS_NAMES[0]
        return self.first_guess or config.first_guess

    def window_of(self, config: SJDConfig) -> int:
        """The longest window that the request may have on an engine."""
        if self.num_speculative_tokens is None:
            return config.num_speculative_tokens
        return min(self.num_speculative_tokens, config.num_speculative_tokens)

    def is_adaptive(self, config: SJDConfig) -> bool:
        """Whether the engine may shorten the window by load: none was asked for, and tokens do not depend on it."""
        return config.adaptive_window and self.num_speculative_tokens is None and self.redraft_of(config) == GUMBEL

    def check_engine(self, config: SJDConfig) -> None:
        """Raise ConfigError for what the engine, as it was started, cannot do: a longer window, clashing strategies."""
        if self.first_guess is not None:
            _check_first_guess(self.redraft_of(config), self.first_guess)
        if (self.num_speculative_tokens or 0) > config.num_speculative_tokens:
            raise ConfigError(
                "num_speculative_tokens",
                f"num_speculative_tokens must be from 0 to {config.num_speculative_tokens}, the engine's own; "
                f"got {self.num_speculative_tokens}.",
            )
