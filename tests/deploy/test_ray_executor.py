"""Two workers of vLLM's Ray executor on a real cluster, whose nodes count their CPUs' processes as GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import pytest
import ray
from engine_harness import Engine, Reference, engine
from parallel_cases import PAIR, PASS, WINDOW, greedy_tokens, law_samples, p_value
from ray.exceptions import RayTaskError
from vllm.v1.executor.ray_executor_v2 import RayExecutorV2

from ray_cluster import Head, connect
from sjd_vllm import plugin
from sjd_vllm.build import installed_build

pytestmark = pytest.mark.cluster


@contextmanager
def connected(head: Head) -> Iterator[None]:
    """This process as the engine's, which must take CPUs for GPUs like the cluster's nodes."""
    from vllm.platforms import current_platform

    patch = pytest.MonkeyPatch()
    patch.setattr(type(current_platform), "ray_device_key", "GPU")
    connect(head.address)
    try:
        yield
    finally:
        ray.shutdown()
        patch.undo()


@pytest.fixture(scope="module")
def driver(head: Head) -> Iterator[None]:
    with connected(head):
        yield


def two_ray_workers(model: Path) -> AbstractContextManager[Engine]:
    return engine(model, window=WINDOW, tensor_parallel_size=2, distributed_executor_backend="ray", max_num_seqs=128)


@pytest.fixture(scope="module")
def two_actors(tiny_llama: Path, greedy_alone: list[list[int]], driver: None) -> Iterator[Engine]:
    with two_ray_workers(tiny_llama) as running:
        yield running


def test_an_actor_with_another_build_ends_the_start_and_names_its_node(
    tiny_llama: Path, head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands first: a connection of its own gives the two GPUs back, which vLLM keeps reserved after a failed start."""
    expected = {**installed_build(tiny_llama), "torch": "0.0.7"}
    monkeypatch.setattr(plugin, "installed_build", lambda model: expected)
    begun: list[RayExecutorV2] = []
    start = RayExecutorV2._init_executor
    monkeypatch.setattr(RayExecutorV2, "_init_executor", lambda self: (begun.append(self), start(self))[1])
    with connected(head):
        node = ray.nodes()[0]["NodeID"]
        with (
            pytest.raises(RayTaskError, match=f"Ray node {node}.* has another build") as refused,
            two_ray_workers(tiny_llama),
        ):
            pytest.fail("it has started")
        assert "'0.0.7' is expected" in str(refused.value)
        (executor,) = begun
        executor.shutdown()  # vLLM would do that when this process ends, and start a Ray of its own for it


def test_the_workers_are_actors(two_actors: Engine) -> None:
    assert type(two_actors.core.model_executor).__name__ == "RayExecutorV2"
    assert len(two_actors.core.model_executor.ray_worker_handles) == 2


def test_greedy_tokens_are_those_of_one_worker(two_actors: Engine, greedy_alone: list[list[int]]) -> None:
    assert greedy_tokens(two_actors) == greedy_alone
    two_actors.assert_nothing_left()


def test_joint_law_under_guidance(two_actors: Engine, reference: Reference) -> None:
    samples = law_samples(two_actors, {**PAIR, "redraft": "coupled"})
    assert p_value(samples, reference, PAIR) > PASS
    assert p_value(samples, reference, None) < PASS, "samples without guidance would pass too"
