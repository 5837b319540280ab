"""One picture as server-sent events: partial pictures from its finished rows, then the whole."""

from __future__ import annotations

import asyncio
import json
import logging
from bisect import bisect_right
from collections.abc import AsyncIterator
from typing import Any

from fastapi.responses import StreamingResponse
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from sjd_vllm.images.api_answer import DecodedPicture, PartialFigures, completed_event, partial_event, picture_answer
from sjd_vllm.images.api_limits import in_time
from sjd_vllm.images.api_metrics import CLIENT_GONE, PARTIALS, RequestRecord
from sjd_vllm.images.api_protocol import ImagesRequest
from sjd_vllm.images.api_service import ImagesService
from sjd_vllm.images.request import PictureRequest

_LOGGER = logging.getLogger(__name__)


class PictureStream:
    """A picture that is decoded in a task of its own, so that making partial pictures never holds up its tokens.

    Must be built inside an event loop, and cancelled at the end, whatever happened. Raises ApiError (429) when the
    queue has no room for it.

    Args:
        deadline: when it must be finished, by the event loop's clock.
        record: of the request, which ends with the stream.
    """

    def __init__(
        self,
        service: ImagesService,
        request: ImagesRequest,
        picture: PictureRequest,
        request_id: str,
        deadline: float,
        record: RequestRecord,
    ) -> None:
        self._service = service
        self.record = record
        self._request = request
        self._picture = picture
        self._request_id = request_id
        self._row_ends = service.row_ends(picture)
        self._deadline = deadline
        self.client_timeout = service.limits.client_timeout
        self._states: asyncio.Queue[DecodedPicture | Exception] = asyncio.Queue()
        self._has_begun = asyncio.Event()
        self._error: Exception | None = None
        self._place = service.queue.enter(1)
        self._task = asyncio.create_task(self._decode())

    async def wait_for_first_tokens(self) -> None:
        """Return once the engine has taken the request; raises what it was refused with."""
        await self._has_begun.wait()
        if self._error is not None:
            raise self._error

    def cancel(self) -> None:
        """Free the picture in the engine and its place in the queue, if it is there still."""
        self._task.cancel()
        self._place.leave()

    async def events(self) -> AsyncIterator[str]:
        """The events as text; the last one is the whole picture or an error."""
        num_partials = 0
        try:
            while True:
                state = await in_time(self._next_state(), self._deadline)
                if isinstance(state, Exception):
                    raise state
                work = self._service.encode(self._picture, state.token_ids, self._request)
                file = await in_time(work, self._deadline)
                if len(state.token_ids) == self._picture.num_tokens:
                    answer = picture_answer(self._picture, state, file)
                    self._place.leave(is_answered=True)
                    completed = completed_event(self._request, self._picture, answer)
                    self.record.end(200)
                    yield _event(completed.type, completed.model_dump())
                    return
                num_tokens = len(state.token_ids)
                figures = PartialFigures(num_tokens=num_tokens, num_rows=bisect_right(self._row_ends, num_tokens))
                partial = partial_event(self._request, self._picture, num_partials, figures, file)
                yield _event(partial.type, partial.model_dump())
                PARTIALS.inc()
                num_partials += 1
        except Exception as error:
            yield _event("error", {"type": "error", **self.record.fail(error).body()})

    async def _next_state(self) -> DecodedPicture | Exception:
        """What is to be sent next; of rows the newest, so that pixels slower than tokens hold nothing up."""
        state = await self._states.get()
        while self._request.wants_rows and not self._states.empty():
            state = self._states.get_nowait()
        return state

    async def _decode(self) -> None:
        due = self._due_token_counts()
        try:
            async for state in self._service.decode(self._picture, self._request_id):
                self._has_begun.set()
                num_tokens = len(state.token_ids)
                is_whole = num_tokens == self._picture.num_tokens
                is_due = bool(due) and num_tokens >= due[0]
                # Tokens may come in bunches; a partial picture that the same bunch overtakes is left out.
                due = [count for count in due if count > num_tokens]
                if is_due or is_whole:
                    self._states.put_nowait(state)
        except Exception as error:
            self._error = error
            self._states.put_nowait(error)
            self._has_begun.set()

    def _due_token_counts(self) -> list[int]:
        """After how many tokens a partial picture is due."""
        num_given = len(self._picture.given_token_ids)
        if self._request.wants_rows:
            return [count for count in self._row_ends[:-1] if count > num_given]
        num_partials = self._request.partial_images or 0
        return [num_given + count for count in partial_token_counts(self._picture.num_new_tokens, num_partials)]


class PictureEvents(StreamingResponse):
    """The answer that sends a stream's events, and frees the picture when it ends or the client is gone or too slow."""

    def __init__(self, stream: PictureStream, headers: dict[str, str]) -> None:
        super().__init__(stream.events(), media_type="text/event-stream", headers=headers)
        self._stream = stream

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_in_time(message: Message) -> None:
            async with asyncio.timeout(self._stream.client_timeout):
                await send(message)

        try:
            await super().__call__(scope, receive, send_in_time)
        except* (TimeoutError, ClientDisconnect):
            _LOGGER.info("a client took no event for %g s; its stream is closed", self._stream.client_timeout)
        finally:
            self._stream.cancel()
            self._stream.record.end(CLIENT_GONE)  # unless it has had its end


def partial_token_counts(num_tokens: int, num_partials: int) -> list[int]:
    """After how many tokens a partial picture is due: evenly spread over the picture."""
    return [num_tokens * (index + 1) // (num_partials + 1) for index in range(num_partials)]


def _event(name: str, data: dict[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps(data)}\n\n"
