"""Tensors of checkpoint files: their headers without their contents, and what is missing or too many among them.

Formats: safetensors, and PyTorch's zip files as original releases have them. Those with a state dict (.pt, .pth, .bin,
.ckpt) are read by PyTorch's unpickler for weights alone, and TorchScript's (.jit) by ours; neither runs code of theirs.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sjd_vllm.models.torchscript import read_torchscript

Shape = tuple[int, ...]


class PackedShape(tuple[int, ...]):
    """Of a tensor of integers, or of floating-point numbers of at most eight bits, as quantised weights are stored."""

    __slots__ = ()


# Training code leaves its command line beside the weights; a Namespace holds it and does nothing.
INERT_CLASSES = (Namespace,)

_WIDE = ("BF16", "F16", "F32", "F64")  # safetensors' names


def tensor_shapes(files: Iterable[Path]) -> dict[str, Shape]:
    """Name and shape of every tensor in some files, contents unread. Raises ValueError for a file that is damaged."""
    shapes: dict[str, Shape] = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                with safe_open(file, "pt") as opened:
                    found = {name: _header(opened.get_slice(name)) for name in opened.keys()}  # noqa: SIM118
            else:
                found = {name: stored_shape(tensor) for name, tensor in _unpickled(file, device="meta").items()}
        except Exception as error:
            raise ValueError(f"{file.name} cannot be read: {error}") from error
        twice = shapes.keys() & found.keys()
        if twice:
            raise ValueError(f"{file.name} has a tensor that another file has too: {min(twice)}")
        shapes.update(found)
    return shapes


def stored_shape(tensor: Tensor) -> Shape:
    """The shape of a tensor as a checkpoint has it: a PackedShape where its numbers are packed."""
    is_wide = tensor.is_floating_point() and tensor.itemsize > 1
    return tuple(tensor.shape) if is_wide else PackedShape(tensor.shape)


def _header(tensor: Any) -> Shape:
    """As `stored_shape`, of a tensor in a safetensors file that is not read."""
    shape = tensor.get_shape()
    return tuple(shape) if tensor.get_dtype() in _WIDE else PackedShape(shape)


def read_tensors(files: Iterable[Path], names: Container[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Name and content of the tensors in some files, all or those of some names, one after the other, on the CPU."""
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "pt") as opened:
                for name in opened.keys():  # noqa: SIM118
                    if names is None or name in names:
                        yield name, opened.get_tensor(name)
        else:
            for name, tensor in _unpickled(file, device="cpu").items():
                if names is None or name in names:
                    yield name, tensor


def differences(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, surplus: Iterable[str] = ()) -> list[str]:
    """What is wrong with the tensors found, one line each.

    Args:
        surplus: names, or beginnings of names that end with a dot, of tensors that may be there and are not used.
    """
    unused = tuple(surplus)
    problems = [f"the tensor {name} is missing" for name in expected if name not in found]
    for name, shape in found.items():
        if name not in expected:
            if not any(name == one or (one.endswith(".") and name.startswith(one)) for one in unused):
                problems.append(f"the tensor {name} is not known")
        elif tuple(shape) != tuple(expected[name]):
            problems.append(f"the tensor {name} has the shape {list(shape)}; the config says {list(expected[name])}")
    return problems


def _unpickled(file: Path, *, device: str) -> dict[str, Tensor]:
    """The state dict in a file, which may stand under a key of its own, as training code leaves it."""
    if file.suffix == ".jit":
        return read_torchscript(file, device=device)
    with torch.serialization.safe_globals([*INERT_CLASSES]):
        return state_dict(torch.load(file, map_location=device, weights_only=True, mmap=True))


def state_dict(content: Any) -> dict[str, Tensor]:
    """The tensors by name in what a file holds. Raises ValueError where it is no mapping."""
    for key in ("model", "state_dict", "module"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict):
        raise ValueError("it holds no state dict")
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}
