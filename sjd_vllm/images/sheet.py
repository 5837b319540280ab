"""Contact sheets."""

from __future__ import annotations

import math
from collections.abc import Sequence

from PIL import Image

_GAP = 4  # pixels between and around the pictures
_BACKGROUND = (24, 24, 24)


def contact_sheet(images: Sequence[Image.Image]) -> Image.Image:
    """All pictures on one, row by row, in a grid that is about square; cells are as large as the largest picture."""
    if not images:
        raise ValueError("a contact sheet needs at least one picture")
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    cell_width = max(image.width for image in images) + _GAP
    cell_height = max(image.height for image in images) + _GAP
    sheet = Image.new("RGB", (columns * cell_width + _GAP, rows * cell_height + _GAP), _BACKGROUND)
    for index, image in enumerate(images):
        row, column = divmod(index, columns)
        sheet.paste(image, (_GAP + column * cell_width, _GAP + row * cell_height))
    return sheet
