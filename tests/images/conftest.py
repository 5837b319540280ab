from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from sjd_vllm import ImagePipeline
from tiny_models import make_tiny_painter


@pytest.fixture(scope="session")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random checkpoint in the layout of the demo model: 43 tokens a picture, guidance 2."""
    return make_tiny_painter(tmp_path_factory.mktemp("painter"))


@pytest.fixture(scope="module")
def pipeline(painter: Path) -> Iterator[ImagePipeline]:
    """One engine for a test module, which decodes 4 pictures at once."""
    with ImagePipeline(painter, num_speculative_tokens=8, max_batch_size=4) as started:
        started.start()
        yield started
