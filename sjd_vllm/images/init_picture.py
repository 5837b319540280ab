"""A given picture whose upper rows a new one starts from: read, fitted to the size, turned into tokens."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageOps

from sjd_vllm.config import ConfigError, check_int

if TYPE_CHECKING:
    from sjd_vllm.models.family import ImageFamily, ImageSize

FILE_FORMATS = ("PNG", "JPEG", "WEBP")
MAX_PIXELS = 1 << 24


def given_token_ids(family: ImageFamily, size: ImageSize, file: bytes, keep_rows: int) -> list[int]:
    """The first tokens of a picture whose `keep_rows` upper rows of image tokens are those of a given one.

    The given picture is scaled to cover the size, and cut around its middle.

    Args:
        file: contents of a PNG, JPEG or WebP file of at most `MAX_PIXELS`.

    Raises ConfigError for a family without an encoder, a file that is no such picture, and rows out of range.
    """
    if not family.can_encode:
        raise ConfigError("init_image", f"models of the family {family.name} cannot start from a picture.")
    grammar = family.grammar(size)
    check_int("keep_rows", keep_rows, 1, grammar.grid[0] - 1)
    codes = family.encode_pixels(_fitted(file, size), size)
    return grammar.tokens(codes[:keep_rows])


def _fitted(file: bytes, size: ImageSize) -> np.ndarray[Any, np.dtype[np.uint8]]:
    try:
        with Image.open(io.BytesIO(file), formats=FILE_FORMATS) as image:
            # known from the header, before anything is unpacked
            if image.width * image.height > MAX_PIXELS:
                raise ConfigError(
                    "init_image",
                    f"the given picture has {image.width}x{image.height} pixels; {MAX_PIXELS} are allowed.",
                )
            upright = ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError("init_image", f"the given picture cannot be read as {', '.join(FILE_FORMATS)}.") from error
    return np.asarray(ImageOps.fit(upright, (size.width, size.height), Image.Resampling.LANCZOS))
