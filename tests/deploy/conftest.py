from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from engine_fixtures import expected, reference, tiny_llama
from engine_harness import engine
from parallel_cases import WINDOW, greedy_tokens

from ray_cluster import Head, node_environment, ray_head

__all__ = ["expected", "reference", "tiny_llama"]

CPU_AS_GPU = '''
"""Lets vLLM's Ray executor run on CPUs: Ray counts GPUs, it does not look."""

from vllm.platforms.cpu import CpuPlatform


class CpuAsGpu(CpuPlatform):
    ray_device_key = "GPU"
'''
# apart from the class, as vLLM asks for it while it still resolves its platform
ENTRY = """
def platform():
    return "cpu_as_gpu.CpuAsGpu"
"""


@pytest.fixture(scope="session")
def greedy_alone(tiny_llama: Path) -> list[list[int]]:
    """The greedy tokens of one worker, which two must give too."""
    with engine(tiny_llama, window=WINDOW) as running:
        return greedy_tokens(running)


@pytest.fixture(scope="session")
def cpu_as_gpu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for Python's path with a platform plugin of vLLM that is there for these tests only."""
    folder = tmp_path_factory.mktemp("plugin")
    (folder / "cpu_as_gpu.py").write_text(CPU_AS_GPU)
    (folder / "cpu_as_gpu_entry.py").write_text(ENTRY)
    info = folder / "cpu_as_gpu-0.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: cpu-as-gpu\nVersion: 0.0\n")
    (info / "entry_points.txt").write_text("[vllm.platform_plugins]\ncpu_as_gpu = cpu_as_gpu_entry:platform\n")
    return folder


@pytest.fixture(scope="session")
def node_variables(cpu_as_gpu: Path) -> dict[str, str]:
    """The environment of this cluster's nodes."""
    return node_environment(
        cpu_as_gpu,
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
        RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S="1",  # 10 by itself, and a test waits for several of them
    )


@pytest.fixture(scope="session")
def head(node_variables: dict[str, str]) -> Iterator[Head]:
    """One Ray cluster for all tests of this folder; nothing of it is left at their end."""
    with ray_head(4, node_variables) as running:
        yield running
