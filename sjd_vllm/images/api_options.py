"""What GET /v1/images/options answers: what the served model can make, and with which settings."""

from __future__ import annotations

from pydantic import BaseModel, Field

from sjd_vllm.config import FIRST_GUESS_NAMES, REDRAFT_NAMES, SJDConfig
from sjd_vllm.images.api_protocol import MAX_PICTURES
from sjd_vllm.images.request import METHOD_NAMES
from sjd_vllm.models.family import ImageFamily, ImageSize


class SizeOption(BaseModel):
    """A picture size and how its tokens lie: row r, column c is token first_position + r * row_stride + c."""

    size: str
    width: int
    height: int
    rows: int = Field(description="Rows of image tokens.")
    columns: int = Field(description="Image tokens in a row.")
    num_tokens: int = Field(description="Of a whole picture, forced ones included.")
    first_position: int
    row_stride: int


class Defaults(BaseModel):
    """What an absent field means."""

    size: str
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float
    num_speculative_tokens: int = Field(description="Also the longest window.")
    redraft: str
    first_guess: str


class ImageOptions(BaseModel):
    """Values for the fields of a request."""

    model: str
    sizes: list[SizeOption]
    defaults: Defaults
    max_n: int
    methods: list[str]
    redrafts: list[str]
    first_guesses: list[str]
    examples: list[str] = Field(description="Prompts that show what the model can do.")
    init_image: bool = Field(description="Whether a picture can start from the rows of a given one.")


def image_options(model: str, family: ImageFamily, config: SJDConfig) -> ImageOptions:
    """The options of a family on an engine."""
    sampling = family.defaults
    return ImageOptions(
        model=model,
        sizes=[_size_option(family, size) for size in family.sizes],
        defaults=Defaults(
            size=str(family.sizes[0]),
            guidance_scale=sampling.guidance_scale,
            temperature=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            num_speculative_tokens=config.num_speculative_tokens,
            redraft=config.redraft,
            first_guess=config.first_guess,
        ),
        max_n=MAX_PICTURES,
        methods=list(METHOD_NAMES),
        redrafts=list(REDRAFT_NAMES),
        first_guesses=list(FIRST_GUESS_NAMES),
        examples=list(family.examples),
        init_image=family.can_encode,
    )


def _size_option(family: ImageFamily, size: ImageSize) -> SizeOption:
    grammar = family.grammar(size)
    rows, columns = grammar.grid
    return SizeOption(
        size=str(size),
        width=size.width,
        height=size.height,
        rows=rows,
        columns=columns,
        num_tokens=grammar.num_tokens,
        first_position=int(grammar.code_positions[0]),
        row_stride=grammar.row_stride,
    )
