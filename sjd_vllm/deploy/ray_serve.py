"""The Ray Serve application: front doors and replicas. `serve run` starts it from a YAML file:

    applications:
    - name: images
      route_prefix: /
      import_path: sjd_vllm.deploy.ray_serve:build
      args: {replicas: 2}

`args` are the fields of `DeploySettings`.
"""

from __future__ import annotations

from typing import Any

import ray
from ray import serve
from ray.serve import Application

from sjd_vllm.build import installed_build
from sjd_vllm.deploy.front_door import FrontDoor
from sjd_vllm.deploy.replica import PictureReplica
from sjd_vllm.deploy.settings import DeploySettings

APP_NAME = "images"
_HANDLE_QUEUE = 1000  # requests that one front door keeps while all replicas are full, more are answered 429
_MAX_OPEN_REQUESTS = 100_000  # of a front door, which only waits for them


def build(args: dict[str, Any]) -> Application:
    """The application. Raises ConfigError for an unknown setting or a bad value."""
    settings = DeploySettings.from_mapping(args)
    has_gpus = ray.is_initialized() and ray.cluster_resources().get("GPU", 0) > 0
    replicas = serve.deployment(
        PictureReplica,
        name="replicas",
        max_ongoing_requests=settings.max_pending_pictures,
        max_queued_requests=_HANDLE_QUEUE,
        health_check_period_s=settings.health_check_period,
        health_check_timeout_s=30,
        graceful_shutdown_timeout_s=settings.drain_timeout,
        graceful_shutdown_wait_loop_s=1,
        **settings.scaling(),
        **settings.placement(has_gpus=has_gpus),
    )
    doors = serve.deployment(
        FrontDoor,
        name="front-door",
        num_replicas=settings.front_doors,
        max_ongoing_requests=_MAX_OPEN_REQUESTS,
        health_check_period_s=settings.health_check_period,
        graceful_shutdown_timeout_s=settings.drain_timeout,
        ray_actor_options={"num_cpus": 0},
    )
    return doors.bind(settings, replicas.bind(settings, installed_build(settings.checkpoint())))
