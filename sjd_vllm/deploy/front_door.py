"""The front door: takes HTTP requests, hands each to the least loaded replica, and knows what to do when that one dies.

It looks into no request: vLLM's application in the replica answers all of them. A request goes to one replica whole, so
the halves of a guidance pair, and the pictures of one request, are always in one engine.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, ReplicaUnavailableError
from ray.serve.handle import DeploymentHandle
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from sjd_vllm.deploy.replica import REPLICA_HEADER, SECONDS_HEADER
from sjd_vllm.deploy.scrape import merged_metrics, texts_by_replica
from sjd_vllm.deploy.settings import DeploySettings
from sjd_vllm.images.api_limits import deadline_error
from sjd_vllm.images.api_metrics import CLIENT_GONE
from sjd_vllm.images.api_protocol import ApiError

MAX_BODY_BYTES = 64 << 20  # of any route; the images route has a bound of its own
_SCRAPE_SECONDS = 10
_SCOPE_KEYS = ("type", "http_version", "method", "scheme", "path", "raw_path", "query_string", "root_path", "headers")
_LOST = (RayActorError, ReplicaUnavailableError)
_LOGGER = logging.getLogger("ray.serve")  # Ray Serve puts its request and replica ids on these lines

_PREFIX = "sjd_vllm:front_door_"


class FrontDoor:
    """What Ray Serve runs behind its HTTP proxy.

    Args:
        settings: of the application.
        replicas: the deployment of `PictureReplica`.
    """

    def __init__(self, settings: DeploySettings, replicas: DeploymentHandle) -> None:
        self._replicas = replicas
        self._limits = settings.server().limits
        self._id = serve.get_replica_context().replica_id.unique_id
        self._registry = CollectorRegistry()
        self._requests = Counter(_PREFIX + "requests", "Requests by HTTP status.", ["status"], registry=self._registry)
        self._retries = Counter(
            _PREFIX + "retries", "Requests sent again because their replica was lost.", registry=self._registry
        )
        self._lost = Counter(
            _PREFIX + "lost", "Requests that ended with an error because their replica was.", registry=self._registry
        )
        self._overhead = Histogram(
            _PREFIX + "overhead_seconds",
            "From a request's arrival to the start of its answer, without the replica's part.",
            buckets=(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 1, 5, 30),
            registry=self._registry,
        )

    async def __call__(self, request: Request) -> Response:
        """Answer one HTTP request."""
        if request.scope["path"].removeprefix(request.scope.get("root_path", "")) == "/metrics":
            return await self._metrics()
        visit = Visit(self, request)
        try:
            return await visit.answer()
        except ApiError as error:
            visit.end(error.status)
            return JSONResponse(error.body(), status_code=error.status, headers=dict(error.headers))
        except asyncio.CancelledError:
            visit.end(CLIENT_GONE)
            raise

    async def own_metrics(self) -> tuple[str, str]:
        """This front door's id and its metrics."""
        return self._id, generate_latest(self._registry).decode()

    async def _metrics(self) -> Response:
        context = serve.get_replica_context()
        doors = serve.get_deployment_handle(context.deployment, context.app_name)
        answers = await asyncio.gather(
            *(
                handle.broadcast(method).results_async(timeout_s=_SCRAPE_SECONDS, return_exceptions=True)
                for handle, method in ((self._replicas, "scrape"), (doors, "own_metrics"))
            )
        )
        texts = texts_by_replica(answer for group in answers for answer in group)
        return Response(merged_metrics(texts), media_type="text/plain; version=0.0.4; charset=utf-8")


