"""The queue's bound and pace, and the limits' settings; no engine."""

from __future__ import annotations

import pytest

from sjd_vllm.config import ConfigError
from sjd_vllm.images.api_limits import PictureQueue, ServerLimits
from sjd_vllm.images.api_protocol import ApiError


class Clock:
    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_a_request_is_taken_whole_or_not_at_all() -> None:
    queue = PictureQueue(10)
    place = queue.enter(7)
    with pytest.raises(ApiError) as refused:
        queue.enter(4)
    assert refused.value.status == 429
    assert refused.value.body()["error"]["type"] == "rate_limit_error"
    assert queue.num_pending == 7
    queue.enter(3)
    for _ in range(2):
        place.leave()
        assert queue.num_pending == 3
    queue.enter(7)


def retry_after(queue: PictureQueue, num_pictures: int) -> int:
    with pytest.raises(ApiError) as refused:
        queue.enter(num_pictures)
    return int(refused.value.headers["retry-after"])


def test_retry_after_follows_the_measured_pace() -> None:
    clock = Clock()
    queue = PictureQueue(10, clock)
    for _ in range(100):
        place = queue.enter(2)
        clock.seconds += 6  # 3 seconds a picture
        place.leave(is_answered=True)
        clock.seconds += 1000  # idle: says nothing about the pace
    place = queue.enter(10)
    assert retry_after(queue, 1) == 3
    assert retry_after(queue, 4) == 12
    place.leave()  # not answered: says nothing about the pace either
    queue.enter(10)
    assert retry_after(queue, 4) == 12


def test_retry_after_is_at_least_a_second_and_at_most_a_minute() -> None:
    clock = Clock()
    fast, slow = PictureQueue(10, clock), PictureQueue(10, clock)
    for _ in range(100):
        place = fast.enter(1)
        clock.seconds += 0.01
        place.leave(is_answered=True)
    place = slow.enter(1)
    clock.seconds += 10_000
    place.leave(is_answered=True)
    for queue, seconds in ((fast, 1), (slow, 60)):
        queue.enter(10)
        assert retry_after(queue, 1) == seconds


@pytest.mark.parametrize(
    "given",
    [
        {"max_pending_pictures": 9},
        {"max_pending_pictures": True},
        {"request_timeout": 0},
        {"request_timeout": float("nan")},
        {"client_timeout": "10"},
        {"client_timout": 10},
    ],
)
def test_a_bad_limit_is_named(given: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as refused:
        ServerLimits.from_mapping(given)
    assert refused.value.param in given
