"""The training pictures on disk: rendered in chunks by all cores, so that a killed run goes on where it stopped."""

from multiprocessing import get_context
from pathlib import Path

import numpy as np
from tqdm import tqdm

from sjd_vllm.demo.captions import random_scene
from sjd_vllm.demo.landscapes import IMAGE_SIZE, render

CHUNK_SIZE = 1000


def render_pool(folder: Path, num_images: int, seed: int, num_workers: int) -> None:
    """Fill `folder` with chunks of pictures and labels; chunks that are there already are kept."""
    folder.mkdir(parents=True, exist_ok=True)
    jobs = [
        (folder / f"chunk-{index:04d}.npz", [seed, index], min(CHUNK_SIZE, num_images - start))
        for index, start in enumerate(range(0, num_images, CHUNK_SIZE))
    ]
    missing = [job for job in jobs if not job[0].exists()]
    with get_context("spawn").Pool(num_workers) as workers:
        done = workers.imap_unordered(_render_chunk, missing)
        for _ in tqdm(done, "data", len(jobs), initial=len(jobs) - len(missing), unit="chunk"):
            pass


def load_pool(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """All pictures, uint8 [N, 3, 96, 96], and their labels, int64 [N, 7], in the order of the chunks."""
    chunks = [np.load(path) for path in sorted(folder.glob("chunk-????.npz"))]
    return np.concatenate([chunk["images"] for chunk in chunks]), np.concatenate([chunk["labels"] for chunk in chunks])


class IndexStream:
    """Shuffled batches of indices, the same for the same seed also when a run starts in the middle.

    Each pass over the items has a permutation of its own, which depends on the seed and the pass alone.
    """

    def __init__(self, num_items: int, batch_size: int, seed: int) -> None:
        if num_items < batch_size:
            raise ValueError(f"a batch of {batch_size} needs at least as many items, but there are {num_items}")
        self.num_items, self.batch_size, self.seed = num_items, batch_size, seed
        self._current_pass, self._permutation = -1, np.empty(0, np.int64)

    def at(self, step: int) -> np.ndarray:
        """Indices of the batch of this step: int64 [batch_size]."""
        this_pass, position = divmod(step, self.num_items // self.batch_size)
        if this_pass != self._current_pass:
            self._permutation = np.random.default_rng([self.seed, this_pass]).permutation(self.num_items)
            self._current_pass = this_pass
        return self._permutation[position * self.batch_size : (position + 1) * self.batch_size]


def _render_chunk(job: tuple[Path, list[int], int]) -> None:
    path, seed, size = job
    rng = np.random.default_rng(seed)
    scenes = [random_scene(rng) for _ in range(size)]
    images = np.empty((size, 3, IMAGE_SIZE, IMAGE_SIZE), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = render(scene, rng)
    # The final name appears only when the file is complete.
    unfinished = path.with_suffix(".tmp.npz")
    np.savez(unfinished, images=images, labels=np.array([scene.labels() for scene in scenes]))
    unfinished.rename(path)
