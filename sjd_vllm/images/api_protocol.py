"""The body of POST /v1/images/generations: OpenAI's fields and ours, each honoured or refused with a reason."""

from __future__ import annotations

import base64
import re
import typing
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from sjd_vllm.config import ConfigError, nearest_name
from sjd_vllm.images.request import ImageRequest

MAX_PICTURES = 10
MAX_PROMPT_CHARACTERS = 32_000
MAX_INIT_IMAGE_CHARACTERS = 6 << 20  # of base64: a picture file of 4.5 MiB
# the two longest prompts, each character escaped as JSON may, some room, and a given picture
MAX_BODY_BYTES = (1 << 20) + MAX_INIT_IMAGE_CHARACTERS
_ERROR_TYPES = {408: "timeout_error", 429: "rate_limit_error"}  # the others follow from the status
_DATA_URL = re.compile(r"^data:image/[a-z]+;base64,")
# What a field is called in the request, where the engine has another name for it.
_REQUEST_NAMES = {"negative_prompt_token_ids": "negative_prompt", "image_size": "size"}


class ApiError(Exception):
    """An answer in OpenAI's error shape.

    Attributes:
        status: HTTP status.
        message, param, code: as in OpenAI's error object; its type follows from the status.
        headers: of the answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        """The error object."""
        kind = _ERROR_TYPES.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


class SJDOptions(BaseModel):
    """How the picture is decoded; absent fields are the engine's own."""

    model_config = ConfigDict(extra="forbid", strict=True)

    method: Literal["sjd", "none"] = Field("sjd", description="none decodes one token a forward.")
    num_speculative_tokens: int | None = Field(None, description="Draft tokens in the window, 0 to the engine's.")
    redraft: str | None = Field(None, description="How drafts are refreshed.")
    first_guess: str | None = Field(None, description="How new drafts are made.")
    partial_rows: bool = Field(
        False, description="A partial picture after each finished row, however many; with stream, not partial_images."
    )


class ImagesRequest(BaseModel):
    """OpenAI's request, with `seed`, `negative_prompt`, `guidance_scale`, sampling and `sjd` beside it.

    A field of type null is one of OpenAI's that token pictures cannot honour; anything but null is refused.
    """

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(min_length=1, max_length=MAX_PROMPT_CHARACTERS)
    model: str | None = Field(None, description="A name of the served model, as /v1/models lists it.")
    n: int | None = Field(None, ge=1, le=MAX_PICTURES, description="Pictures, made at the same time.")
    size: str | None = Field(None, description="WIDTHxHEIGHT, one of the model's sizes, or auto.")
    quality: Literal["auto", "standard"] | None = Field(None, description="There is one quality.")
    background: Literal["auto", "opaque"] | None = Field(None, description="Pictures are opaque.")
    moderation: Literal["auto", "low"] | None = Field(None, description="There is no filter.")
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: int | None = Field(None, ge=0, le=100, description="Quality of jpeg and webp; 100 is best.")
    response_format: Literal["b64_json"] | None = Field(None, description="Pictures are in the answer, not on a host.")
    stream: bool | None = None
    partial_images: int | None = Field(None, ge=0, le=3, description="At most so many partial pictures; with stream.")
    user: str | None = Field(None, description="Told back as safety_identifier.")
    safety_identifier: str | None = Field(None, description="Told back.")
    style: None = Field(None, description="Describe the style in the prompt.")
    svg: None = Field(None, description="Pictures are made of pixels.")
    complexity: None = Field(None, description="Every picture takes the same number of tokens.")
    frame_count: None = Field(None, description="There are no moving pictures.")
    frame_duration_ms: None = Field(None, description="There are no moving pictures.")
    seed: int | None = Field(None, description="Of the first picture; the next ones count on. Random if absent.")
    negative_prompt: str | None = Field(
        None, max_length=MAX_PROMPT_CHARACTERS, description="What guidance leads away from."
    )
    guidance_scale: float | None = Field(None, description="Classifier-free guidance, above 0; 1 is off.")
    temperature: float | None = Field(None, description="0 takes the likeliest token.")
    top_k: int | None = Field(None, description="Sample among the k likeliest tokens; 0 is all.")
    top_p: float | None = Field(None, description="Sample among the likeliest tokens that hold this mass, in (0, 1].")
    init_image: str | None = Field(
        None,
        max_length=MAX_INIT_IMAGE_CHARACTERS,
        description="Base64 of a PNG, JPEG or WebP file; the picture starts from its upper keep_rows.",
    )
    keep_rows: int | None = Field(None, description="Rows of image tokens taken from init_image.")
    sjd: SJDOptions | None = None

    @classmethod
    def parse(cls, body: bytes) -> ImagesRequest:
        """Read the body. Raises ApiError (400) that names the field."""
        try:
            request = cls.model_validate_json(body)
        except ValidationError as error:
            raise _validation_error(error) from error
        request._check_combinations()
        return request

    def _check_combinations(self) -> None:
        if (self.n or 1) > 1 and self.stream:
            raise ApiError(
                400,
                "n must be 1 with stream: the events of OpenAI's stream do not say which picture they belong to.",
                param="n",
            )
        if self.partial_images and not self.stream:
            raise ApiError(400, "partial_images needs stream.", param="partial_images")
        if self.wants_rows and not self.stream:
            raise ApiError(400, "partial_rows needs stream.", param="sjd.partial_rows")
        if self.wants_rows and self.partial_images:
            raise ApiError(
                400, "partial_rows takes the place of partial_images; give one of them.", param="sjd.partial_rows"
            )
        if self.output_compression is not None and self.file_format == "png":
            raise ApiError(
                400,
                "output_compression needs output_format jpeg or webp; png loses nothing.",
                param="output_compression",
            )

    @property
    def file_format(self) -> Literal["png", "jpeg", "webp"]:
        """Of the pictures in the answer."""
        return self.output_format or "png"

    @property
    def wants_rows(self) -> bool:
        """Whether a partial picture is due after each finished row."""
        return self.sjd is not None and self.sjd.partial_rows

    @property
    def identifier(self) -> str | None:
        """What OpenAI calls the effective safety identifier: the newer field, else the older one, if not empty."""
        return self.safety_identifier or self.user or None

    def image_request(self) -> ImageRequest:
        """The same as the other front doors have it. Raises ApiError (400) that names the field."""
        sjd = self.sjd or SJDOptions.model_validate({})
        try:
            return ImageRequest(
                prompt=self.prompt,
                n=self.n or 1,
                seed=self.seed,
                guidance_scale=self.guidance_scale,
                negative_prompt=self.negative_prompt,
                size=None if self.size == "auto" else self.size,
                temperature=self.temperature,
                top_k=self.top_k,
                top_p=self.top_p,
                method=sjd.method,
                num_speculative_tokens=sjd.num_speculative_tokens,
                redraft=sjd.redraft,
                first_guess=sjd.first_guess,
                init_image=self._init_image_file(),
                keep_rows=self.keep_rows,
            )
        except ConfigError as error:
            raise setting_error(str(error), error.param) from error

    def _init_image_file(self) -> bytes | None:
        if self.init_image is None:
            return None
        try:
            # clients have files as data URLs too; nothing else of a URL is understood
            return base64.b64decode(_DATA_URL.sub("", self.init_image, count=1), validate=True)
        except ValueError as error:
            raise ConfigError("init_image", "init_image is not base64 of a file.") from error


