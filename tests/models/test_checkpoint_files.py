"""Weights in PyTorch's files, as some releases have them: read without a flag, and without running code of theirs."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from every_family import MAKERS
from safetensors.torch import load_file
from vllm.config.load import LoadConfig
from vllm.model_executor.model_loader.default_loader import DefaultModelLoader

from sjd_vllm.images.serve_command import ServerSettings
from sjd_vllm.models.checkpoint_files import weight_files
from sjd_vllm.models.registry import load_family

FAMILIES = ("chameleon", "lumina_mgpt", "lumina_mgpt2", "emu3", "janus", "simplear")


@pytest.fixture(params=FAMILIES)
def pickled(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A checkpoint with pytorch_model.bin in place of its safetensors."""
    path = MAKERS[request.param](tmp_path / "checkpoint")
    tensors = {name: tensor for file in weight_files(path) for name, tensor in load_file(file).items()}
    for file in (*path.glob("*.safetensors"), *path.glob("*.safetensors.index.json")):
        file.unlink()
    torch.save(tensors, path / "pytorch_model.bin")
    return path


def test_a_server_reads_them_without_a_flag(pickled: Path) -> None:
    found = load_family(pickled)
    assert found is not None
    assert found.problems() == []
    arguments = ServerSettings(model=str(pickled)).vllm_arguments()
    load_format = arguments[arguments.index("--load-format") + 1]
    loader = DefaultModelLoader(LoadConfig(load_format=load_format))
    read = dict(loader._get_weights_iterator(DefaultModelLoader.Source(str(pickled), revision=None)))
    written = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    assert read.keys() == written.keys()
    assert all(torch.equal(read[name], tensor) for name, tensor in written.items())


def test_code_in_them_is_never_run(tmp_path: Path) -> None:
    path = MAKERS["emu3"](tmp_path / "checkpoint")
    for file in path.glob("*.safetensors*"):
        file.unlink()
    mark = tmp_path / "was-run"

    class Harmful:
        def __reduce__(self) -> object:
            return Path.touch, (mark,)

    torch.save({"model.embed_tokens.weight": torch.zeros(2), "more": Harmful()}, path / "pytorch_model.bin")
    found = load_family(path)
    assert found is not None
    assert any("pytorch_model.bin cannot be read" in problem for problem in found.problems())
    loader = DefaultModelLoader(LoadConfig(load_format="hf"))
    with pytest.raises(pickle.UnpicklingError):
        dict(loader._get_weights_iterator(DefaultModelLoader.Source(str(path), revision=None)))
    assert not mark.exists()
    torch.load(path / "pytorch_model.bin", weights_only=False)  # the control: it would have been
    assert mark.exists()


def test_where_there_are_safetensors_nothing_else_is_read(tmp_path: Path) -> None:
    path = MAKERS["emu3"](tmp_path / "checkpoint")
    torch.save({}, path / "pytorch_model.bin")
    arguments = ServerSettings(model=str(path)).vllm_arguments()
    assert arguments[arguments.index("--load-format") + 1] == "safetensors"
    assert json.dumps([file.suffix for file in weight_files(path)]) == '[".safetensors"]'
