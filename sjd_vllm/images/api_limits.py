"""What the images API takes on at a time and for how long: a bounded queue, a deadline, a patience with clients.

The queue counts pictures that this process has accepted and not answered, before anything of them reaches the engine:
a request is taken whole or refused whole.
"""

from __future__ import annotations

import asyncio
import dataclasses
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from sjd_vllm.config import ConfigError, check_int, nearest_name
from sjd_vllm.images.api_protocol import MAX_PICTURES, ApiError

LIMITS_KEY = "sjd_server"  # in vLLM's additional_config
_MAX_SECONDS = 86_400
_MAX_RETRY_AFTER = 60  # seconds; a client that waits longer than this would find the server idle
_PACE_WEIGHT = 0.1  # of the newest answer in the running mean
_T = TypeVar("_T")


def _seconds(default: float, help_text: str) -> Any:
    return dataclasses.field(default=default, metadata={"type": float, "help": help_text})


@dataclass(frozen=True)
class ServerLimits:
    """Limits of one API server process. Raises ConfigError for a bad value."""

    max_pending_pictures: int = dataclasses.field(
        default=256, metadata={"type": int, "help": "pictures accepted and not answered; more are refused with 429"}
    )
    request_timeout: float = _seconds(600, "seconds from a request's arrival to its answer, else 504")
    client_timeout: float = _seconds(15, "seconds that a client may take to send its body or to take an event")

    def __post_init__(self) -> None:
        check_int("max_pending_pictures", self.max_pending_pictures, MAX_PICTURES, 1_000_000)
        for name in ("request_timeout", "client_timeout"):
            value = getattr(self, name)
            is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
            if not is_number or not 0 < value <= _MAX_SECONDS:
                raise ConfigError(name, f"{name} must be seconds above 0 and at most {_MAX_SECONDS}; got {value!r}.")

    @classmethod
    def from_mapping(cls, given: Mapping[str, Any]) -> ServerLimits:
        """Build from JSON-like settings. Raises ConfigError for an unknown key or a bad value."""
        known = [field.name for field in dataclasses.fields(cls)]
        for key in given:
            if key not in known:
                raise ConfigError(key, f"unknown setting {key!r} of {LIMITS_KEY}.{nearest_name(key, known)}")
        return cls(**given)


class PictureQueue:
    """How many pictures are pending, and how long one takes at the pace of late.

    Args:
        max_pending: pictures.
        clock: seconds.
    """

    def __init__(self, max_pending: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._max_pending = max_pending
        self._clock = clock
        self._busy_since = 0.0  # the last answer, or when the first picture came after an idle time
        self._seconds_per_picture = 1.0  # until it is measured
        self.num_pending = 0

    def enter(self, num_pictures: int) -> Place:
        """Room for the pictures of a request. Raises ApiError (429) that says when there may be some."""
        excess = self.num_pending + num_pictures - self._max_pending
        if excess > 0:
            seconds = min(max(math.ceil(excess * self._seconds_per_picture), 1), _MAX_RETRY_AFTER)
            raise ApiError(
                429,
                f"the server is busy: {self.num_pending} pictures are pending and {self._max_pending} may be; "
                f"try again in {seconds} s.",
                code="server_busy",
                headers={"retry-after": str(seconds)},
            )
        if self.num_pending == 0:
            self._busy_since = self._clock()
        self.num_pending += num_pictures
        return Place(self, num_pictures)

    def _leave(self, num_pictures: int, is_answered: bool) -> None:
        self.num_pending -= num_pictures
        if is_answered:
            now = self._clock()
            took = (now - self._busy_since) / num_pictures
            self._seconds_per_picture += _PACE_WEIGHT * (took - self._seconds_per_picture)
            self._busy_since = now


class Place:
    """The room that a request takes in the queue; must be left, once or more often."""

    def __init__(self, queue: PictureQueue, num_pictures: int) -> None:
        self._queue = queue
        self._num_pictures = num_pictures

    def leave(self, *, is_answered: bool = False) -> None:
        """Give the room back; only the first call counts."""
        if self._num_pictures:
            self._queue._leave(self._num_pictures, is_answered)
            self._num_pictures = 0


def deadline_after(seconds: float) -> float:
    """A time of the running event loop's clock."""
    return asyncio.get_running_loop().time() + seconds


def deadline_error() -> ApiError:
    """What a request is told that took too long."""
    return ApiError(504, "the pictures were not finished within the server's time limit.", code="deadline_exceeded")


async def in_time(work: Awaitable[_T], deadline: float) -> _T:
    """The result of some work, which is cancelled at the deadline. Raises ApiError (504)."""
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError as error:
        raise deadline_error() from error
