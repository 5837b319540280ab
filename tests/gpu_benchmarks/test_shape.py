"""The checkpoints that have a shape and no weights."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.shape import LARGE, SMALL, Shape, write_checkpoint
from sjd_vllm.deploy.plan import ModelShape
from sjd_vllm.images.check_command import checkpoint_report
from sjd_vllm.models.registry import load_family


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("shapes") / "large", LARGE)


@pytest.mark.parametrize("shape", [LARGE, SMALL], ids=lambda shape: shape.name)
def test_what_reads_headers_finds_a_whole_checkpoint(shape: Shape, tmp_path: Path) -> None:
    family = load_family(write_checkpoint(tmp_path / "one", shape))
    assert family is not None
    assert family.name == "lumina_mgpt"
    report = checkpoint_report(family)
    assert report["problems"] == []
    assert (report["sizes"][0]["size"], report["sizes"][0]["num_tokens"]) == (
        f"{shape.side}x{shape.side}",
        shape.num_tokens,
    )
    codes = family.grammar(family.sizes[0]).legal_sets[0]
    assert int(codes.sum()) == shape.num_codes
    assert len(family.prompt_token_ids("a red house", family.sizes[0])) > 3


def test_the_large_one_is_chameleon_7b(large: Path) -> None:
    shape = ModelShape.read(large)
    assert (shape.num_layers, shape.num_kv_heads, shape.head_dim, shape.picture_tokens) == (32, 32, 128, 1057)
    assert 7.0e9 < shape.num_parameters < 7.2e9  # the autoencoder's are among them


def test_it_takes_no_room(large: Path) -> None:
    stat = (large / "model.safetensors").stat()
    assert stat.st_size > 13e9
    assert 512 * stat.st_blocks < 1e6


def test_it_is_written_once(large: Path) -> None:
    before = (large / "config.json").stat().st_mtime_ns
    assert write_checkpoint(large, LARGE) == large
    assert (large / "config.json").stat().st_mtime_ns == before
