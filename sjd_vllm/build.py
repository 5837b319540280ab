"""Which build of this package, of vLLM and of a checkpoint a node has, so that nodes of a cluster can be compared.

A node with another build would not fail, it would draw other tokens: tensor-parallel ranks must agree on every one.
"""

from __future__ import annotations

import functools
import hashlib
import socket
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

from sjd_vllm import __version__

BUILD_KEY = "sjd_build"  # in vLLM's additional_config


class OtherBuildError(RuntimeError):
    """A node of the cluster has another build than the one that started the engine."""


def installed_build(model: str | Path) -> dict[str, str]:
    """Versions and digests on this node.

    Args:
        model: the checkpoint; one that is no folder here has no digest.
    """
    config = Path(model) / "config.json"
    return {
        "sjd-vllm": __version__,
        "source of sjd-vllm": _source_digest(),
        "vllm": _version("vllm"),
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "checkpoint's config.json": _digest(config.read_bytes()) if config.is_file() else "",
    }


def require_build(expected: Mapping[str, str], model: str | Path) -> None:
    """Raise OtherBuildError, which names this node and all differences, unless this node has the expected build."""
    found = installed_build(model)
    differences = [
        f"{name} is {found.get(name)!r} and {expected.get(name)!r} is expected"
        for name in {**expected, **found}
        if found.get(name) != expected.get(name)
    ]
    if differences:
        raise OtherBuildError(
            f"node {node_name()} has another build than the node that started the engine: {'; '.join(differences)}. "
            "Install the same versions and put the same checkpoint on every node."
        )


def node_name() -> str:
    """This machine's name and, in a Ray cluster, its address and Ray's id of the node."""
    name = socket.gethostname()
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return name
    return f"{name} ({ray.util.get_node_ip_address()}, Ray node {ray.get_runtime_context().get_node_id()})"


@functools.cache
def _source_digest() -> str:
    """Of all Python files of both packages: a checkout may differ from a release of the same number."""
    digest = hashlib.sha256()
    kernels = find_spec("sjd_kernels")
    roots = [Path(__file__).parent, *map(Path, kernels.submodule_search_locations or () if kernels else ())]
    for root in roots:
        for path in sorted(root.rglob("*.py")):
            digest.update(f"{path.relative_to(root)}\n".encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"
