"""ImagePipeline: prompts in, pictures out."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from PIL import Image

from sjd_vllm.config import ConfigError, SJDConfig, check_int
from sjd_vllm.images.engine import DecodedPicture, PictureEngine
from sjd_vllm.images.environment import prepare_environment
from sjd_vllm.images.picture import GenerationResult, Picture
from sjd_vllm.images.pixel_decoder import DecodedPixels, PixelDecoder
from sjd_vllm.images.pixel_device import place_pixels
from sjd_vllm.images.request import ImageRequest, PictureRequest
from sjd_vllm.models.family import ImageFamily
from sjd_vllm.models.registry import load_family

# Called with the rows of image tokens that are complete and the rows there will be, over all pictures.
Progress = Callable[[int, int], None]


class ImagePipeline:
    """Text to pictures by speculative Jacobi decoding on vLLM.

    Args:
        model: folder of a checkpoint of a known image family; None is the shipped demo model.
        num_speculative_tokens: draft tokens in the window, 0 to 128; a request may ask for fewer.
        redraft: how drafts are refreshed, one of `sjd_vllm.config.REDRAFT_NAMES`.
        first_guess: how new drafts are made, one of `sjd_vllm.config.FIRST_GUESS_NAMES`.
        reuse_threshold: of the redrafts `reuse` and `reuse_biased`.
        pixel_device: where pixels are computed, as in `sjd_vllm.config.SJDConfig`; the CPU until the engine is started.
        max_batch_size: pictures decoded at once.
        engine_args: anything else that `vllm.EngineArgs` takes, for example dtype or tensor_parallel_size.

    Raises:
        ConfigError: for an unknown model or a bad setting, before vLLM is imported.

    The engine is started by `start`, or else by the first `generate`. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        model: str | Path | None = None,
        *,
        num_speculative_tokens: int | None = None,
        redraft: str | None = None,
        first_guess: str | None = None,
        reuse_threshold: float | None = None,
        pixel_device: str | None = None,
        max_batch_size: int = 8,
        **engine_args: Any,
    ) -> None:
        check_int("max_batch_size", max_batch_size, 1, 1024)
        given = {
            "num_speculative_tokens": num_speculative_tokens,
            "redraft": redraft,
            "first_guess": first_guess,
            "reuse_threshold": reuse_threshold,
            "pixel_device": pixel_device,
        }
        self.config = SJDConfig.from_mapping({name: value for name, value in given.items() if value is not None})
        self.model = _checkpoint(model)
        self.family = _family(self.model)
        self.max_model_len = _max_model_len(self.family, engine_args.pop("max_model_len", None))
        self.max_batch_size = max_batch_size
        self._engine_args = engine_args
        self._engine: PictureEngine | None = None
        self._pixel_decoder = PixelDecoder(self.family)

    def start(self) -> None:
        """Start the engine unless it runs already; takes some seconds. Raises ConfigError for a bad `pixel_device`."""
        if self._engine is None:
            self._engine = PictureEngine(
                self.family, self.config, self.max_batch_size, self.max_model_len, self._engine_args
            )
            place_pixels(self.family, self.config.pixel_device)

    def close(self) -> None:
        """Stop the engine; the next `generate` would start it again."""
        if self._engine is not None:
            self._engine.close()
            self._engine = None

    def __enter__(self) -> ImagePipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        n: int = 1,
        seed: int | Sequence[int] | None = None,
        guidance_scale: float | None = None,
        negative_prompt: str | None = None,
        size: str | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        method: str = "sjd",
        num_speculative_tokens: int | None = None,
        redraft: str | None = None,
        first_guess: str | None = None,
        init_image: bytes | None = None,
        keep_rows: int | None = None,
        progress: Progress | None = None,
    ) -> GenerationResult:
        """Make n pictures of each prompt.

        Args:
            prompt: one prompt or several.
            seed: of each prompt's first picture, the next ones count on; one for all prompts or one a prompt. With
                the same seed and settings a prompt gives the same picture, whatever else is decoded beside it.
            progress: called after each step with rows finished and rows in all.

        The other arguments are the fields of `ImageRequest`. Raises ConfigError for a bad one, before any decoding.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * len(prompts)
        if len(seeds) != len(prompts):
            raise ConfigError("seed", f"give one seed or one a prompt; got {len(seeds)} for {len(prompts)} prompts.")
        requests = [
            ImageRequest(
                prompt=one_prompt,
                n=n,
                seed=one_seed,
                guidance_scale=guidance_scale,
                negative_prompt=negative_prompt,
                size=size,
                temperature=temperature,
                top_k=top_k,
                top_p=top_p,
                method=method,
                num_speculative_tokens=num_speculative_tokens,
                redraft=redraft,
                first_guess=first_guess,
                init_image=init_image,
                keep_rows=keep_rows,
            )
            for one_prompt, one_seed in zip(prompts, seeds, strict=True)
        ]
        return self.decode(self.plan(requests), progress=progress)

    def plan(self, requests: Sequence[ImageRequest]) -> list[PictureRequest]:
        """The single pictures of some requests; raises ConfigError where one cannot be made. Needs no engine."""
        pictures = [picture for request in requests for picture in request.pictures(self.family, self.max_model_len)]
        for picture in pictures:
            picture.sjd.check_engine(self.config)
        return pictures

    def decode(
        self,
        requests: Sequence[PictureRequest],
        *,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> GenerationResult:
        """Decode planned pictures, at most `batch_size` (by default the pipeline's) of them at a time."""
        self.start()
        assert self._engine is not None
        started = time.perf_counter()
        counter = _RowCounter(self.family, requests, progress)
        pixels: dict[int, Future[DecodedPixels]] = {}

        def begin_pixels(index: int, done: DecodedPicture) -> None:
            request = requests[index]
            if len(done.token_ids) != request.num_tokens:
                raise RuntimeError(
                    f"the engine ended a picture after {len(done.token_ids)} of {request.num_tokens} tokens"
                )
            pixels[index] = self._pixel_decoder.decode(done.token_ids, request.size)

        decoded = self._engine.decode(
            requests, batch_size=batch_size, on_tokens=counter.update, on_finished=begin_pixels
        )
        seconds = time.perf_counter() - started
        images = [Image.fromarray(pixels[index].result().pixels) for index in range(len(requests))]
        pictures = [
            Picture(request, image, done.token_ids, done.tokens_per_step, done.seconds)
            for request, image, done in zip(requests, images, decoded, strict=True)
        ]
        return GenerationResult(pictures, seconds)


class _RowCounter:
    """Turns tokens of single pictures into rows over all of them."""

    def __init__(self, family: ImageFamily, requests: Sequence[PictureRequest], progress: Progress | None) -> None:
        grammars = [family.grammar(request.size) for request in requests]
        self._strides = [grammar.row_stride for grammar in grammars]
        self._num_rows = [grammar.grid[0] for grammar in grammars]
        self._rows = [0] * len(requests)
        self._progress = progress

    def update(self, index: int, num_tokens: int) -> None:
        self._rows[index] = min(num_tokens // self._strides[index], self._num_rows[index])
        if self._progress is not None:
            self._progress(sum(self._rows), sum(self._num_rows))


def _checkpoint(model: str | Path | None) -> Path:
    if model is None:
        from sjd_vllm.demo import checkpoint_path

        return Path(checkpoint_path())
    path = Path(model).expanduser()
    if not path.is_dir():
        raise ConfigError("model", f"model must be the folder of a checkpoint; {str(model)!r} is not a folder.")
    return path


def _family(model: Path) -> ImageFamily:
    prepare_environment()
    try:
        family = load_family(model)
        problems = family.problems() if family is not None else []
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ConfigError("model", f"the checkpoint in {model} cannot be read: {error}") from error
    if family is None:
        found = "is not of" if (model / "config.json").is_file() else "has no config.json and no other sign of"
        raise ConfigError("model", f"the checkpoint in {model} {found} an image family that sjd-vllm knows.")
    if problems:
        more = f" (and {len(problems) - 1} more; sjd-vllm check lists them)" if len(problems) > 1 else ""
        raise ConfigError("model", f"the checkpoint in {model} cannot be used: {problems[0]}{more}.")
    return family


def _max_model_len(family: ImageFamily, asked: int | None) -> int:
    if asked is None:
        return family.shape.max_positions
    check_int("max_model_len", asked, 1, family.shape.max_positions)
    return asked
