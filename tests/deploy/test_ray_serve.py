"""The application on a real Ray cluster: its routes, faults of its processes, and replicas that come and go."""

from __future__ import annotations

import base64
import itertools
import re
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families
from ray import serve

import sjd_vllm
from live_server import free_port
from ray_cluster import Head, connect, descendants, is_alive, kill, ray_node, serve_run, stop_serve, titled
from sjd_vllm.deploy.ray_serve import build
from sjd_vllm.deploy.settings import DeploySettings

ROUTE = "/v1/images/generations"
PROMPT = "a calm lake at sunset"
ARGS = {"replicas": 2, "max_replicas": 2, "max_batch_size": 4, "gpus": 0, "health_check_period": 1}
START_SECONDS = 900  # two engines take 45 s on two idle cores, and many times that on busy ones
pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def driver(head: Head) -> Iterator[None]:
    """This process as a client of the cluster, to ask for the state of applications."""
    connect(head.address)
    try:
        yield
    finally:
        ray.shutdown()


@pytest.fixture(scope="module")
def port() -> int:
    return free_port()


@pytest.fixture(scope="module")
def deploy(
    head: Head, driver: None, port: int, node_variables: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., None]:
    folder = tmp_path_factory.mktemp("serve")

    def run(least: int, most: int, target: float = 100) -> None:
        """Change how many replicas there may be, and for how many requests in each; that restarts nothing."""
        settings = DeploySettings(
            replicas=least, max_replicas=most, target_ongoing_requests=target, upscale_delay=1, downscale_delay=2
        )
        (scaling,) = settings.scaling().values()
        scaling["look_back_period_s"] = 5  # 30 by itself
        serve_run(head.address, port, ARGS, folder, node_variables, replicas={"autoscaling_config": scaling})

    return run


@pytest.fixture(scope="module")
def server(deploy: Callable[..., None], port: int, head: Head) -> Iterator[httpx.Client]:
    try:
        deploy(2, 2)
        wait_for(lambda: len(running_replicas()) == 2, head)
        with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=300) as client:
            wait_for(lambda: client.get("/health").status_code == 200, head)
            yield client
    finally:
        stop_serve()


@pytest.fixture(scope="module")
def client(server: httpx.Client) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.base_url}/v1", api_key="none", max_retries=0, timeout=300)


def wait_for(is_so: Callable[[], bool], head: Head, seconds: float = START_SECONDS) -> None:
    until = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < until, f"{serve.status()}\n{head.logs()[-3000:]}"
        time.sleep(0.5)


def running_replicas() -> set[str]:
    """What each replica says of itself; empty while one starts or stops."""
    status = serve.status().applications.get("images")
    if status is None or status.status != "RUNNING":
        return set()
    return {answer["replica"] for answer in described()}


def described() -> list[dict[str, Any]]:
    handle = serve.get_deployment_handle("replicas", "images")
    answers = handle.broadcast("describe").results(timeout_s=30, return_exceptions=True)
    return [answer for answer in answers if isinstance(answer, dict)]


class Load:
    """Users who ask for pictures one after another, every second time as a stream; what they were answered."""

    def __init__(self, server: httpx.Client) -> None:
        self._url = str(server.base_url)
        self._stop = threading.Event()
        self._seeds = itertools.count(1000)
        self.outcomes: Counter[str] = Counter()
        self.replicas: Counter[str] = Counter()

    def _user(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=300) as http:
            for turn in itertools.count(number):
                if self._stop.is_set():
                    return
                body = {"prompt": PROMPT, "seed": next(self._seeds), "stream": turn % 2 == 1}
                answer = http.post(ROUTE, json=body)
                outcome = str(answer.status_code)
                if body["stream"] and answer.status_code == 200:
                    outcome = answer.text.strip().split("event: ")[-1].split("\n")[0]
                    if outcome == "error":
                        outcome += re.search(r'"code": "(\w+)"', answer.text).group(1)  # type: ignore[union-attr]
                self.outcomes[outcome] += 1
                self.replicas[answer.headers.get("x-sjd-replica", "none")] += 1

    @contextmanager
    def running(self, num_users: int = 4) -> Iterator[Load]:
        with ThreadPoolExecutor(num_users) as threads:
            users = [threads.submit(self._user, number) for number in range(num_users)]
            try:
                yield self
            finally:
                self._stop.set()
            for user in users:
                user.result()

    @property
    def num_answered(self) -> int:
        return sum(self.outcomes.values())

    def assert_no_failure(self) -> None:
        assert set(self.outcomes) <= {"200", "image_generation.completed"}, self.outcomes


