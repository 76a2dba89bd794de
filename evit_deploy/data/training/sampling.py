"""Reproducible order and augmentation of training images, for any number of workers and processes.

Step k of a run draws the same images with the same augmentation for one process or several, with or without an
interruption before it, because order and augmentation depend only on the seed and the position in the run.
"""

import random
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from evit_deploy.errors import InputError, StageError

AHEAD = 8
"""Number of batches that worker processes prepare ahead of time; also the curriculum's delay."""

Batch = tuple[Tensor, Tensor]


class Draw(NamedTuple):
    """One image to load or generate.

    Args:
        number: Index of the image in the data set.
        place: Seed, step and row in the step; together they seed the random numbers of its augmentation.
        level: Difficulty level, 0 to 1.
    """

    number: int
    place: tuple[int, ...]
    level: float


class Batches:
    """Endless sequence of a process's batches, each a list of :class:`Draw`.

    Every pass is shuffled again; images that do not fill a batch are dropped from the pass.

    Args:
        images: Number of images.
        batch_size: Images per step over all processes.
        seed: Seed of the order.
        rank: Index of this process, which draws rows ``rank``, ``rank + world``, ... of every step.
        world: Number of processes.
        start_step: First step, as if the steps before it had been drawn.
        repeats: Number of consecutive draws of each image; a pass contains fewer images by this factor.
        level_at: Returns the level of a step's images; by default, all are at level 1.

    Raises:
        InputError: A batch cannot be divided among the processes, or is larger than the data set.
    """

    def __init__(
        self,
        images: int,
        batch_size: int,
        seed: int,
        *,
        rank: int = 0,
        world: int = 1,
        start_step: int = 0,
        repeats: int = 1,
        level_at: Callable[[int], float] | None = None,
    ) -> None:
        share(batch_size, rank, world)
        self.steps_per_epoch = whole_batches(images, batch_size)
        self._images, self._batch_size, self._seed = images, batch_size, seed
        self._rank, self._world, self._step = rank, world, start_step
        self._repeats, self._level_at = repeats, level_at

    def __iter__(self) -> Iterator[list[Draw]]:
        epoch, order = -1, np.empty(0, np.int64)
        step = self._step
        while True:
            if epoch != step // self.steps_per_epoch:
                epoch = step // self.steps_per_epoch
                order = np.random.default_rng((self._seed, epoch)).permutation(self._images)
                order = order.repeat(self._repeats)
            start = step % self.steps_per_epoch * self._batch_size
            level = 1.0 if self._level_at is None else self._level_at(step)
            yield [
                Draw(int(order[start + row]), (self._seed, step, row), level)
                for row in range(self._rank, self._batch_size, self._world)
            ]
            step += 1


def share(batch_size: int, rank: int, world: int) -> slice:
    """Returns the rows of a step that a process draws.

    Raises:
        InputError: The rows cannot be divided evenly.
    """
    if not 0 <= rank < world:
        raise InputError("no such process", seen=f"rank {rank} of {world}")
    if batch_size % world:
        fix = "batch_size counts the images of a step over all processes."
        raise InputError("a batch cannot be divided", seen=f"{batch_size} images, {world} processes",
                         wanted=f"a multiple of {world}", fix=fix)  # fmt: skip
    return slice(rank, batch_size, world)


def whole_batches(images: int, batch_size: int) -> int:
    """Returns the number of full batches in one pass.

    Raises:
        InputError: There is not even one.
    """
    if images < batch_size:
        raise InputError(
            "a batch is larger than the training set", seen=batch_size, wanted=f"at most {images}",
            fix="Set a smaller batch_size; recipes/small.yaml has settings for a few hundred images.",
        )  # fmt: skip
    return images // batch_size


@contextmanager
def own_randomness(*place: int) -> Iterator[None]:
    """Context manager that seeds the generators of augmentations with ``place`` and restores their state afterwards."""
    words = np.random.SeedSequence(place).generate_state(3)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(int(words[0]))
    np.random.seed(words[1])
    torch.default_generator.manual_seed(int(words[2]))  # not torch.manual_seed, which also seeds the GPUs
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def loader(
    data: Any,
    batches: Batches | Sequence[Sequence[int]],
    workers: int,
    collate: Callable[[list[Any]], Any],
    ahead: int,
    pin: bool = False,
) -> Iterator[Any]:
    """Loads batches in worker processes or in this process.

    Args:
        data: Map-style data set, indexed by the entries of ``batches``.
        batches: The indices of each batch.
        workers: Number of worker processes; 0 loads in this process.
        collate: Builds a batch from a list of items.
        ahead: Maximum number of batches prepared in advance.
        pin: Whether to copy batches to pinned memory, from which a GPU copies asynchronously; with worker processes, a
            thread does this.

    Raises:
        StageError: A worker died.
    """
    workers = min(workers, ahead)
    made: DataLoader[Any] = DataLoader(
        data,
        batch_sampler=batches,  # type: ignore[arg-type]  # any iterable of lists
        num_workers=workers,
        collate_fn=collate,
        prefetch_factor=max(1, ahead // workers) if workers else None,
        worker_init_fn=_start_worker if workers else None,
        pin_memory=pin,
        generator=torch.Generator(),  # the global one is the model's
    )
    made_by = iter(made)
    try:
        yield from made_by
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _failed(str(error), getattr(made_by, "_workers", [])) from error


@contextmanager
def worker_deaths_told() -> Iterator[None]:
    """Context manager that converts PyTorch's error about a killed worker.

    PyTorch raises it from a signal handler, at any point of the main process, such as in a training step.

    Raises:
        StageError: A worker died.
    """
    try:
        yield
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise _failed(str(error), []) from error


def _start_worker(_: int) -> None:
    torch.set_num_threads(1)


def _failed(text: str, workers: Sequence[Any]) -> StageError:
    """Converts PyTorch's error about a worker; the message of an exception inside a worker is kept."""
    if "exited unexpectedly" not in text and "killed by signal" not in text:
        return StageError(f"a process that reads images failed: {text.strip().splitlines()[-1]}", where="data.workers")
    dead = [(number, worker) for number, worker in enumerate(workers) if worker.exitcode not in (None, 0)]
    if not dead:
        seen, code = text.strip().splitlines()[0].rstrip(". "), -signal.SIGBUS if "Bus" in text else -signal.SIGKILL
    else:
        number, worker = dead[0]
        code = worker.exitcode
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        seen = f"{how} in process {worker.pid}, number {number + 1} of {len(workers)}"
    hints = {
        -signal.SIGKILL: "The system kills processes when memory runs out: lower data.workers or the batch size. ",
        -signal.SIGBUS: "Shared memory ran out: enlarge /dev/shm or lower data.workers. ",
    }
    fix = hints.get(code, "") + "data.workers=0 reads in the main process and shows the cause."
    return StageError("a process that reads images died", where="data.workers", seen=seen, fix=fix)


def validation_rows(images: int, batch_size: int, rank: int, world: int) -> list[list[int]]:
    """Batches of image indices that a process evaluates; over all processes, every image occurs exactly once."""
    rows = list(range(rank, images, world))
    return [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]


def spaced(images: int, count: int) -> np.ndarray:
    """Evenly spaced indices of at most ``count`` images."""
    return np.unique(np.linspace(0, images - 1, min(count, images)).astype(int))


def stacked(items: list[tuple[Any, int]]) -> Batch:
    """Stacks the images and labels of a batch into tensors."""
    images, labels = zip(*items, strict=True)
    return torch.stack([torch.as_tensor(image) for image in images]), torch.tensor(labels, dtype=torch.int64)
