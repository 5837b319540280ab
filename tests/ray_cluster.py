"""Real Ray nodes as processes of this machine, and Serve applications on them."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml

from live_server import free_port

BIN = Path(sys.executable).parent
ROOT = Path(__file__).parent.parent
_START_SECONDS = 240
# For the nodes and for the process that connects to them: a token of this run's own, as Ray 2.60 asks for one, and more
# patience than Ray has by itself, for busy machines. Ray would start its workers, so Serve's controller, proxies and
# replicas, 15 nicer than itself, and on a busy machine nothing is left for them then.
VARIABLES = {
    "RAY_worker_niceness": "0",
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_gcs_rpc_server_connect_timeout_s": "60",
    "RAY_gcs_server_request_timeout_seconds": "120",
    "RAY_raylet_start_wait_time_s": "180",
    "RAY_agent_register_timeout_ms": "180000",
}


@contextmanager
def ray_node(flags: Sequence[str], environment: Mapping[str, str], log: Path) -> Iterator[None]:
    """`ray start --block` with some flags until the end; its processes, and all that they started, end with it."""
    # Ports that Ray would take by number, and another cluster on this machine may have.
    fixed = ("--dashboard-agent-listen-port", "--dashboard-agent-grpc-port", "--metrics-export-port")
    ports = [part for flag in fixed for part in (flag, str(free_port()))]
    command = [str(BIN / "ray"), "start", "--block", "--disable-usage-stats", *ports, *flags]
    for tries_left in (3, 2, 1, 0):
        # Its own group, so that Ctrl-C is not for it, but not its own session: Linux shares the cores out among
        # sessions (sched_autogroup_enabled), and while a busy node had one, `serve run` in this one got 1 % of a core.
        with log.open("w") as out:
            process = subprocess.Popen(
                command, stdout=out, stderr=subprocess.STDOUT, env=dict(environment), process_group=0
            )
        try:
            # On a busy machine a raylet may end itself, as it gives its agents 15 s to start, and `ray start` waits on.
            if _has_started(process, log) or not tries_left:
                assert "Ray runtime started" in log.read_text(), log.read_text()[-2000:]
                yield
                return
        finally:
            below = descendants(process.pid)
            process.terminate()
            try:
                process.wait(10)  # Ray would try to move what runs here to other nodes
            except subprocess.TimeoutExpired:
                process.kill()
            for pid in filter(is_alive, below):
                kill(pid)


def _has_started(process: subprocess.Popen[bytes], log: Path) -> bool:
    """Wait until a node has started, or never will."""
    until = time.monotonic() + _START_SECONDS
    has_raylet = False
    while time.monotonic() < until and process.poll() is None:
        if "Ray runtime started" in log.read_text():
            return True
        raylet = titled(descendants(process.pid), "--raylet_socket_name")
        if has_raylet and not raylet:
            return False
        has_raylet = bool(raylet)
        time.sleep(0.2)
    return False


@dataclass(frozen=True)
class Head:
    """A running cluster: its address, and the folder of its logs."""

    address: str
    folder: Path

    def logs(self) -> str:
        """What all processes have written."""
        return "".join(path.read_text(errors="replace") for path in self.folder.glob("session_2*/logs/worker-*.*"))


@contextmanager
def ray_head(num_cpus: int, environment: Mapping[str, str]) -> Iterator[Head]:
    """A cluster of one node that has two GPUs by its own account."""
    port = free_port()
    folder = Path(tempfile.mkdtemp(prefix="sjd"))  # short: the paths of Ray's sockets lie below it
    flags = ["--head", "--port", str(port), "--num-cpus", str(num_cpus), "--num-gpus", "2"]
    flags += [
        "--ray-client-server-port",
        str(free_port()),
        "--include-dashboard",
        "false",
        "--object-store-memory",
        "100000000",
        "--temp-dir",
        str(folder),
    ]
    try:
        with ray_node(flags, environment, folder / "head.log"):
            yield Head(f"127.0.0.1:{port}", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def node_environment(*paths: Path, **variables: str) -> dict[str, str]:
    """Variables of a Ray node's processes: this checkout's package, with some folders before it on Python's path."""
    path = os.pathsep.join(map(str, [*paths, ROOT, ROOT / "kernels"]))
    unset = ("VLLM_ENABLE_V1_MULTIPROCESSING", "VLLM_LOGGING_LEVEL", "VLLM_LOGGING_STREAM", "OMP_NUM_THREADS")
    inherited = {name: value for name, value in os.environ.items() if name not in unset}
    return {**inherited, "PYTHONPATH": path, "RAY_USAGE_STATS_ENABLED": "0", **VARIABLES, **variables}


