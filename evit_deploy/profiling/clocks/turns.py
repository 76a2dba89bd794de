"""Interleaved timing: candidates take turns, and times are grouped by round.

In every round each candidate has one turn, in a new random order, so that a drift of the machine's speed affects all
candidates equally and none always follows the same other one.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import msgspec
import numpy as np

from evit_deploy.report.report import Clock
from evit_deploy.runtimes.runner import Runner

MINIMUM_ROUNDS, MAXIMUM_ROUNDS = 5, 1000

Turn = TypeVar("Turn")


class Times(msgspec.Struct, frozen=True):
    """Times of one candidate.

    Args:
        clock: Clock that measured ``seconds``.
        seconds: ``[rounds, calls in a turn]``.
        end_to_end: Wall time of one whole call in each round, ``[rounds]``; ``None`` if ``seconds`` is already that.
    """

    clock: Clock
    seconds: np.ndarray
    end_to_end: np.ndarray | None = None

    @property
    def rounds(self) -> np.ndarray:
        """Median of each round, to compare with other candidates in the same round."""
        return np.median(self.seconds, axis=1)


def in_turns(turn: Callable[[int], Turn], count: int, duration: float, minimum_rounds: int) -> list[list[Turn]]:
    """Runs rounds in which every candidate has one turn.

    Args:
        turn: Times one candidate, given its index.
        count: Number of candidates.
        duration: Seconds to measure.
        minimum_rounds: Rounds to run even if that takes longer.

    Returns:
        For each round, the results of the turns in the order of the candidates.
    """
    rounds: list[list[Turn]] = []
    order = np.random.default_rng(0)
    end = time.perf_counter() + duration
    while len(rounds) < minimum_rounds or (time.perf_counter() < end and len(rounds) < MAXIMUM_ROUNDS):
        found = {int(index): turn(int(index)) for index in order.permutation(count)}
        rounds.append([found[index] for index in range(count)])
    return rounds


def random_feeds(runners: Sequence[Runner], batch: int) -> list[Mapping[str, np.ndarray]]:
    """Returns random images for each runner, by the names of its inputs; runners with equal shapes share them."""
    drawn: dict[tuple[int, ...], np.ndarray] = {}
    feeds: list[Mapping[str, np.ndarray]] = []
    for runner in runners:
        own = {}
        for spec in runner.inputs:
            shape = (batch, *(int(size or 1) for size in spec.shape[1:]))
            if shape not in drawn:
                drawn[shape] = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
            own[spec.name] = drawn[shape]
        feeds.append(own)
    return feeds
