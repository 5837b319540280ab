"""The same prompts and seeds by every method, on one picture."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

_GAP, _HEAD, _FOOT, _CAPTION = 10, 34, 22, 190  # pixels
_FONT, _SMALL = 17, 13
_INK, _SOFT, _GOOD = (28, 36, 48), (91, 102, 117), (0, 114, 178)


def side_by_side(
    heads: Sequence[str], rows: Sequence[tuple[str, Sequence[tuple[Path, str, bool]]]], cell: int = 192
) -> bytes:
    """WebP of a grid of pictures.

    Args:
        heads: one a column.
        rows: the prompt, and for each column the picture's file, what stands under it, and whether that is in colour.
        cell: pixels of a picture's side on the grid.
    """
    font, small = ImageFont.load_default(_FONT), ImageFont.load_default(_SMALL)
    width = _CAPTION + len(heads) * (cell + _GAP)
    height = _HEAD + len(rows) * (cell + _FOOT + _GAP)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, head in enumerate(heads):
        draw.text((_CAPTION + column * (cell + _GAP) + cell / 2, _HEAD / 2), head, _INK, font, anchor="mm")
    for row, (prompt, pictures) in enumerate(rows):
        top = _HEAD + row * (cell + _FOOT + _GAP)
        draw.multiline_text((0, top + 4), textwrap.fill(prompt, 25), _SOFT, small, spacing=5)
        for column, (path, note, is_coloured) in enumerate(pictures):
            left = _CAPTION + column * (cell + _GAP)
            with Image.open(path) as picture:
                sheet.paste(picture.convert("RGB").resize((cell, cell), Image.Resampling.BICUBIC), (left, top))
            draw.text((left + cell / 2, top + cell + 11), note, _GOOD if is_coloured else _SOFT, small, anchor="mm")
    stream = io.BytesIO()
    sheet.save(stream, format="WEBP", quality=90, method=6)
    return stream.getvalue()
