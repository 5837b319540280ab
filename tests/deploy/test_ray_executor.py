"""Two workers of vLLM's Ray executor on a real cluster, whose nodes count their CPUs' processes as GPUs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from engine_harness import Engine, Reference, engine
from parallel_cases import PAIR, PASS, greedy_tokens, law_samples, p_value

from ray_cluster import Head, connect
from sjd_vllm.build import BUILD_KEY

pytestmark = pytest.mark.cluster

WINDOW = 16


@pytest.fixture(scope="module")
def greedy_alone(tiny_llama: Path) -> list[list[int]]:
    with engine(tiny_llama, window=WINDOW) as running:
        return greedy_tokens(running)


@pytest.fixture(scope="module")
def driver(head: Head, cpu_as_gpu: Path) -> Iterator[None]:
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
def two_actors(tiny_llama: Path, greedy_alone: list[list[int]], driver: None) -> Iterator[Engine]:
    with engine(
        tiny_llama,
        window=WINDOW,
        tensor_parallel_size=2,
        distributed_executor_backend="ray",
        max_num_seqs=128,
    ) as running:
        yield running


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


def test_every_worker_was_given_the_build_to_compare_with(two_actors: Engine) -> None:
    assert two_actors.llm.llm_engine.vllm_config.additional_config[BUILD_KEY]["sjd-vllm"]
