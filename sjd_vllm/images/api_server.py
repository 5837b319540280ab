"""POST /v1/images/generations on vLLM's own server: an endpoint plugin over the running engine."""

from __future__ import annotations

import asyncio
import re
import uuid
from argparse import Namespace
from collections.abc import Coroutine
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from sjd_vllm.config import SJDConfig
from sjd_vllm.images.api_answer import CompletedEvent, ErrorAnswer, ImagesAnswer, PartialImageEvent
from sjd_vllm.images.api_limits import LIMITS_KEY, ServerLimits, deadline_after, in_time
from sjd_vllm.images.api_metrics import CLIENT_GONE, RequestRecord, show_engine_counters
from sjd_vllm.images.api_options import ImageOptions
from sjd_vllm.images.api_protocol import MAX_BODY_BYTES, ApiError, ImagesRequest, json_schema
from sjd_vllm.images.api_service import ImagesService
from sjd_vllm.images.api_stream import PictureEvents, PictureStream
from sjd_vllm.images.pixel_device import place_pixels
from sjd_vllm.images.playground import PAGE_ROUTE, playground_page
from sjd_vllm.models.registry import load_family

ROUTE = "/v1/images/generations"
OPTIONS_ROUTE = "/v1/images/options"
_RETRY_AFTER_SCHEMA = {"description": "Seconds, by the pace of late.", "schema": {"type": "integer", "minimum": 1}}
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
_T = TypeVar("_T")


class ImagesEndpoint:
    """What vLLM loads for the entry point `sjd_vllm` of the group `vllm.endpoint_plugins`."""

    name = "sjd_vllm"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes with their schemas."""
        events = {"anyOf": [json_schema(PartialImageEvent), json_schema(CompletedEvent), json_schema(ErrorAnswer)]}
        app.add_api_route(
            ROUTE,
            _generate,
            methods=["POST"],
            summary="Create pictures from a prompt",
            description="OpenAI's images API; with `stream` the answer is server-sent events.",
            tags=["images"],
            response_model=None,
            openapi_extra={
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": json_schema(ImagesRequest)}},
                }
            },
            responses={
                200: {"model": ImagesAnswer, "content": {"text/event-stream": {"schema": events}}},
                **{status: {"model": ErrorAnswer} for status in (400, 404, 408, 413, 415, 500, 503, 504)},
                429: {"model": ErrorAnswer, "headers": {"retry-after": _RETRY_AFTER_SCHEMA}},
            },
        )

        app.add_api_route(
            OPTIONS_ROUTE,
            _options,
            methods=["GET"],
            summary="What the served model can make, and the settings' defaults and limits",
            tags=["images"],
            response_model=None,
            responses={200: {"model": ImageOptions}, 400: {"model": ErrorAnswer}},
        )
        app.add_route(PAGE_ROUTE, playground_page)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Bind the route to the engine; a model that makes no pictures is served all the same, without this route."""
        state.sjd_images = None
        if engine_client is None:
            return
        vllm_config = engine_client.vllm_config
        family = load_family(vllm_config.model_config.model)
        engine_settings = (vllm_config.additional_config or {}).get("sjd")
        if engine_settings is not None:
            show_engine_counters(vllm_config.instance_id)
        if family is None or engine_settings is None:
            return
        names = args.served_model_name or [args.model]
        limits = ServerLimits.from_mapping(vllm_config.additional_config.get(LIMITS_KEY) or {})
        config = SJDConfig.from_mapping(engine_settings)
        await asyncio.to_thread(place_pixels, family, config.pixel_device)
        state.sjd_images = ImagesService(engine_client, family, config, names, limits)
        await state.sjd_images.load_tokenizer()


async def _generate(raw_request: Request) -> Response:
    request_id = _request_id(raw_request)
    headers = {"x-request-id": request_id}
    record = RequestRecord(request_id)
    try:
        service = _service(raw_request)
        deadline = deadline_after(service.limits.request_timeout)
        request = ImagesRequest.parse(await _body(raw_request, service.limits.client_timeout))
        pictures = await _while_connected(raw_request, service.plan(request), deadline)
        record.begin(len(pictures), str(pictures[0].size), is_stream=bool(request.stream))
        if request.stream:
            stream = PictureStream(service, request, pictures[0], request_id, deadline, record)
            return await _streamed(raw_request, stream, headers, deadline)
        place = service.queue.enter(len(pictures))
        try:
            answer = await _while_connected(raw_request, service.answer(request, pictures, request_id), deadline)
            place.leave(is_answered=True)
        finally:
            place.leave()
        record.end(200)
        return JSONResponse(answer.model_dump(), headers=headers)
    except ClientGoneError:
        record.end(CLIENT_GONE)
        return Response(status_code=CLIENT_GONE)
    except Exception as error:
        refusal = record.fail(error)
        return JSONResponse(refusal.body(), status_code=refusal.status, headers={**headers, **refusal.headers})


async def _options(raw_request: Request) -> Response:
    try:
        return JSONResponse(_service(raw_request).options().model_dump())
    except ApiError as refusal:
        return JSONResponse(refusal.body(), status_code=refusal.status)


def _request_id(raw_request: Request) -> str:
    """The client's or the proxy's x-request-id where that is a plain word, else one of ours."""
    given = raw_request.headers.get("x-request-id", "")
    return given if _REQUEST_ID.fullmatch(given) else f"img-{uuid.uuid4().hex}"


def _service(raw_request: Request) -> ImagesService:
    service: ImagesService | None = raw_request.app.state.sjd_images
    if service is None:
        raise ApiError(
            400,
            "this server makes no pictures: it needs a model of an image family that sjd-vllm knows, and "
            "--speculative-model=[sjd].",
        )
    return service


class ClientGoneError(Exception):
    """The client closed its connection before the answer."""


async def _streamed(raw_request: Request, stream: PictureStream, headers: dict[str, str], deadline: float) -> Response:
    """The events, once the engine has taken the request: until then a refusal can still have its own status."""
    try:
        await _while_connected(raw_request, stream.wait_for_first_tokens(), deadline)
    except BaseException:
        stream.cancel()
        raise
    return PictureEvents(stream, headers)


async def _while_connected(raw_request: Request, work: Coroutine[Any, Any, _T], deadline: float) -> _T:
    """The result of some work, which is cancelled at the deadline or when the client goes away.

    The body must have been read. Raises ClientGoneError and ApiError (504).
    """
    task, gone = asyncio.create_task(work), asyncio.create_task(_disconnected(raw_request))
    try:
        await in_time(asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED), deadline)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(raw_request: Request) -> None:
    while (await raw_request.receive())["type"] != "http.disconnect":
        pass


async def _body(raw_request: Request, seconds: float) -> bytes:
    """The request's body, of which no more is read than is allowed, and no longer.

    Raises ApiError if it is not said to be JSON (415), too large (413) or too slow (408).
    """
    kind = raw_request.headers.get("content-type", "").split(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"the content type must be application/json; got {kind!r}.")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in raw_request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise ApiError(413, f"the body is larger than {MAX_BODY_BYTES} bytes.")
    except TimeoutError as error:
        raise ApiError(408, f"the body did not come within {seconds:g} s.") from error
    except ClientDisconnect as error:
        raise ClientGoneError from error
    return bytes(body)
