"""Settings of the Ray Serve application and of `sjd-vllm serve --ray-replicas`: what they become, what is refused."""

from __future__ import annotations

from typing import Any

import pytest

from sjd_vllm.cli import main
from sjd_vllm.config import ConfigError
from sjd_vllm.deploy.settings import DeploySettings


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"replica": 2}, "Did you mean 'replicas'"),
        ({"replicas": 0}, "replicas must be a whole number from 1"),
        ({"replicas": 3, "max_replicas": 2}, "max_replicas must be a whole number from 3"),
        ({"executor": "rya"}, "Did you mean 'ray'"),
        ({"tensor_parallel_size": 0}, "tensor_parallel_size"),
        ({"num_speculative_tokens": 129}, "0 to 128"),
        ({"redraft": "resampel"}, "Did you mean 'resample'"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"max_pending_pictures": 3}, "max_pending_pictures"),
        ({"gpus": -1}, "gpus must be a number of at least 0"),
        ({"drain_timeout": float("nan")}, "drain_timeout"),
        ({"resources": {"tpu": "many"}}, r"resources\.tpu"),
        ({"resources": 3}, "resources must map"),
        ({"vllm_flags": "--seed 1"}, "list of texts"),
        ({"vllm_flags": ["--pipeline-parallel-size", "2"]}, "pipeline parallelism is not supported"),
        ({"vllm_flags": ["--seed", "1", "--data_parallel_size=2"]}, "use replicas"),
        ({"vllm_flags": ["-tp", "2"]}, "set tensor_parallel_size"),
    ],
)
def test_bad_settings_are_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DeploySettings.from_mapping(given)


def test_a_mapping_and_back() -> None:
    given = {"replicas": 2, "vllm_flags": ["--seed", "1"], "resources": {"node": 0.5}}
    settings = DeploySettings.from_mapping(given)
    assert settings.to_mapping() == given
    assert DeploySettings().to_mapping() == {}


def test_scaling() -> None:
    assert DeploySettings(replicas=3).scaling() == {"num_replicas": 3}
    scaling = DeploySettings(replicas=2, max_replicas=8, max_batch_size=5).scaling()["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"], scaling["target_ongoing_requests"]) == (2, 8, 5)


def test_placement() -> None:
    assert DeploySettings(cpus=4).placement(has_gpus=False)["ray_actor_options"]["num_gpus"] == 0
    alone = DeploySettings(tensor_parallel_size=2, resources={"node": 0.5}).placement(has_gpus=True)
    assert alone["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 2, "resources": {"node": 0.5}}
    assert "placement_group_bundles" not in alone
    spread = DeploySettings(tensor_parallel_size=2, executor="ray", cpus=4).placement(has_gpus=True)
    assert spread["placement_group_bundles"] == [{"CPU": 4}, {"GPU": 1}, {"GPU": 1}]
    assert "num_gpus" not in spread["ray_actor_options"]


def test_flags_of_vllm() -> None:
    arguments = DeploySettings(tensor_parallel_size=2, executor="ray", vllm_flags=("--seed", "1")).vllm_arguments()
    text = " ".join(arguments)
    assert "--tensor-parallel-size 2 --distributed-executor-backend ray --seed 1" in text
    assert arguments[0] == str(DeploySettings().checkpoint())
    assert '"max_pending_pictures": 256' in text


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--ray-replicas", "0"], "replicas must be a whole number from 1"),
        (["--ray-max-replicas", "2"], "--ray-max-replicas goes with --ray-replicas"),
        (["--tensor-parallel-size", "2"], "--tensor-parallel-size goes with --ray-replicas"),
        (["--ray-replicas", "2", "--redraft", "resampel"], "Did you mean 'resample'"),
        (["--ray-replicas", "2", "--port", "0"], "port"),
        (["--ray-replica", "2"], "Did you mean '--ray-replicas'"),
    ],
)
def test_bad_flags_take_one_line(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", *flags]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
