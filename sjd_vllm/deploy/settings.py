"""Settings of the Ray Serve application: `args` of its YAML file, and the flags of `sjd-vllm serve --ray-replicas`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sjd_vllm.config import ConfigError, SJDConfig, check_choice, check_int, nearest_name
from sjd_vllm.images.api_limits import ServerLimits
from sjd_vllm.images.serve_command import ServerSettings

EXECUTORS = ("mp", "ray")
_MAX_REPLICAS = 10_000
_ENGINE_SETTINGS = ("num_speculative_tokens", "redraft", "first_guess", "pixel_device")
# Flags of `vllm serve` that `vllm_flags` must not hold, since placement would not know of them; what to do instead.
_REFUSED_FLAGS = {
    ("--tensor-parallel-size", "-tp"): "set tensor_parallel_size",
    ("--distributed-executor-backend",): "set executor",
    ("--pipeline-parallel-size", "-pp"): "pipeline parallelism is not supported, use tensor_parallel_size",
    ("--data-parallel-size", "-dp"): "data parallelism is not supported, use replicas",
}


@dataclass(frozen=True)
class DeploySettings:
    """One application: front doors, and replicas with one engine each. Raises ConfigError for a bad value."""

    # the engine of each replica, as in `sjd-vllm serve`
    model: str | None = None  # a checkpoint's folder, the same path on every node; None is the demo model
    num_speculative_tokens: int | None = None
    redraft: str | None = None
    first_guess: str | None = None
    pixel_device: str | None = None  # where a replica computes pixels
    max_batch_size: int = 16  # pictures decoded at once by a replica
    max_pending_pictures: int = 256  # of a replica, accepted and not answered
    request_timeout: float = 600  # seconds
    client_timeout: float = 15  # seconds
    tensor_parallel_size: int = 1  # GPUs of an engine
    executor: str = "mp"  # vLLM's: mp keeps an engine on one node, ray may spread it over nodes
    vllm_flags: tuple[str, ...] = ()  # any others of `vllm serve`

    # how many
    replicas: int = 1  # engines; with max_replicas the least
    max_replicas: int | None = None  # the most; None: no autoscaling
    target_ongoing_requests: float | None = None  # of a replica, above which one is added; None: max_batch_size
    upscale_delay: float = 30  # seconds of load before a replica is added
    downscale_delay: float = 600  # seconds without it before one is taken away
    front_doors: int = 1  # processes that take requests and hand them on

    # of each replica
    cpus: float = 1
    gpus: float | None = None  # None: tensor_parallel_size on a cluster that has GPUs, else 0
    resources: Mapping[str, float] = dataclasses.field(default_factory=dict)  # Ray's custom resources
    health_check_period: float = 5  # seconds
    drain_timeout: float = 120  # seconds that a replica gets to finish its pictures before it is taken away

    def __post_init__(self) -> None:
        self.server()
        given = {name: getattr(self, name) for name in _ENGINE_SETTINGS}
        SJDConfig.from_mapping({name: value for name, value in given.items() if value is not None})
        check_choice("executor", self.executor, EXECUTORS)
        check_int("tensor_parallel_size", self.tensor_parallel_size, 1, 1024)
        check_int("replicas", self.replicas, 1, _MAX_REPLICAS)
        if self.max_replicas is not None:
            check_int("max_replicas", self.max_replicas, self.replicas, _MAX_REPLICAS)
        check_int("front_doors", self.front_doors, 1, 100)
        if isinstance(self.vllm_flags, str) or not all(isinstance(flag, str) for flag in self.vllm_flags):
            raise ConfigError("vllm_flags", f"vllm_flags must be a list of texts; got {self.vllm_flags!r}.")
        for flags, remedy in _REFUSED_FLAGS.items():
            for flag in self.vllm_flags:
                if flag.partition("=")[0].replace("_", "-") in flags:
                    raise ConfigError("vllm_flags", f"vllm_flags must not hold {flag}: {remedy}.")
        for name in ("upscale_delay", "downscale_delay", "health_check_period", "drain_timeout", "cpus"):
            _check_number(name, getattr(self, name))
        for name in ("target_ongoing_requests", "gpus"):
            if getattr(self, name) is not None:
                _check_number(name, getattr(self, name))
        if not isinstance(self.resources, Mapping):
            raise ConfigError("resources", f"resources must map names to amounts; got {self.resources!r}.")
        for name, amount in self.resources.items():
            _check_number(f"resources.{name}", amount)

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> DeploySettings:
        """Build from JSON-like settings. Raises ConfigError for an unknown key or a bad value."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                hint = nearest_name(key, known)
                raise ConfigError(key, f"unknown setting {key!r}; known are {', '.join(known)}.{hint}")
        return cls(**given)

    def to_mapping(self) -> dict[str, Any]:
        """What differs from the defaults, as plain JSON types."""
        default = type(self)()
        return {
            field.name: list(value) if isinstance(value, tuple) else value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != getattr(default, field.name)
        }

    def checkpoint(self) -> Path:
        """The folder of the model."""
        if self.model is not None:
            return Path(self.model)
        from sjd_vllm.demo import checkpoint_path

        return Path(checkpoint_path())

    def server(self) -> ServerSettings:
        """The part that `sjd-vllm serve` knows too."""
        return ServerSettings(
            model=self.model,
            num_speculative_tokens=self.num_speculative_tokens,
            redraft=self.redraft,
            first_guess=self.first_guess,
            pixel_device=self.pixel_device,
            max_batch_size=self.max_batch_size,
            limits=ServerLimits(self.max_pending_pictures, self.request_timeout, self.client_timeout),
        )

    def vllm_arguments(self) -> list[str]:
        """What `vllm serve` would be given in a replica. Raises ConfigError for an unknown model."""
        parallel: list[str] = []
        if self.tensor_parallel_size > 1:
            parallel = ["--tensor-parallel-size", str(self.tensor_parallel_size)]
            parallel += ["--distributed-executor-backend", self.executor]
        return [*self.server().vllm_arguments(), *parallel, *self.vllm_flags]

    def scaling(self) -> dict[str, Any]:
        """Ray Serve's options of the replicas' number."""
        if self.max_replicas is None:
            return {"num_replicas": self.replicas}
        return {
            "autoscaling_config": {
                "min_replicas": self.replicas,
                "max_replicas": self.max_replicas,
                "target_ongoing_requests": self.target_ongoing_requests or self.max_batch_size,
                "upscale_delay_s": self.upscale_delay,
                "downscale_delay_s": self.downscale_delay,
            }
        }

    def placement(self, *, has_gpus: bool) -> dict[str, Any]:
        """Ray Serve's options of what each replica takes of the cluster."""
        gpus = self.gpus if self.gpus is not None else float(self.tensor_parallel_size * has_gpus)
        actor = {"num_cpus": self.cpus, "resources": dict(self.resources)}
        if self.executor == "ray" and self.tensor_parallel_size > 1:
            # The workers are actors of their own, one GPU each, in the replica's placement group.
            workers = [{"GPU": 1.0}] * self.tensor_parallel_size
            return {
                "ray_actor_options": actor,
                "placement_group_bundles": [{"CPU": self.cpus, **self.resources}, *workers],
                "placement_group_strategy": "PACK",
            }
        return {"ray_actor_options": {**actor, "num_gpus": gpus}}


def _check_number(name: str, value: object) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not is_number or not math.isfinite(value) or value < 0:  # type: ignore[arg-type, operator]
        raise ConfigError(name, f"{name} must be a number of at least 0; got {value!r}.")
