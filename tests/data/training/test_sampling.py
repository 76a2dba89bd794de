"""Which image is drawn when: one process or several, resumed or not, and workers that die."""

import itertools
import multiprocessing
import os
import random
import signal
import time

import numpy as np
import pytest
import torch

from evit_deploy.data.training.sampling import Batches, loader, own_randomness, validation_rows, worker_deaths_told
from evit_deploy.errors import InputError, StageError


def drawn(count, *arguments, **options):
    return list(itertools.islice(Batches(*arguments, **options), count))


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("repeats", [1, 3])
def test_several_processes_draw_together_what_one_draws(world, repeats):
    alone = drawn(9, 50, 12, 7, repeats=repeats)
    shares = [drawn(9, 50, 12, 7, repeats=repeats, rank=rank, world=world) for rank in range(world)]
    for step, batch in enumerate(alone):
        assert [shares[row % world][step][row // world] for row in range(12)] == batch


def test_a_run_that_begins_later_draws_what_would_have_followed():
    whole = drawn(12, 50, 12, 7, repeats=3)
    for start in (1, 4, 9):
        assert drawn(12 - start, 50, 12, 7, repeats=3, start_step=start) == whole[start:]


def test_a_pass_shows_no_image_twice_and_the_next_another_order():
    batches = drawn(8, 50, 12, 7)
    passes = [[draw.number for batch in batches[i : i + 4] for draw in batch] for i in (0, 4)]
    assert all(len(set(numbers)) == 48 for numbers in passes)
    assert passes[0] != passes[1]
    assert [draw.number for draw in drawn(1, 50, 12, 8)[0]] != passes[0][:12]


def test_repeated_images_stand_together_with_random_numbers_of_their_own():
    (batch, *_), counts = drawn(4, 50, 12, 0, repeats=3), []
    numbers = [draw.number for draw in batch]
    assert numbers == [number for number in numbers[::3] for _ in range(3)]
    assert len({draw.place for draw in batch}) == 12
    for batch in drawn(4, 50, 12, 0, repeats=3):
        counts += [draw.number for draw in batch]
    assert len(set(counts)) == 16  # a pass is as long as ever


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        ({"batch_size": 51}, "larger than the training set"),
        ({"batch_size": 9, "world": 2}, "multiple of 2"),
        ({"batch_size": 8, "world": 2, "rank": 2}, "rank 2 of 2"),
    ],
)
def test_what_cannot_be_shared_out_is_refused(arguments, word):
    with pytest.raises(InputError, match=word):
        Batches(50, seed=0, **arguments)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_validation_shows_every_image_once_whatever_the_number_of_processes(world):
    rows = [validation_rows(10, 4, rank, world) for rank in range(world)]
    assert sorted(row for batches in rows for batch in batches for row in batch) == list(range(10))
    assert all(len(batch) <= 4 for batches in rows for batch in batches)


def test_own_randomness_is_repeatable_and_leaves_the_rest_alone():
    def draw():
        return random.random(), np.random.rand(), torch.rand(()).item()

    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = [draw(), draw()]
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    found = [draw()]
    with own_randomness(1, 2):
        inside = draw()
    found.append(draw())
    assert found == expected
    with own_randomness(1, 2):
        assert draw() == inside
    with own_randomness(1, 3):
        assert all(a != b for a, b in zip(draw(), inside, strict=True))


class Deadly:
    """Item 5 ends the process that reads it; item 6 fails in it."""

    def __getitem__(self, index):
        if index == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 6:
            raise RuntimeError("no such thing")
        return index


def test_a_worker_that_dies_is_a_failed_stage_with_a_hint():
    with pytest.raises(
        StageError, match=r"data\.workers.*died \(got signal SIGKILL in process \d+, number 1 of 2\).*memory"
    ) as error:
        list(loader(Deadly(), [[5], [1], [2]], 2, list, 4))
    assert error.value.exit_code == 4


@worker_deaths_told()
def busy_while_it_dies(worker):
    os.kill(worker.pid, signal.SIGKILL)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        time.sleep(0.01)


@worker_deaths_told()
def fails_otherwise():
    raise RuntimeError("another")


def test_a_worker_that_dies_while_the_main_process_is_busy_is_told_too():
    """PyTorch's signal handler raises wherever the program is."""
    batches = loader(range(10**4), [[number] for number in range(10**4)], 1, list, 4)
    next(batches)
    (worker,) = multiprocessing.active_children()
    with pytest.raises(StageError, match=r"data\.workers.*died \(got DataLoader worker.*killed.*memory"):
        busy_while_it_dies(worker)
    with pytest.raises(RuntimeError, match="another"):
        fails_otherwise()


def test_an_error_in_a_worker_keeps_its_words():
    with pytest.raises(StageError, match=r"RuntimeError: no such thing") as error:
        list(loader(Deadly(), [[1], [6]], 1, list, 4))
    assert "Traceback" not in str(error.value)
    with pytest.raises(RuntimeError, match="no such thing"):
        list(loader(Deadly(), [[1], [6]], 0, list, 4))


@pytest.mark.parametrize("workers", [0, 1, 2, 20])
def test_batches_come_in_order_whatever_the_number_of_workers(workers):
    asked = [[i, i + 10] for i in (1, 3, 4, 2, 0)]
    assert list(loader(range(100), asked, workers, list, 2)) == asked


def test_no_more_batches_are_prepared_than_allowed():
    taken = []

    def asked():
        for i in itertools.count():
            taken.append(i)
            yield [i]

    batches = loader(range(1000), asked(), 2, list, 8)
    for i in range(20):
        next(batches)
        assert len(taken) <= i + 1 + 8
