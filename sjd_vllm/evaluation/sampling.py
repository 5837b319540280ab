"""Makes the pictures of a run: all methods in turns on the same prompts and seeds."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sjd_vllm.evaluation.methods import Method
from sjd_vllm.evaluation.run_folder import Record, RunFolder
from sjd_vllm.images.picture import Picture
from sjd_vllm.images.pipeline import ImagePipeline
from sjd_vllm.images.request import ImageRequest, PictureRequest

# Pictures of a turn, in multiples of the batch size: long enough that the batch is full most of the time, short enough
# that all methods see the same machine.
_TURN = 2

# Called with how many pictures are done and how many there will be.
OnPictures = Callable[[int, int], None]


@dataclass(frozen=True)
class _Job:
    """One picture to make."""

    method: Method
    prompt_index: int
    image_index: int
    request: PictureRequest


def planned_pictures(
    run: RunFolder, pipeline: ImagePipeline, request_settings: dict[str, Any]
) -> dict[str, list[tuple[int, int, PictureRequest]]]:
    """Prompt index, picture index and request of every picture of every method, by its label.

    request_settings: fields of ImageRequest that all methods share. Picture i of prompt p has seed
    first_seed + p * images_per_prompt + i. Raises ConfigError for a prompt or setting that the model cannot take.
    """
    per_prompt, first_seed = run.settings["images_per_prompt"], run.settings["first_seed"]
    shared = {name: value for name, value in request_settings.items() if name != "first_guess"}
    first_guess = request_settings.get("first_guess")
    planned = {}
    for method in run.methods:
        requests = [
            ImageRequest(
                prompt.text,
                n=per_prompt,
                seed=first_seed + index * per_prompt,
                **{**shared, **method.settings(first_guess)},
            )
            for index, prompt in run.prompts.items()
        ]
        places = itertools.product(run.prompts, range(per_prompt))
        pictures = pipeline.plan(requests)
        planned[method.label] = [(*place, picture) for place, picture in zip(places, pictures, strict=True)]
    return planned


def make_pictures(
    run: RunFolder,
    pipeline: ImagePipeline,
    planned: dict[str, list[tuple[int, int, PictureRequest]]],
    *,
    batch_size: int,
    on_pictures: OnPictures | None = None,
) -> None:
    """Decode what has no record yet, and write pictures and records turn by turn.

    Args:
        run: where to.
        pipeline: its batch must hold `batch_size`.
        planned: from `planned_pictures`.
        batch_size: pictures in the engine at once; 1 measures the latency of a picture alone.
        on_pictures: told about the progress, once before the first turn.
    """
    done = {(record.method, *record.key) for record in run.records()}
    num_all = sum(map(len, planned.values()))
    num_done = len(done)
    if on_pictures is not None:
        on_pictures(num_done, num_all)
    is_warm: set[str] = set()
    for turn, jobs in enumerate(_turns(run.methods, planned, _TURN * batch_size)):
        # Every method goes first as often as the others.
        for method in run.methods[turn % len(run.methods) :] + run.methods[: turn % len(run.methods)]:
            todo = [job for job in jobs[method.label] if (method.label, job.prompt_index, job.image_index) not in done]
            if not todo:
                continue
            if method.label not in is_warm:  # the first forwards of a method are slow
                pipeline.decode([todo[0].request], batch_size=1)
                is_warm.add(method.label)
            result = pipeline.decode([job.request for job in todo], batch_size=batch_size)
            run.append([_kept(run, job, picture) for job, picture in zip(todo, result.pictures, strict=True)])
            num_done += len(todo)
            if on_pictures is not None:
                on_pictures(num_done, num_all)


def _turns(
    methods: list[Method], planned: dict[str, list[tuple[int, int, PictureRequest]]], size: int
) -> list[dict[str, list[_Job]]]:
    """The jobs of each turn by method; a turn is the same pictures for all methods."""
    num_pictures = len(planned[methods[0].label])
    return [
        {
            method.label: [_Job(method, *entry) for entry in planned[method.label][start : start + size]]
            for method in methods
        }
        for start in range(0, num_pictures, size)
    ]


def _kept(run: RunFolder, job: _Job, picture: Picture) -> Record:
    path = run.picture_path(job.method.label, job.prompt_index, job.image_index)
    picture.save(path, method=job.method.label)
    return Record(
        method=job.method.label,
        prompt_index=job.prompt_index,
        image_index=job.image_index,
        seed=picture.request.seed,
        token_ids=picture.token_ids,
        tokens_per_step=picture.tokens_per_step,
        seconds=picture.seconds,
        path=str(path.relative_to(run.path)),
    )
