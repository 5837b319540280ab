"""Tensors of a TorchScript archive, read without TorchScript.

`torch.jit.load` compiles the archive's code and may run it. The tensors need none of it: the archive is a zip whose
`data.pkl` describes a tree of modules and where in the zip each tensor's numbers lie. That description is read here by
an unpickler that knows tensors and containers, makes inert objects of all that has code, and refuses the rest.
"""

from __future__ import annotations

import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DTYPE_OF_STORAGE = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}


def read_torchscript(file: Path, *, device: str = "cpu") -> dict[str, Tensor]:
    """Parameters and buffers by their names, as `state_dict()` of the loaded module would have them.

    Args:
        device: "cpu", or "meta" for their shapes alone.

    Raises ValueError for an archive that is damaged, or holds what no module of tensors has.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            found = [name for name in archive.namelist() if name.endswith("/data.pkl") and name.count("/") == 1]
            if not found:
                raise ValueError("it has no data.pkl")
            pickled = found[0]
            with archive.open(pickled) as stream:
                root = _Unpickler(stream, archive, pickled.removesuffix("data.pkl"), device).load()
            if not isinstance(root, _Module):
                raise ValueError("it holds no module")
            return dict(_tensors(root, ""))
    except Exception as error:  # a damaged description may fail anywhere
        raise ValueError(f"{file.name} is not a TorchScript archive that can be read: {error}") from error


class _Module:
    """Stands for an object of any class that the archive defines: what it holds, and none of what it does."""

    held: dict[str, Any]

    def __new__(cls, *args: Any) -> _Module:
        made = super().__new__(cls)
        made.held = {}
        return made

    def __setstate__(self, state: Any) -> None:
        self.held = state if isinstance(state, dict) else {}


class _Unpickler(pickle.Unpickler):
    def __init__(self, stream: Any, archive: zipfile.ZipFile, root: str, device: str) -> None:
        super().__init__(stream)
        self._archive, self._root, self._device = archive, root, device
        self._storages: dict[str, Tensor] = {}

    def find_class(self, module: str, name: str) -> Any:
        if module == "__torch__" or module.startswith("__torch__."):
            return _Module
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _tensor
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if module == "torch" and name in _DTYPE_OF_STORAGE:
            return name
        if (module, name) == ("torch.jit._pickle", "restore_type_tag"):
            return _untagged
        if module == "torch.jit._pickle" and name.startswith("build_"):
            return list
        raise pickle.UnpicklingError(f"it names {module}.{name}")

    def persistent_load(self, saved: Any) -> Tensor:
        kind, storage, key, _, numel = saved
        if kind != "storage":
            raise pickle.UnpicklingError(f"it refers to a {kind!r}")
        if key not in self._storages:
            dtype = _DTYPE_OF_STORAGE[storage]
            if self._device == "meta":
                flat = torch.empty(numel, dtype=dtype, device="meta")
            else:
                flat = torch.frombuffer(bytearray(self._archive.read(f"{self._root}data/{key}")), dtype=dtype)
            self._storages[key] = flat
        return self._storages[key]


def _tensor(flat: Tensor, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any) -> Tensor:
    """A view of a storage; as_strided raises RuntimeError where the storage is too short for it."""
    return flat.as_strided(size, stride, offset)


def _untagged(value: Any, _: str) -> Any:
    """A container, which the archive names the type of."""
    return value


def _tensors(module: _Module, prefix: str) -> Iterator[tuple[str, Tensor]]:
    for name, value in module.held.items():
        if isinstance(value, Tensor):
            yield prefix + name, value
        elif isinstance(value, _Module):
            yield from _tensors(value, f"{prefix}{name}.")
