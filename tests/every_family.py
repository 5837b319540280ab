"""A tiny checkpoint of every family, for tests of what all of them must do."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import tiny_chameleon
import tiny_emu3
import tiny_janus
import tiny_llamagen
import tiny_lumina_mgpt2
import tiny_simplear

import tiny_models

# Family -> writes a checkpoint of it to a folder that is not there yet, and returns the folder of the checkpoint.
MAKERS: dict[str, Callable[[Path], Path]] = {
    "demo": tiny_models.make_tiny_painter,
    "chameleon": lambda path: tiny_chameleon.write_anole(path, tiny_chameleon.make_model()),
    "lumina_mgpt": lambda path: tiny_chameleon.write_lumina(path / "Lumina-mGPT-7B-8", tiny_chameleon.make_model()),
    "lumina_mgpt2": tiny_lumina_mgpt2.make_lumina_mgpt2,
    "emu3": tiny_emu3.make_converted,
    "janus": lambda path: tiny_janus.write_converted(
        path, tiny_janus.make_model(vq=tiny_janus.SMALL_VQ, image_size=12)
    ),
    "llamagen": lambda path: tiny_llamagen.make_tiny_llamagen(path, "t2i"),
    "simplear": tiny_simplear.make_tiny_simplear,
}
