"""Pictures from a running engine, as the images API needs them: planned, decoded, and turned into files."""

from __future__ import annotations

import asyncio
import base64
import io
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any

import numpy as np
from PIL import Image

from sjd_vllm.config import ConfigError, SJDConfig
from sjd_vllm.images.api_answer import (
    DecodedPicture,
    ImagesAnswer,
    PictureAnswer,
    PictureFile,
    images_answer,
    picture_answer,
)
from sjd_vllm.images.api_limits import PictureQueue, ServerLimits
from sjd_vllm.images.api_metrics import DECODE_SECONDS, PENDING, PICTURE_STEPS, PIXEL_SECONDS, TOKENS_PER_STEP
from sjd_vllm.images.api_options import ImageOptions, image_options
from sjd_vllm.images.api_protocol import ApiError, ImagesRequest, setting_error
from sjd_vllm.images.pixel_decoder import PixelDecoder
from sjd_vllm.images.request import PictureRequest
from sjd_vllm.models.family import ImageFamily, Pixels

_GREY = 40  # 0..255, of the rows that a partial picture does not have yet


class ImagesService:
    """Pictures from a running engine.

    Args:
        engine: vLLM's EngineClient.
        family: of the served checkpoint.
        config: the engine's window and strategies.
        model_names: what `model` may be in a request.
        limits: of this server.

    Attributes:
        limits: the same.
        queue: the pictures that are pending.
    """

    def __init__(
        self,
        engine: Any,
        family: ImageFamily,
        config: SJDConfig,
        model_names: Sequence[str],
        limits: ServerLimits,
    ) -> None:
        self._engine = engine
        self._family = family
        self._config = config
        self._model_names = tuple(model_names)
        self.limits = limits
        self.queue = PictureQueue(limits.max_pending_pictures)
        PENDING.set_function(lambda: self.queue.num_pending)
        self._pixels = PixelDecoder(family)

    async def load_tokenizer(self) -> None:
        """Read the prompt's tokenizer, which the first request would otherwise hold up the event loop for."""
        await asyncio.to_thread(self._family.negative_prompt_token_ids, None, self._family.sizes[0])

    def options(self) -> ImageOptions:
        """What a request may ask for."""
        return image_options(self._model_names[0], self._family, self._config)

    async def plan(self, request: ImagesRequest) -> list[PictureRequest]:
        """The single pictures of a request, planned in another thread. Raises ApiError for what cannot be made."""
        return await asyncio.to_thread(self._plan, request)

    def _plan(self, request: ImagesRequest) -> list[PictureRequest]:
        if request.model is not None and request.model not in self._model_names:
            names = ", ".join(map(repr, self._model_names))
            raise ApiError(
                404,
                f"the model {request.model!r} is not served here; {names} is.",
                param="model",
                code="model_not_found",
            )
        max_model_len: int = self._engine.vllm_config.model_config.max_model_len
        try:
            pictures = request.image_request().pictures(self._family, max_model_len)
            pictures[0].sjd.check_engine(self._config)
        except ConfigError as error:
            raise setting_error(str(error), error.param) from error
        return pictures

    def row_ends(self, picture: PictureRequest) -> list[int]:
        """After how many tokens each row of the picture is finished."""
        return self._family.grammar(picture.size).row_ends

    async def decode(self, picture: PictureRequest, request_id: str) -> AsyncIterator[DecodedPicture]:
        """The tokens so far, each time that there are new ones, and at last the whole picture with its forwards.

        Closing the iterator, or cancelling whoever waits for it, frees both halves in the engine.
        Raises ApiError if the engine ends the picture early, and vLLM's own errors.
        """
        started = time.perf_counter()
        token_ids = list(picture.given_token_ids)
        tokens = self._engine.generate(picture.engine_prompt, picture.sampling_params(), request_id)
        async with aclosing(tokens) as outputs:
            async for output in self._while_alive(outputs):
                completion = output.outputs[0]
                token_ids.extend(completion.token_ids)
                metrics = completion.spec_decode_metrics if output.finished else None
                # A forward gives one more than the drafts it accepted.
                tokens_per_step = [accepted + 1 for accepted in metrics.per_step_accepted] if metrics else []
                if output.finished and completion.finish_reason == "abort":
                    raise ApiError(503, "the server is shutting down.", code="shutting_down")
                if output.finished and len(token_ids) != picture.num_tokens:
                    raise ApiError(500, f"the engine ended this picture early ({completion.finish_reason}).")
                seconds = time.perf_counter() - started
                if output.finished:
                    PICTURE_STEPS.observe(len(tokens_per_step))
                    TOKENS_PER_STEP.observe(picture.num_new_tokens / max(len(tokens_per_step), 1))
                    DECODE_SECONDS.observe(seconds)
                yield DecodedPicture(list(token_ids), tokens_per_step, seconds)

    async def _while_alive(self, outputs: AsyncIterator[Any]) -> AsyncIterator[Any]:
        """The engine's outputs. Raises ApiError (503) if it dies."""
        try:
            async for output in outputs:
                yield output
        except Exception as error:
            if not self._engine.errored:
                raise
            raise ApiError(503, "the engine has ended, and this server ends with it.", code="engine_dead") from error

    async def encode(self, picture: PictureRequest, token_ids: list[int], request: ImagesRequest) -> PictureFile:
        """The picture file of some tokens, made in another thread; rows that are missing are grey."""
        decoded = await asyncio.wrap_future(self._pixels.decode(token_ids, picture.size))
        file, seconds = await asyncio.to_thread(_file, decoded.pixels, picture, request)
        PIXEL_SECONDS.observe(decoded.seconds + seconds)
        return PictureFile(file, decoded.seconds + seconds)

    async def answer(self, request: ImagesRequest, pictures: list[PictureRequest], request_id: str) -> ImagesAnswer:
        """All pictures of a request; if one fails, the others are given up too."""
        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(self._finished(request, picture, f"{request_id}-{index}"))
                for index, picture in enumerate(pictures)
            ]
        return images_answer(request, pictures, [task.result() for task in tasks])

    async def _finished(self, request: ImagesRequest, picture: PictureRequest, request_id: str) -> PictureAnswer:
        async for decoded in self.decode(picture, request_id):
            whole = decoded
        return picture_answer(picture, whole, await self.encode(picture, whole.token_ids, request))


def _file(pixels: Pixels, picture: PictureRequest, request: ImagesRequest) -> tuple[str, float]:
    """Base64 of the picture file, grey below the given rows of pixels, and the seconds it took."""
    started = time.perf_counter()
    canvas = np.full((picture.size.height, picture.size.width, 3), _GREY, dtype=np.uint8)
    canvas[: len(pixels)] = pixels
    options: dict[str, Any] = {}
    if request.file_format != "png":
        options["quality"] = 100 if request.output_compression is None else request.output_compression
    buffer = io.BytesIO()
    Image.fromarray(canvas).save(buffer, format=request.file_format.upper(), **options)
    return base64.b64encode(buffer.getvalue()).decode(), time.perf_counter() - started