def samples(server: httpx.Client) -> dict[tuple[str, str], float]:
    """(name, replica) -> the sum over other labels."""
    found: Counter[tuple[str, str]] = Counter()
    for family in text_string_to_metric_families(server.get("/metrics").text):
        for sample in family.samples:
            found[sample.name, sample.labels["replica"]] += sample.value
    return dict(found)


def total(server: httpx.Client, name: str) -> float:
    return sum(value for (known, _), value in samples(server).items() if known == name)


def test_every_replica_gives_a_seeds_one_picture(client: openai.OpenAI) -> None:
    def make(_: int) -> tuple[str, str]:
        raw = client.images.with_raw_response.generate(prompt=PROMPT, extra_body={"seed": 7})
        picture = raw.parse().data[0]  # type: ignore[index, union-attr]
        return raw.headers["x-sjd-replica"], picture.b64_json or ""

    files: dict[str, str] = {}
    for _ in range(5):
        with ThreadPoolExecutor(6) as threads:
            files.update(threads.map(make, range(6)))
        if len(files) == 2:
            break
    assert len(files) == 2, "one replica got all of them"
    assert len(set(files.values())) == 1
    assert base64.b64decode(files.popitem()[1]).startswith(b"\x89PNG")


def test_guided_pictures_of_one_request_come_from_one_replica(server: httpx.Client) -> None:
    before = samples(server)
    answer = server.post(ROUTE, json={"prompt": PROMPT, "n": 3, "seed": 7, "guidance_scale": 3.0})
    assert [picture["seed"] for picture in answer.json()["data"]] == [7, 8, 9]
    added = {key: value - before.get(key, 0) for key, value in samples(server).items()}
    made = {replica: n for (name, replica), n in added.items() if name == "sjd_vllm:picture_steps_count" and n}
    assert made == {answer.headers["x-sjd-replica"]: 3}


def test_a_request_goes_to_the_replica_with_fewer(server: httpx.Client) -> None:
    with ThreadPoolExecutor(1) as threads:
        slow = {"prompt": PROMPT, "n": 8, "sjd": {"method": "none"}}
        long = threads.submit(server.post, ROUTE, json=slow)
        asked = []
        while len(asked) < 20 and not long.done():
            # The first one may come before the long request, or wait for its replica to tell how busy it is.
            asked.append(server.get("/health").headers["x-sjd-replica"])
        assert not long.done(), f"{len(asked)} short requests took longer than eight pictures"
        busy = long.result().headers["x-sjd-replica"]
    assert busy not in asked[5:]


def test_a_stream_of_partial_pictures(client: openai.OpenAI) -> None:
    began = time.monotonic()
    times, kinds = [], []
    for event in client.images.generate(
        prompt=PROMPT, stream=True, partial_images=2, extra_body={"seed": 7, "sjd": {"method": "none"}}
    ):
        times.append(time.monotonic() - began)
        kinds.append(event.type)
    assert kinds == [*["image_generation.partial_image"] * 2, "image_generation.completed"]
    assert times[0] < 0.8 * times[-1], "the events came all at once"