def setting_error(message: str, setting: str | None) -> ApiError:
    """A refused setting of the pipeline or the engine, named as the request's body has it."""
    param = _REQUEST_NAMES.get(setting or "", setting)
    return ApiError(400, message, param=f"sjd.{param}" if param in SJDOptions.model_fields else param)


def as_api_error(error: BaseException) -> ApiError:
    """Whatever went wrong as an answer: our own and vLLM's refusals as they are, anything else without its insides."""
    from vllm.exceptions import GracefulHTTPError, VLLMClientError

    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, ApiError):
        return error
    if isinstance(error, VLLMClientError):
        # Its own __str__ puts the parameter behind the message.
        return setting_error(Exception.__str__(error), getattr(error, "parameter", None))
    if isinstance(error, GracefulHTTPError):
        return ApiError(int(error.http_status), error.message)
    return ApiError(500, "the server failed on this request; its log says more.")


def json_schema(model: type[BaseModel]) -> dict[str, Any]:
    """The model's JSON schema without references, which would lead nowhere inside an OpenAPI document."""
    schema = model.model_json_schema()
    parts = schema.pop("$defs", {})

    def inlined(node: Any) -> Any:
        if isinstance(node, list):
            return [inlined(item) for item in node]
        if not isinstance(node, dict):
            return node
        if "$ref" in node:
            return inlined(parts[node["$ref"].rsplit("/", 1)[1]])
        return {key: inlined(value) for key, value in node.items()}

    return typing.cast(dict[str, Any], inlined(schema))


def _validation_error(error: ValidationError) -> ApiError:
    first = error.errors(include_url=False, include_input=False)[0]
    path = [str(part) for part in first["loc"]]
    param = ".".join(path) or None
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not valid JSON: {first['msg']}.")
    fields = SJDOptions.model_fields if path[:1] == ["sjd"] and len(path) > 1 else ImagesRequest.model_fields
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unknown field {param!r}.{nearest_name(path[-1], fields)}", param=param)
    field = fields.get(path[-1]) if path else None
    reason = f" {field.description}" if field is not None and field.description else ""
    if first["type"] == "none_required":
        return ApiError(400, f"{param} is not supported.{reason}", param=param)
    return ApiError(400, f"{param or 'the body'}: {first['msg']}.{reason}", param=param)
