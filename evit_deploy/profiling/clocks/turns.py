"""Who is timed when, and what comes of it: candidates take turns, and each turn's times stay together.

In every round each candidate has one turn, in an order drawn anew, so that a machine whose speed drifts slows all of
them alike and nobody always follows the same one.
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
    """What one candidate's turns took.

    Args:
        clock: What the seconds are of.
        seconds: One row a round, one column a call of its turn.
        end_to_end: Wall time of one whole call of each round; ``None`` where ``seconds`` are just that.
    """

    clock: Clock
    seconds: np.ndarray
    end_to_end: np.ndarray | None = None

    @property
    def rounds(self) -> np.ndarray:
        """One number for each round, to be held against other candidates' in the same round."""
        return np.median(self.seconds, axis=1)


def in_turns(turn: Callable[[int], Turn], count: int, duration: float, minimum_rounds: int) -> list[list[Turn]]:
    """Gives turns.

    Args:
        turn: Times one candidate, by its number.
        count: Candidates.
        duration: Seconds to go on for.
        minimum_rounds: Rounds to run even if that takes longer.

    Returns:
        For each round what the candidates' turns gave, in the candidates' order.
    """
    rounds: list[list[Turn]] = []
    order = np.random.default_rng(0)
    end = time.perf_counter() + duration
    while len(rounds) < minimum_rounds or (time.perf_counter() < end and len(rounds) < MAXIMUM_ROUNDS):
        found = {int(index): turn(int(index)) for index in order.permutation(count)}
        rounds.append([found[index] for index in range(count)])
    return rounds


def random_feeds(runners: Sequence[Runner], batch: int) -> list[Mapping[str, np.ndarray]]:
    """Random images for each runner, the same ones where they take the same; not every engine calls them ``input``."""
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
