"""Tensors of TorchScript archives: those that PyTorch itself finds, and no code."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sjd_vllm.models.tensors import read_tensors, tensor_shapes
from sjd_vllm.models.torchscript import read_torchscript


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).to(torch.bfloat16)
        self.register_buffer("counts", torch.arange(6).view(2, 3).t(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x.to(torch.bfloat16)) + self.counts.sum()


class Branching(nn.Module):
    """What only a script can hold."""

    def __init__(self) -> None:
        super().__init__()
        self.parts = nn.ModuleList([Part(), Part()])
        self.shared = self.parts[0].linear
        self.sizes = [1, 2, 3]
        self.names = ["a", "b"]

    def forward(self, x: Tensor) -> Tensor:
        for part in self.parts:
            x = part(x)[:, :1].expand(-1, 3) if x.sum() > 0 else x
        return self.shared(x.to(torch.bfloat16)) + len(self.sizes) + len(self.names)


@pytest.fixture(params=["traced", "scripted"])
def archive(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    file = tmp_path / f"{request.param}.jit"
    made = torch.jit.trace(Part(), torch.ones(1, 3)) if request.param == "traced" else torch.jit.script(Branching())
    made.save(file)
    return file


def test_tensors_are_those_of_the_loaded_module(archive: Path) -> None:
    expected = torch.jit.load(archive).state_dict()
    found = read_torchscript(archive)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    assert tensor_shapes([archive]) == {name: tuple(tensor.shape) for name, tensor in expected.items()}
    assert dict(read_tensors([archive])).keys() == expected.keys()


class Harm:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path]]:
        return Path.touch, (self.path,)


def test_code_in_the_description_is_refused_and_not_run(tmp_path: Path) -> None:
    file, touched = tmp_path / "harm.jit", tmp_path / "touched"
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("harm/data.pkl", pickle.dumps(Harm(touched), protocol=2))
    with pytest.raises(ValueError, match=r"harm\.jit is not a TorchScript archive that can be read: it names "):
        read_torchscript(file)
    assert not touched.exists()


def test_damaged_archives_are_named(archive: Path, tmp_path: Path) -> None:
    file = tmp_path / "damaged.jit"
    file.write_bytes(archive.read_bytes()[:400])
    with pytest.raises(ValueError, match=r"damaged\.jit"):
        tensor_shapes([file])
    with zipfile.ZipFile(archive) as whole, zipfile.ZipFile(file, "w") as cut:
        for name in whole.namelist():
            content = whole.read(name)
            cut.writestr(name, content[:2] if "/data/" in name else content)
    with pytest.raises(ValueError, match=r"damaged\.jit"):
        read_torchscript(file)
    with zipfile.ZipFile(file, "w") as empty:
        empty.writestr("a/b", b"")
    with pytest.raises(ValueError, match=r"it has no data\.pkl"):
        read_torchscript(file)
