"""A replica: one vLLM engine with vLLM's own server application, whose requests come through Ray instead of a port."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack
from typing import Any

import ray
from ray import serve

from sjd_vllm.build import node_name, require_build
from sjd_vllm.deploy.settings import DeploySettings

REPLICA_HEADER = "x-sjd-replica"
SECONDS_HEADER = "x-sjd-replica-seconds"  # from the request's arrival at the replica to the start of its answer
_SECONDS_TO_LEAVE = 5  # that vLLM's application gets to end a request whose client has gone
_WATCH_SECONDS = 0.1

_LOGGER = logging.getLogger("vllm.sjd_vllm")


class PictureReplica:
    """What Ray Serve runs in each replica.

    Args:
        settings: of the application.
        build: of the node that started the application; a node with another one refuses to serve.
    """

    async def __init__(self, settings: DeploySettings, build: Mapping[str, str]) -> None:
        require_build(build, settings.checkpoint())
        arguments = settings.vllm_arguments()
        self._id = serve.get_replica_context().replica_id.unique_id
        from sjd_vllm.engine.openai_app import openai_app

        # The engine is a process of its own. Where its workers are actors, it connects to the cluster, which it might
        # not find by itself, and would then start another one.
        os.environ["RAY_ADDRESS"] = ray.get_runtime_context().gcs_address
        self._stack = AsyncExitStack()
        self._app, self._engine = await self._stack.enter_async_context(openai_app(arguments))
        _label_logs(f"replica {self._id}: ")
        self._watch = asyncio.create_task(self._end_with_engine())
        _LOGGER.info("serves on node %s", node_name())

    async def request(self, scope: dict[str, Any], body: bytes) -> AsyncIterator[dict[str, Any]]:
        """The ASGI messages of the answer to one HTTP request.

        Closing the iterator, or cancelling the call, is the client's leaving.
        """
        started = time.perf_counter()
        messages: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        has_left = asyncio.Event()
        has_started = False
        unread = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if unread:
                return unread.pop()
            await has_left.wait()
            return {"type": "http.disconnect"}

        async def send(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                seconds = f"{time.perf_counter() - started:.6f}"
                own = ((REPLICA_HEADER, self._id), (SECONDS_HEADER, seconds))
                headers = [*message.get("headers", ()), *((k.encode(), v.encode()) for k, v in own)]
                message = {**message, "headers": headers}
            messages.put_nowait(dict(message))

        task = asyncio.create_task(self._app(scope, receive, send))
        task.add_done_callback(lambda _: messages.put_nowait(None))
        try:
            while (message := await messages.get()) is not None:
                if message["type"] == "http.response.start" and message["status"] >= 500 and self._engine.errored:
                    # This process is about to end; the front door will then ask another replica.
                    await asyncio.Event().wait()
                has_started = True
                yield message
            if error := task.exception():
                if not has_started:
                    raise error
                # What a web framework raises again for its server's log, after it has answered 500.
                _LOGGER.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
        finally:
            has_left.set()
            await asyncio.wait([task], timeout=_SECONDS_TO_LEAVE)
            task.cancel()

    async def scrape(self) -> tuple[str, str]:
        """This replica's id and its metrics, in Prometheus' text format."""
        scope = {"type": "http", "http_version": "1.1", "method": "GET", "scheme": "http", "path": "/metrics"}
        scope |= {"raw_path": b"/metrics", "query_string": b"", "headers": [], "root_path": ""}
        text = b"".join([message.get("body", b"") async for message in self.request(scope, b"")])
        return self._id, text.decode()

    async def describe(self) -> dict[str, Any]:
        """Where this replica runs."""
        return {"replica": self._id, "pid": os.getpid(), "node": node_name()}

    async def check_health(self) -> None:
        """Raises vLLM's error if the engine has died; Ray Serve then replaces the replica."""
        await self._engine.check_health()

    async def __del__(self) -> None:
        # Ray Serve calls this once, after the replica has been drained.
        if hasattr(self, "_watch"):
            self._watch.cancel()
            await self._stack.aclose()

    async def _end_with_engine(self) -> None:
        """End this process as soon as its engine has died, as vLLM's own server does.

        It would otherwise answer faster than any other replica, with errors, and be sent most of the requests.
        """
        while not self._engine.errored:
            await asyncio.sleep(_WATCH_SECONDS)
        _LOGGER.error("the engine has died; the replica ends, to be started anew")
        os._exit(1)


def _label_logs(label: str) -> None:
    """Put the label before each of vLLM's log lines in this process; ours are among them."""

    def add_label(record: logging.LogRecord) -> bool:
        if not getattr(record, "is_labelled", False):
            record.msg, record.is_labelled = f"{label}{record.msg}", True
        return True

    for handler in logging.getLogger("vllm").handlers:
        handler.addFilter(add_label)
