"""The demo model's pixels of a picture do not depend on which others are decoded with it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from sjd_vllm.demo import checkpoint_path
from sjd_vllm.models.demo.family import DemoFamily
from sjd_vllm.models.registry import load_family


def test_pixels_are_those_of_the_picture_alone() -> None:
    family = load_family(Path(checkpoint_path()))
    assert isinstance(family, DemoFamily)
    size = family.size("96x48")  # convolutions of one of these and of several take different kernels
    grammar = family.grammar(size)
    codes = torch.randint(1024, (200, *grammar.grid), generator=torch.Generator().manual_seed(0))
    pictures = [grammar.tokens(one) for one in codes]
    together = family.decode_pixels(pictures, size)
    alone = np.concatenate([family.decode_pixels([one], size) for one in pictures])
    assert (together == alone).all()
    assert len({picture.tobytes() for picture in alone}) == len(pictures)
