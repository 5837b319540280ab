"""The Kubernetes manifest: KubeRay's schema, Ray Serve's schema of what is in it, and our own settings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from sjd_vllm.deploy.settings import DeploySettings

MANIFEST = Path(__file__).parents[2] / "docs" / "kubernetes" / "rayservice.yaml"
SCHEMA = json.loads((Path(__file__).parent / "rayservice_schema.json").read_text())


@pytest.fixture
def manifest() -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.safe_load(MANIFEST.read_text())
    return copy.deepcopy(loaded)  # its anchors become copies


def test_it_is_a_ray_service(manifest: dict[str, Any]) -> None:
    jsonschema.validate(manifest, SCHEMA)


def test_the_schema_sees_mistakes(manifest: dict[str, Any]) -> None:
    (workers,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    del workers["maxReplicas"]
    workers["minReplica"] = 1
    manifest["spec"]["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    errors = sorted(error.message for error in jsonschema.Draft7Validator(SCHEMA).iter_errors(manifest))
    assert len(errors) == 3
    assert "'maxReplicas' is a required property" in errors


def test_its_application_is_ours(manifest: dict[str, Any]) -> None:
    config = ServeDeploySchema.model_validate(yaml.safe_load(manifest["spec"]["serveConfigV2"]))
    (application,) = config.applications
    assert application.import_path == "sjd_vllm.deploy.ray_serve:build"
    settings = DeploySettings.from_mapping(application.args)
    (workers,) = manifest["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    pod = workers["template"]["spec"]
    limits = pod["containers"][0]["resources"]["limits"]
    assert settings.placement(has_gpus=True)["ray_actor_options"]["num_gpus"] == int(limits["nvidia.com/gpu"])
    assert settings.cpus <= int(limits["cpu"])
    assert (settings.replicas, settings.max_replicas) == (workers["minReplicas"], workers["maxReplicas"])
    assert pod["terminationGracePeriodSeconds"] > settings.drain_timeout