def test_the_playground_and_all_other_routes(server: httpx.Client, client: openai.OpenAI) -> None:
    page = server.get("/playground")
    assert page.status_code == 200
    assert "<!doctype html>" in page.text
    assert server.get("/v1/images/options").json()["model"] == "demo"
    assert [model.id for model in client.models.list()] == ["demo"]
    assert server.get("/health").status_code == 200
    text = server.post("/v1/completions", json={"model": "demo", "prompt": [1, 9], "max_tokens": 4})
    assert text.json()["usage"]["completion_tokens"] == 4


def test_errors_have_openais_shape(client: openai.OpenAI, server: httpx.Client) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.images.generate(prompt=PROMPT, n=99)
    assert refused.value.param == "n"
    with pytest.raises(openai.NotFoundError) as unknown:
        client.images.generate(prompt=PROMPT, model="another")
    assert unknown.value.code == "model_not_found"
    assert server.post(ROUTE, content=b"{", headers={"content-type": "application/json"}).status_code == 400


def test_a_client_that_leaves_frees_the_engine(server: httpx.Client, head: Head) -> None:
    def left() -> float:
        text = server.get("/metrics").text
        return sum(map(float, re.findall(r'^sjd_vllm:images_requests_total\{.*status="499"\} (.+)$', text, re.M)))

    before = left()
    slow = {"prompt": PROMPT, "sjd": {"method": "none"}}
    with server.stream("POST", ROUTE, json={**slow, "stream": True}) as answer:
        assert answer.status_code == 200
    with pytest.raises(httpx.ReadTimeout):
        answer = httpx.post(f"{server.base_url}{ROUTE}", json={**slow, "n": 10}, timeout=0.3)
        pytest.fail(f"answered with {answer.status_code}: {answer.text[:500]}")
    wait_for(lambda: left() == before + 2, head, 60)
    wait_for(lambda: total(server, "vllm:num_requests_running") == 0, head, 30)


def test_metrics_of_all_processes_in_one_scrape(server: httpx.Client) -> None:
    with ThreadPoolExecutor(6) as threads:
        list(threads.map(lambda seed: server.post(ROUTE, json={"prompt": PROMPT, "seed": seed}), range(6)))
    found = samples(server)
    replicas = {replica for (name, replica) in found if name == "sjd_vllm:steps_total"}
    assert len(replicas) == 2
    assert all(found["vllm:generation_tokens_total", replica] > 0 for replica in replicas)
    doors = {replica for (name, replica) in found if name == "sjd_vllm:front_door_requests_total"}
    assert len(doors) == 1
    assert not doors & replicas
    answered = total(server, "sjd_vllm:images_requests_total")
    server.post(ROUTE, json={"prompt": PROMPT})
    assert total(server, "sjd_vllm:images_requests_total") == answered + 1
    assert total(server, "sjd_vllm:front_door_lost_total") == 0


def test_log_lines_carry_replica_and_request(server: httpx.Client, head: Head) -> None:
    answer = server.post(ROUTE, json={"prompt": PROMPT}, headers={"x-request-id": "the-users-own.1"})
    assert answer.headers["x-request-id"] == "the-users-own.1"
    line = f"replica {answer.headers['x-sjd-replica']}: the-users-own.1: status 200"
    wait_for(lambda: line in head.logs(), head, 10)
    unnamed = server.post(ROUTE, json={"prompt": PROMPT})
    wait_for(lambda: f": {unnamed.headers['x-request-id']}: status 200" in head.logs(), head, 10)