class Visit:
    """One request from its arrival to its end, with a second try on another replica where nothing was sent yet."""

    def __init__(self, door: FrontDoor, request: Request) -> None:
        self._door = door
        self._request = request
        self._started = time.perf_counter()
        self._has_ended = False
        self._num_retries = 0
        self._replica = "none"

    async def answer(self) -> Response:
        """The replica's answer. Raises ApiError."""
        limits = self._door._limits
        body = await self._body(limits.client_timeout)
        scope = {key: self._request.scope[key] for key in _SCOPE_KEYS if key in self._request.scope}
        try:
            async with asyncio.timeout(limits.request_timeout):
                return await self._first_answer(scope, body)
        except TimeoutError as error:
            raise deadline_error() from error

    def end(self, status: int) -> None:
        """The last word on the request; later calls are ignored."""
        if self._has_ended:
            return
        self._has_ended = True
        self._door._requests.labels(status=str(status)).inc()
        seconds = time.perf_counter() - self._started
        request, retried = self._request, ", tried again" if self._num_retries else ""
        text = "%s %s: status %d by replica %s%s after %.3f s"
        _LOGGER.info(text, request.method, request.url.path, status, self._replica, retried, seconds)

    async def _body(self, seconds: float) -> bytes:
        body = bytearray()
        try:
            async with asyncio.timeout(seconds):
                async for chunk in self._request.stream():
                    body += chunk
                    if len(body) > MAX_BODY_BYTES:
                        raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes.")
        except TimeoutError as error:
            raise ApiError(408, f"the body did not come within {seconds:g} s.") from error
        return bytes(body)

    async def _first_answer(self, scope: dict[str, Any], body: bytes) -> Response:
        try:
            return await self._try(scope, body)
        except _LOST as error:
            _LOGGER.warning("%s: a replica was lost (%s); trying another one", self._request.url.path, _said(error))
        self._num_retries = 1
        self._door._retries.inc()
        try:
            return await self._try(scope, body)
        except _LOST as error:
            self._door._lost.inc()
            raise lost_error() from error

    async def _try(self, scope: dict[str, Any], body: bytes) -> Response:
        """The answer of one replica: whole, unless it is a stream of events. Raises ApiError and what is in `_LOST`."""
        messages = self._door._replicas.options(stream=True).request.remote(scope, body)
        try:
            start = await anext(messages)
        except BackPressureError as error:
            raise ApiError(
                429, "all replicas are busy; try again later.", code="server_busy", headers={"retry-after": "5"}
            ) from error
        except DeploymentUnavailableError as error:
            raise ApiError(503, "no replica could be started; the log says why.", code="not_started") from error
        headers = {name.decode().lower(): value.decode() for name, value in start["headers"]}
        self._replica = headers[REPLICA_HEADER]
        self._door._overhead.observe(time.perf_counter() - self._started - float(headers[SECONDS_HEADER]))
        if headers.get("content-type", "").startswith("text/event-stream"):
            return Relayed(self, start, messages)
        rest = [message async for message in messages]
        return Relayed(self, start, _each(rest))

    async def events(self, messages: AsyncIterator[Message]) -> AsyncIterator[Message]:
        """A stream's messages; if its replica is lost before the last of them, its last event is an error."""
        is_whole = False
        try:
            async for message in messages:
                is_whole = message["type"] == "http.response.body" and not message.get("more_body", False)
                yield message
        except _LOST:
            # A replica whose engine has died says so to the client and ends right after that. One message more than
            # the answer has would make the proxy close the connection on the client's next request.
            if is_whole:
                return
            self._door._lost.inc()
            event = f"event: error\ndata: {json.dumps({'type': 'error', **lost_error().body()})}\n\n"
            yield {"type": "http.response.body", "body": event.encode(), "more_body": False}


class Relayed(Response):
    """A replica's answer, message by message."""

    def __init__(self, visit: Visit, start: Message, messages: AsyncIterator[Message]) -> None:
        super().__init__(status_code=start["status"])
        # Ray Serve's proxy tells the client the request's id, which it has given to the replica too.
        kept = [(name, value) for name, value in start["headers"] if name.lower() != b"x-request-id"]
        start = {**start, "headers": kept}
        self._visit = visit
        self._start = start
        self._messages = messages

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await send(self._start)
            async for message in self._visit.events(self._messages):
                await send(message)
            self._visit.end(self.status_code)
        finally:
            self._visit.end(CLIENT_GONE)


def lost_error() -> ApiError:
    """What a client is told whose picture died with its replica; the same seed makes it again."""
    return ApiError(503, "the replica that worked on this request was lost; send it again.", code="replica_lost")


def _said(error: BaseException) -> str:
    return type(error).__name__


async def _each(messages: list[Message]) -> AsyncIterator[Message]:
    for message in messages:
        yield message
