"""Where pictures are written; checked before anything is computed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sjd_vllm.config import ConfigError
from sjd_vllm.images.picture import Picture
from sjd_vllm.images.sheet import contact_sheet

_MAX_NAME = 200  # characters; file systems take 255 bytes, and numbers are put behind


@dataclass(frozen=True)
class OutputPaths:
    """The files of one call.

    `OUT.png` is the picture itself if there is one. Of several it is the contact sheet, and the pictures stand beside
    it as `OUT-1.png`, `OUT-2.png`, ... Any other path is a folder, made if it is not there, with `picture-1.png`,
    `picture-2.png`, ... and, of several, `contact-sheet.png`.
    """

    pictures: list[Path]
    sheet: Path | None

    @classmethod
    def plan(cls, output: str, num_pictures: int) -> OutputPaths:
        """Name the files and make the folder. Raises ConfigError unless all of them can be written."""
        path = Path(output).expanduser()
        if not output.strip() or len(path.name) > _MAX_NAME:
            raise ConfigError("output", f"output must be a .png file or a folder; got {output[:80]!r}.")
        is_file = path.suffix.lower() == ".png" and not path.is_dir()
        if not is_file and path.suffix.lower() in (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"):
            raise ConfigError("output", f"output must be a .png file or a folder; got {output!r}.")
        folder = path.parent if is_file else path
        stem = path.stem if is_file else "picture"
        digits = len(str(num_pictures))
        pictures = [folder / f"{stem}-{number:0{digits}d}.png" for number in range(1, num_pictures + 1)]
        if num_pictures > 1:
            plan = cls(pictures, path if is_file else folder / "contact-sheet.png")
        else:
            plan = cls([path] if is_file else pictures, None)
        _check_folder(folder, may_make=not is_file)
        for file in [*plan.pictures, *([plan.sheet] if plan.sheet else [])]:
            if file.is_dir() or (file.exists() and not os.access(file, os.W_OK)):
                raise ConfigError("output", f"cannot write to {file}.")
        return plan

    def save(self, pictures: Sequence[Picture], **more_settings: object) -> None:
        """Write the pictures, with their settings as metadata, and the contact sheet."""
        for path, picture in zip(self.pictures, pictures, strict=True):
            picture.save(path, **more_settings)
        if self.sheet is not None:
            contact_sheet([picture.image for picture in pictures]).save(self.sheet, format="PNG")


def _check_folder(folder: Path, *, may_make: bool) -> None:
    try:
        if may_make:
            folder.mkdir(exist_ok=True)
        # Rights say little on read-only and special file systems, so write something.
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise ConfigError("output", f"cannot write to the folder {str(folder)!r}: {reason}.") from error
