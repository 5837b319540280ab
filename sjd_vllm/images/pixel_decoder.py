"""Tokens to pixels beside the engine: in a thread of its own, and all pictures that wait together."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np

from sjd_vllm.models.family import ImageFamily, ImageSize, Pixels

_MAX_BATCH = 16  # pictures decoded together, which bounds the memory


@dataclass(frozen=True)
class DecodedPixels:
    """uint8 [height of the finished rows, width, 3], and the seconds that decoding its batch took."""

    pixels: Pixels
    seconds: float


@dataclass(eq=False)
class _Waiting:
    token_ids: list[int]
    size: ImageSize
    num_rows: int
    future: Future[DecodedPixels] = field(default_factory=Future)


class PixelDecoder:
    """The family's pixel decoder in one thread: it uses as many cores as it may by itself.

    Neither the engine's next step nor an event loop waits for it. What has come in the meantime and has as many rows
    is decoded as one batch; a picture that fails fails alone.
    """

    def __init__(self, family: ImageFamily) -> None:
        self._family = family
        self._waiting: deque[_Waiting] = deque()
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sjd-pixels")

    def decode(self, token_ids: Sequence[int], size: ImageSize) -> Future[DecodedPixels]:
        """The pixels of a picture's finished rows. Raises ValueError for a token that the grammar forbids."""
        ids = list(token_ids)
        item = _Waiting(ids, size, len(self._family.grammar(size).codes(ids)))
        with self._lock:
            self._waiting.append(item)
        self._thread.submit(self._decode_next)
        return item.future

    def close(self) -> None:
        """Wait for what is under way and let the thread end."""
        self._thread.shutdown()

    def _decode_next(self) -> None:
        batch = [item for item in self._take_batch() if item.future.set_running_or_notify_cancel()]
        if not batch:
            return
        try:
            self._decode_batch(batch)
        except Exception:
            for item in batch:
                try:
                    self._decode_batch([item])
                except Exception as error:
                    item.future.set_exception(error)

    def _take_batch(self) -> list[_Waiting]:
        """The picture that waits longest, and those like it; none if an earlier call took them already."""
        with self._lock:
            if not self._waiting:
                return []
            first = self._waiting[0]
            alike = [item for item in self._waiting if (item.size, item.num_rows) == (first.size, first.num_rows)]
            taken = alike[:_MAX_BATCH]
            for item in taken:
                self._waiting.remove(item)
            return taken

    def _decode_batch(self, batch: list[_Waiting]) -> None:
        started = time.perf_counter()
        size = batch[0].size
        if batch[0].num_rows:
            decoded = self._family.decode_pixels([item.token_ids for item in batch], size)
        else:
            decoded = np.zeros((len(batch), 0, size.width, 3), np.uint8)
        seconds = time.perf_counter() - started
        for item, pixels in zip(batch, decoded, strict=True):
            item.future.set_result(DecodedPixels(pixels, seconds))
