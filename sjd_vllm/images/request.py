"""What a caller asks for, checked; and what one picture of it means in tokens and sampling settings.

Checking needs neither torch nor vLLM, so that a mistake is answered before anything heavy is imported.
"""

from __future__ import annotations

import dataclasses
import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sjd_vllm.config import (
    FIRST_GUESS_NAMES,
    MAX_WINDOW,
    REDRAFT_NAMES,
    ConfigError,
    SJDParams,
    check_choice,
    check_guidance_scale,
    check_int,
    check_window,
)

if TYPE_CHECKING:
    from torch import Tensor
    from vllm import SamplingParams

    from sjd_vllm.models.family import ImageFamily, ImageSize

METHOD_NAMES = ("sjd", "none")
MAX_PICTURES_PER_PROMPT = 100
MAX_SEED = 2**63 - 1


def _option(default: Any, kind: type, help_text: str) -> Any:
    """A field that the command line offers as a flag of the same name."""
    return dataclasses.field(default=default, metadata={"type": kind, "help": help_text})


@dataclass(frozen=True)
class ImageRequest:
    """A prompt and its settings; None means the model's own default. Raises ConfigError for a bad value.

    Attributes:
        prompt: what to paint.
        seed: of the first picture; the n-th has seed + n - 1. None draws one at random.
        init_image: contents of a PNG, JPEG or WebP file; its upper rows are kept, and the picture is finished.

    The other fields carry their meaning with them, which the command line shows as well.
    """

    prompt: str
    n: int = _option(1, int, f"pictures of each prompt, 1 to {MAX_PICTURES_PER_PROMPT}")
    seed: int | None = _option(
        None, int, "seed of each prompt's first picture; the next ones count on (random if absent)"
    )
    guidance_scale: float | None = _option(
        None, float, "classifier-free guidance, greater than 0; 1 is off (the model's default if absent)"
    )
    negative_prompt: str | None = _option(None, str, "what guidance leads away from (nothing in particular if absent)")
    size: str | None = _option(None, str, "WIDTHxHEIGHT in pixels, one of the model's sizes (its first if absent)")
    temperature: float | None = _option(None, float, "of sampling, 0 or more; 0 takes the likeliest token")
    top_k: int | None = _option(None, int, "sample among the k likeliest tokens; 0 is all")
    top_p: float | None = _option(None, float, "sample among the likeliest tokens that hold this mass, in (0, 1]")
    method: str = _option("sjd", str, "sjd: speculative Jacobi decoding; none: one token a forward")
    num_speculative_tokens: int | None = _option(
        None, int, f"draft tokens in the window, 0 to {MAX_WINDOW} (the engine's if absent)"
    )
    redraft: str | None = _option(None, str, f"how drafts are refreshed: {', '.join(REDRAFT_NAMES)}")
    first_guess: str | None = _option(None, str, f"how new drafts are made: {', '.join(FIRST_GUESS_NAMES)}")
    keep_rows: int | None = _option(None, int, "rows of image tokens that are taken from the given picture")
    init_image: bytes | None = dataclasses.field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ConfigError("prompt", "the prompt is empty; say what to paint.")
        check_int("n", self.n, 1, MAX_PICTURES_PER_PROMPT)
        if self.seed is not None:
            check_int("seed", self.seed, 0, MAX_SEED - MAX_PICTURES_PER_PROMPT)
        if self.guidance_scale is not None:
            check_guidance_scale(self.guidance_scale)
        if self.temperature is not None:
            _check_number("temperature", self.temperature, 0, 100)
        if self.top_k is not None:
            check_int("top_k", self.top_k, 0, 2**31 - 1)
        if self.top_p is not None:
            _check_number("top_p", self.top_p, 0, 1, is_low_open=True)
        check_choice("method", self.method, METHOD_NAMES)
        if self.num_speculative_tokens is not None:
            check_window("num_speculative_tokens", self.num_speculative_tokens)
        if self.redraft is not None:
            check_choice("redraft", self.redraft, REDRAFT_NAMES)
        if self.first_guess is not None:
            check_choice("first_guess", self.first_guess, FIRST_GUESS_NAMES)
        if (self.init_image is None) != (self.keep_rows is None):
            missing, present = ("keep_rows", "init_image") if self.keep_rows is None else ("init_image", "keep_rows")
            raise ConfigError(missing, f"{present} needs {missing}: a picture, and how many of its rows to keep.")

    @classmethod
    def option_fields(cls) -> list[dataclasses.Field[Any]]:
        """The fields that are settings, in order."""
        return [field for field in dataclasses.fields(cls) if field.metadata]

    def pictures(self, family: ImageFamily, max_model_len: int) -> list[PictureRequest]:
        """The n pictures of this request, in the tokens of a family of models.

        Raises ConfigError for a size that the family lacks, for a prompt that is too long for the model, and for a
        given picture that cannot be used.
        """
        try:
            size = family.size(self.size)
        except ValueError as error:
            raise ConfigError("size", str(error)) from error
        defaults = family.defaults
        num_tokens = family.grammar(size).num_tokens
        prompt_token_ids = family.prompt_token_ids(self.prompt, size)
        negative_prompt_token_ids = (
            family.negative_prompt_token_ids(self.negative_prompt, size)
            if self.negative_prompt
            else family.unconditional_token_ids(prompt_token_ids, size)
        )
        _check_length("prompt", prompt_token_ids, num_tokens, max_model_len)
        _check_length("negative_prompt", negative_prompt_token_ids, num_tokens, max_model_len)
        given: list[int] = []
        if self.init_image is not None and self.keep_rows is not None:
            # needs the model's encoder, so it comes after all cheaper checks
            from sjd_vllm.images.init_picture import given_token_ids

            given = given_token_ids(family, size, self.init_image, self.keep_rows)
        prompt_embeds = family.prompt_embeds(self.prompt, size)
        first_seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        return [
            PictureRequest(
                prompt=self.prompt,
                seed=first_seed + index,
                size=size,
                num_tokens=num_tokens,
                prompt_token_ids=prompt_token_ids,
                given_token_ids=given,
                temperature=defaults.temperature if self.temperature is None else float(self.temperature),
                top_k=defaults.top_k if self.top_k is None else self.top_k,
                top_p=defaults.top_p if self.top_p is None else float(self.top_p),
                prompt_embeds=prompt_embeds,
                sjd=SJDParams(
                    guidance_scale=float(
                        defaults.guidance_scale if self.guidance_scale is None else self.guidance_scale
                    ),
                    negative_prompt_token_ids=(*negative_prompt_token_ids, *given),
                    image_size=str(size),
                    num_given_tokens=len(given),
                    num_speculative_tokens=0 if self.method == "none" else self.num_speculative_tokens,
                    redraft=self.redraft,
                    first_guess=self.first_guess,
                ),
            )
            for index in range(self.n)
        ]