def test_a_killed_replica_is_replaced_and_nothing_is_lost(server: httpx.Client, head: Head) -> None:
    """Answers in work are asked for again elsewhere, streams end with an error event, the others go on."""
    victim, other = sorted(described(), key=lambda answer: answer["replica"])
    children = descendants(victim["pid"])
    assert titled(children, "VLLM")
    with Load(server).running() as load:
        wait_for(lambda: min(load.replicas[r["replica"]] for r in (victim, other)) >= 1, head, 120)
        kill(victim["pid"])
        wait_for(lambda: not any(map(is_alive, children)), head, 30)
        before = load.num_answered
        wait_for(lambda: load.num_answered >= before + 8, head, 120)
    assert set(load.outcomes) <= {"200", "image_generation.completed", "errorreplica_lost"}, load.outcomes
    assert load.outcomes["errorreplica_lost"] == total(server, "sjd_vllm:front_door_lost_total")
    # 4 users, so at least 1 and at most 4 requests were in the dead replica
    touched = load.outcomes["errorreplica_lost"] + total(server, "sjd_vllm:front_door_retries_total")
    assert touched <= 4
    wait_for(lambda: len(running_replicas()) == 2, head)
    assert victim["replica"] not in running_replicas()


def test_scaling_down_drains(server: httpx.Client, head: Head, deploy: Callable[..., None]) -> None:
    before = running_replicas()
    with Load(server).running() as load:
        wait_for(lambda: len(load.replicas) == 2, head, 120)
        deploy(1, 1)
        wait_for(lambda: len(running_replicas()) == 1, head, 120)
        answered = load.num_answered
        wait_for(lambda: load.num_answered >= answered + 4, head, 120)
    load.assert_no_failure()
    assert running_replicas() < before, "the one that is left must not have been started anew"


def test_replicas_follow_the_load(server: httpx.Client, head: Head, deploy: Callable[..., None]) -> None:
    """From 1 to 3 and back by Ray Serve's autoscaling, and no request fails."""
    (first,) = running_replicas()
    deploy(1, 3, target=1.5)
    with Load(server).running(num_users=6) as load:
        wait_for(lambda: len(load.replicas) == 3, head)
    load.assert_no_failure()
    assert first in load.replicas, "it must not have been started anew"
    with Load(server).running(num_users=1) as rest:
        wait_for(lambda: len(running_replicas()) == 1, head)
        answered = rest.num_answered
        wait_for(lambda: rest.num_answered >= answered + 2, head, 120)
    rest.assert_no_failure()


# Ray puts the driver's path before a node's own, so what is installed on the other node comes in at Python's start.
CHANGED_NODE = """
import importlib.util, sys

class Changed:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "sjd_vllm":
            return importlib.util.spec_from_file_location(name, {init!r}, submodule_search_locations=[{folder!r}])

sys.meta_path.insert(0, Changed)
"""


def test_a_node_with_another_build_is_refused_by_name(
    driver: None, head: Head, node_variables: dict[str, str], tmp_path: Path
) -> None:
    """A second real node, on which a changed copy of the package is installed."""
    package = Path(sjd_vllm.__file__).parent
    copy = tmp_path / "changed" / "sjd_vllm"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("checkpoint", "__pycache__"))
    (copy / "demo" / "checkpoint").symlink_to(package / "demo" / "checkpoint")
    init = copy / "__init__.py"
    init.write_text(init.read_text().replace(f'"{sjd_vllm.__version__}"', '"0.0.7"'))
    (tmp_path / "sitecustomize.py").write_text(CHANGED_NODE.format(init=str(init), folder=str(copy)))
    variables = {**node_variables, "PYTHONPATH": f"{tmp_path}:{node_variables['PYTHONPATH']}"}
    flags = ["--address", head.address, "--num-cpus", "1", "--num-gpus", "0", "--resources", '{"changed": 1}']
    with ray_node(flags, variables, tmp_path / "node.log"):
        serve.start(http_options={"host": "127.0.0.1", "port": free_port()})  # unless it runs already
        application = build({**ARGS, "replicas": 1, "resources": {"changed": 1}})
        with pytest.raises(RuntimeError, match="failed"):
            serve.run(application, name="other", route_prefix="/other")
        (node,) = (n["NodeID"] for n in ray.nodes() if "changed" in n["Resources"])
        message = str(serve.status().applications["other"].deployments["replicas"].message)
        assert "another build" in message
        assert f"Ray node {node}" in message
        assert "sjd-vllm is '0.0.7'" in message
        serve.delete("other")