def connect(address: str) -> None:
    """Make this process a client of a cluster; `ray.shutdown` ends it. A busy machine may take several tries."""
    import ray
    from ray._raylet import Config

    os.environ.update(VARIABLES)
    Config.initialize("")  # Ray has read its variables when vLLM imported it

    for tries_left in (4, 3, 2, 1, 0):
        try:
            ray.init(address=address, log_to_driver=False)
            return
        except (ConnectionError, RuntimeError):
            if not tries_left:
                raise
            time.sleep(5)


def serve_run(
    address: str,
    port: int,
    args: Mapping[str, object],
    folder: Path,
    environment: Mapping[str, str],
    *,
    replicas: Mapping[str, object] | None = None,
) -> None:
    """Hand the application to the cluster, by `serve run` and a YAML file; does not wait until it is up.

    args: of `sjd_vllm.deploy.ray_serve:build`.
    replicas: Ray Serve's own options of the replicas' deployment, which override what `args` make of it, as an operator
        would give them in the file of an application that runs.
    """
    app: dict[str, object] = {
        "name": "images",
        "route_prefix": "/",
        "import_path": "sjd_vllm.deploy.ray_serve:build",
        "args": dict(args),
    }
    if replicas is not None:
        app["deployments"] = [{"name": "replicas", **replicas}]
    path = folder / "images.yaml"
    path.write_text(yaml.safe_dump({"http_options": {"host": "127.0.0.1", "port": port}, "applications": [app]}))
    command = [str(BIN / "serve"), "run", "--non-blocking", "-a", address, str(path)]
    log = folder / "serve-run.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=dict(environment))
    try:
        process.wait(_START_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
    assert process.wait() == 0, log.read_text()[-3000:]


def stop_serve() -> None:
    """Stop all applications and Ray Serve, and wait until they have; this process is connected.

    Serve's own shutdown returns early where its controller is slow to answer or still drains, and whoever starts Serve
    then finds the one that is about to go.
    """
    from ray import serve
    from ray.exceptions import RayActorError

    until = time.monotonic() + _START_SECONDS
    while True:
        serve.shutdown()
        try:
            if not serve.status().proxies:
                return
        except RayActorError:
            return
        assert time.monotonic() < until, "Ray Serve did not stop"
        time.sleep(0.5)


def replica_processes() -> list[int]:
    """The processes of the application's replicas on the clusters that this process has started."""
    return titled(descendants(os.getpid()), "ServeReplica:images:replicas")


def descendants(pid: int) -> list[int]:
    """The processes below a process."""
    found = [pid]
    for parent in found:
        for children in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                found += [int(child) for child in children.read_text().split()]
            except OSError:
                continue
    return found[1:]


def titled(pids: Sequence[int], title: str) -> list[int]:
    """Those of the processes whose command line holds a text."""
    found = []
    for pid in pids:
        try:
            if title in Path(f"/proc/{pid}/cmdline").read_text():
                found.append(pid)
        except OSError:
            continue
    return found


def kill(pid: int) -> None:
    """As the kernel does when memory is short."""
    os.kill(pid, signal.SIGKILL)


def is_alive(pid: int) -> bool:
    """Whether the process runs still."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False