@dataclass(frozen=True)
class PictureRequest:
    """One picture to decode: everything resolved, nothing left to a default but the engine's window.

    Attributes:
        num_tokens: T, tokens of a finished picture, given ones included.
        prompt_token_ids: the conditional prompt; the unconditional one is in `sjd`, whether guidance is on or not.
        given_token_ids: the picture's first tokens, if it starts from a given one; they end both prompts.
        prompt_embeds: a vector for each id of the conditional prompt, where the family has them.
    """

    prompt: str
    seed: int
    size: ImageSize
    num_tokens: int
    prompt_token_ids: list[int]
    given_token_ids: list[int]
    temperature: float
    top_k: int
    top_p: float
    sjd: SJDParams
    prompt_embeds: Tensor | None = dataclasses.field(default=None, compare=False, repr=False)

    @property
    def num_new_tokens(self) -> int:
        """Tokens that the model writes."""
        return self.num_tokens - len(self.given_token_ids)

    @property
    def engine_prompt(self) -> dict[str, Any]:
        """What the engine gets as the prompt, in vLLM's form: the text, and the given tokens of the picture."""
        token_ids = [*self.prompt_token_ids, *self.given_token_ids]
        if self.prompt_embeds is None:
            return {"type": "token", "prompt_token_ids": token_ids}
        from torch.nn.functional import pad

        num_given = len(self.given_token_ids)
        return {
            "type": "embeds",
            "prompt_token_ids": token_ids,
            "prompt_embeds": pad(self.prompt_embeds, (0, 0, 0, num_given)),
            "is_token_ids": [False] * len(self.prompt_token_ids) + [True] * num_given,
        }

    def sampling_params(self) -> SamplingParams:
        """The same for vLLM's public API; new tokens are delivered as they are committed."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        return SamplingParams(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=self.seed,
            max_tokens=self.num_new_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
            extra_args=self.sjd.to_extra_args(),
        )


def _check_number(param: str, value: object, low: float, high: float, *, is_low_open: bool = False) -> None:
    ok = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    if not ok or not low <= value <= high or (is_low_open and value == low):  # type: ignore[operator]
        start = "greater than" if is_low_open else "at least"
        raise ConfigError(param, f"{param} must be a number {start} {low:g} and at most {high:g}; got {value!r}.")


def _check_length(param: str, token_ids: list[int], num_tokens: int, max_model_len: int) -> None:
    room = max_model_len - num_tokens
    if len(token_ids) > room:
        raise ConfigError(
            param,
            f"the {param.replace('_', ' ')} is too long: {len(token_ids)} tokens, and the model's {max_model_len} "
            f"positions leave {room} beside a picture's {num_tokens}.",
        )
