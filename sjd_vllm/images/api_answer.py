"""What POST /v1/images/generations answers: OpenAI's response and events, with figures of the decoding beside them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import BaseModel, Field

from sjd_vllm.images.api_protocol import ImagesRequest
from sjd_vllm.images.request import PictureRequest

FileFormat = Literal["png", "jpeg", "webp"]


@dataclass(frozen=True)
class DecodedPicture:
    """Tokens of one picture, whole or so far.

    Attributes:
        tokens_per_step: how many tokens each forward gave, in order; empty while the picture is unfinished.
        seconds: from entering the engine to the last of these tokens.
    """

    token_ids: list[int]
    tokens_per_step: list[int]
    seconds: float


@dataclass(frozen=True)
class PictureFile:
    """A picture as base64 of a file; `seconds` of decoding the pixels and writing the file."""

    base64: str
    seconds: float


class Figures(BaseModel):
    """How a picture was decoded."""

    num_tokens: int = Field(description="That the model wrote; those of a given picture's rows are not among them.")
    num_steps: int = Field(description="Forwards; plain decoding takes one a token.")
    step_compression: float = Field(description="Tokens per forward.")
    tokens_per_step: list[int] = Field(description="Tokens that each forward gave, in order.")
    decode_seconds: float = Field(description="From entering the engine to the last token.")
    pixel_seconds: float = Field(description="Decoding the pixels and writing the file.")


class PartialFigures(BaseModel):
    """How far a picture is, given rows included."""

    num_tokens: int
    num_rows: int = Field(description="Finished rows of image tokens.")


class PictureAnswer(BaseModel):
    """One picture."""

    b64_json: str
    seed: int = Field(description="Makes this picture again, alone.")
    sjd: Figures


class TokenDetails(BaseModel):
    """Tokens by kind."""

    text_tokens: int
    image_tokens: int


class Usage(BaseModel):
    """Tokens of the prompt, which is counted once, and of all pictures."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    output_tokens_details: TokenDetails
    total_tokens: int


class ImagesAnswer(BaseModel):
    """All pictures of a request."""

    created: int = Field(description="Unix time in seconds.")
    background: Literal["opaque"] = "opaque"
    output_format: FileFormat
    size: str
    data: list[PictureAnswer]
    usage: Usage
    safety_identifier: str | None


class PartialImageEvent(BaseModel):
    """The finished rows of a picture; the rest is grey."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: FileFormat
    quality: Literal["auto"] = "auto"
    size: str
    partial_image_index: int
    sjd: PartialFigures


class CompletedEvent(BaseModel):
    """The whole picture."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    background: Literal["opaque"] = "opaque"
    created_at: int
    output_format: FileFormat
    quality: Literal["auto"] = "auto"
    size: str
    usage: Usage
    safety_identifier: str | None
    seed: int
    sjd: Figures


class ErrorObject(BaseModel):
    """What went wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(BaseModel):
    """OpenAI's error."""

    error: ErrorObject


def picture_answer(picture: PictureRequest, decoded: DecodedPicture, file: PictureFile) -> PictureAnswer:
    """A finished picture with its seed and figures."""
    num_tokens, num_steps = picture.num_new_tokens, len(decoded.tokens_per_step)
    figures = Figures(
        num_tokens=num_tokens,
        num_steps=num_steps,
        step_compression=num_tokens / num_steps,
        tokens_per_step=decoded.tokens_per_step,
        decode_seconds=decoded.seconds,
        pixel_seconds=file.seconds,
    )
    return PictureAnswer(b64_json=file.base64, seed=picture.seed, sjd=figures)


def images_answer(
    request: ImagesRequest, pictures: Sequence[PictureRequest], answers: list[PictureAnswer]
) -> ImagesAnswer:
    """The response without stream."""
    return ImagesAnswer(
        created=int(time.time()),
        output_format=request.file_format,
        size=str(pictures[0].size),
        data=answers,
        usage=_usage(pictures),
        safety_identifier=request.identifier,
    )


def partial_event(
    request: ImagesRequest, picture: PictureRequest, index: int, figures: PartialFigures, file: PictureFile
) -> PartialImageEvent:
    """An unfinished picture; index counts from 0."""
    return PartialImageEvent(b64_json=file.base64, partial_image_index=index, sjd=figures, **_common(request, picture))


def completed_event(request: ImagesRequest, picture: PictureRequest, answer: PictureAnswer) -> CompletedEvent:
    """The end of a stream."""
    return CompletedEvent(
        b64_json=answer.b64_json,
        usage=_usage([picture]),
        safety_identifier=request.identifier,
        seed=answer.seed,
        sjd=answer.sjd,
        **_common(request, picture),
    )


def _common(request: ImagesRequest, picture: PictureRequest) -> dict[str, Any]:
    return {"created_at": int(time.time()), "output_format": request.file_format, "size": str(picture.size)}


def _usage(pictures: Sequence[PictureRequest]) -> Usage:
    text, given = len(pictures[0].prompt_token_ids), len(pictures[0].given_token_ids)
    image = sum(picture.num_new_tokens for picture in pictures)
    return Usage(
        input_tokens=text + given,
        input_tokens_details=TokenDetails(text_tokens=text, image_tokens=given),
        output_tokens=image,
        output_tokens_details=TokenDetails(text_tokens=0, image_tokens=image),
        total_tokens=text + given + image,
    )
