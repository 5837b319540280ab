"""Headers of checkpoint files, and what is wrong with the tensors they name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sjd_vllm.models.tensors import differences, read_tensors, tensor_shapes

TENSORS = {"a.weight": torch.arange(6.0).view(2, 3), "b.bias": torch.ones(4)}


@pytest.fixture(params=["safetensors", "pt", "wrapped.pth"])
def file(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"weights.{request.param}"
    if path.suffix == ".safetensors":
        save_file(TENSORS, path)
    else:
        torch.save({"model": TENSORS, "epoch": 3} if path.suffix == ".pth" else TENSORS, path)
    return path


def test_shapes_and_contents(file: Path) -> None:
    assert tensor_shapes([file]) == {"a.weight": (2, 3), "b.bias": (4,)}
    read = dict(read_tensors([file]))
    assert read.keys() == TENSORS.keys()
    assert all(torch.equal(read[name], TENSORS[name]) for name in TENSORS)


def test_a_tensor_in_two_files_is_refused(file: Path) -> None:
    with pytest.raises(ValueError, match=r"another file has too: a\.weight"):
        tensor_shapes([file, file])


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_damaged_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"weights.{suffix}"
    path.write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match=rf"weights\.{suffix} cannot be read"):
        tensor_shapes([path])


def test_a_pickle_with_code_in_it_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "weights.pt"
    torch.save({"model": Path}, path)
    with pytest.raises(ValueError, match="cannot be read"):
        tensor_shapes([path])


def test_differences_name_the_tensor() -> None:
    expected = {"a": (2, 3), "b": (4,), "c": (1,)}
    found = {"a": (3, 2), "b": (4,), "d": (1,), "extra.one": (1,), "extra": (1,)}
    assert differences(expected, found, surplus=["extra."]) == [
        "the tensor c is missing",
        "the tensor a has the shape [3, 2]; the config says [2, 3]",
        "the tensor d is not known",
        "the tensor extra is not known",
    ]
    assert differences({"a": (1,)}, {"a": (1,)}) == []
