"""Search for the schedule with answers closest to the dense model's, among those that meet a time by the staircase.

The search varies the *shape* of a schedule: which blocks reduce, and how the removal is divided among them. The total
removal follows from the time to meet, so no trial is spent on a schedule that is too slow or faster than needed.

The search starts with common shapes, then makes small changes to the best ones. Its only state is the findings, so it
can continue after an interruption, and several processes can share a search.
"""

import math
import random
from collections.abc import Callable, Iterator, Sequence

import msgspec

from evit_deploy.tokens.plan import TokenSpec, default_locations
from evit_deploy.tuning.answers import Nearness
from evit_deploy.tuning.findings import Finding, Findings, Shape
from evit_deploy.tuning.schedules import Planner, Schedule
from evit_deploy.tuning.staircase import Staircase

_PARENTS = 3
"""Number of best shapes that are modified; the best one is drawn most often."""
_HALVINGS = 24
_IDLE = 200
"""The search stops after this many shapes in a row without a new schedule."""


class Goal(msgspec.Struct, frozen=True):
    """A time to meet.

    Args:
        name: Name of the goal in the findings.
        seconds: Largest time of a call in seconds, as predicted by the staircase.
        trials: Number of schedules to evaluate.
    """

    name: str
    seconds: float
    trials: int


class Fitter:
    """Fits schedules of given shapes to a time.

    Args:
        planner: Planner of the model and method.
        staircase: Times of the parts of the model.
    """

    def __init__(self, planner: Planner, staircase: Staircase) -> None:
        self.planner, self.staircase = planner, staircase
        self._steps = staircase.efficient
        self._seconds: dict[Schedule, float] = {}

    def seconds(self, schedule: Schedule) -> float:
        """Predicted seconds per call of a schedule."""
        if schedule not in self._seconds:
            plan = self.planner.plan_of(self.planner.spec_of(schedule))
            self._seconds[schedule] = self.staircase.seconds(plan)
        return self._seconds[schedule]

    @property
    def dense(self) -> float:
        """Predicted seconds per call of the dense model."""
        return self.staircase.seconds(self.planner.plan_of(TokenSpec(keep_rate=1.0)))

    @property
    def floor(self) -> float:
        """Smallest predicted seconds per call of any schedule: the maximum is removed at the first block."""
        return self.seconds(Schedule((0,), self._steps[-1:]))

    def fitted(self, shape: Shape, target: float) -> Schedule | None:
        """Returns the schedule of a shape that keeps the most tokens within a time.

        Args:
            shape: Blocks that reduce, and how the removal is divided.
            target: Largest number of seconds per call.

        Returns:
            The schedule; ``None`` if the shape is too slow even with the maximum removed.
        """
        low, high = 0.0, math.log(self.staircase.counts[0] / self._steps[-1]) * len(shape.weights)
        found = self._snapped(shape, high)
        if found is None or self.seconds(found) > target:
            return None
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            made = self._snapped(shape, middle)
            if made is not None and self.seconds(made) <= target:
                found, high = made, middle
            else:
                low = middle
        return self._filled(found, target)

    def _snapped(self, shape: Shape, strength: float) -> Schedule | None:
        """Schedule of a shape for a total removal, with counts rounded to efficient ones; ``None`` if it is dense.

        Args:
            shape: Blocks that reduce, and how the removal is divided.
            strength: Total removal: the negative logarithm of the share of tokens after the last location.
        """
        whole, done, before = sum(shape.weights), 0.0, self.staircase.counts[0]
        locations, counts = [], []
        for location, weight in zip(shape.locations, shape.weights, strict=True):
            done += weight
            wanted = self.staircase.counts[0] * math.exp(-strength * done / whole)
            count = min(self._steps, key=lambda step: abs(step - wanted))
            if count < before:
                locations.append(location)
                counts.append(count)
                before = count
        return Schedule(tuple(locations), tuple(counts)) if counts else None

    def _filled(self, schedule: Schedule, target: float) -> Schedule:
        """Raises counts step by step, the cheapest first, as long as the time is met."""
        while True:
            raised = [made for made in self._raised(schedule) if self.seconds(made) <= target]
            if not raised:
                return schedule
            schedule = min(raised, key=self.seconds)

    def _raised(self, schedule: Schedule) -> Iterator[Schedule]:
        for place, count in enumerate(schedule.counts):
            more = [step for step in self._steps if step > count]
            above = schedule.counts[place - 1] if place else self.staircase.counts[0]
            if more and more[-1] < above:
                counts = (*schedule.counts[:place], more[-1], *schedule.counts[place + 1 :])
                yield Schedule(schedule.locations, counts)


def usual_shapes(depth: int) -> list[Shape]:
    """Initial shapes: the paper's locations, others with the same spacing, and every second block, divided evenly."""
    quarter = max(1, depth // 4)
    places = [default_locations(depth), *(tuple(range(first, depth - 1, quarter)) for first in range(quarter))]
    places += [(0, depth // 2), (depth // 4, depth // 2), tuple(range(depth // 6, depth - 2, 2)), (0,)]
    inside = [tuple(location for location in locations if location < depth - 1) for locations in places]
    return [Shape(locations, (1.0,) * len(locations)) for locations in dict.fromkeys(inside) if locations]


def changed(shape: Shape, depth: int, draw: random.Random) -> Shape:
    """Makes one small random change to a shape: moves, adds or removes a location, or changes a weight."""
    locations, weights = list(shape.locations), list(shape.weights)
    kind = draw.random()
    place = draw.randrange(len(locations))
    free = [block for block in range(depth - 1) if block not in locations]
    if kind < 0.45:
        near = [block for block in free if abs(block - locations[place]) <= 2]
        if near:
            locations[place] = draw.choice(near)
    elif kind < 0.75:
        weights[place] *= math.exp(draw.gauss(0, 0.6))
    elif kind < 0.88 and len(locations) > 1:
        del locations[place], weights[place]
    elif free:
        locations.append(draw.choice(free))
        weights.append(weights[place])
    order = sorted(range(len(locations)), key=lambda i: locations[i])
    mean = sum(weights) / len(weights)
    return Shape(tuple(locations[i] for i in order), tuple(round(weights[i] / mean, 3) for i in order))


def next_shape(found: Sequence[Finding], tried: int, depth: int, seed: int) -> Shape:
    """Returns the next shape to try: first the common ones, then a small change to one of the best.

    Args:
        found: Findings for the same goal so far.
        tried: Number of shapes tried since the last new finding.
        depth: Number of blocks of the model.
        seed: Random seed.
    """
    usual = usual_shapes(depth)
    random.Random(seed).shuffle(usual)
    known = {finding.shape for finding in found}
    left = [shape for shape in usual if shape not in known]
    if tried < len(left):
        return left[tried]
    draw = random.Random(f"{seed} {len(found)} {tried}")
    best = sorted(found, key=lambda finding: -finding.nearness.cosine)[:_PARENTS]
    return changed(draw.choice([*best, best[0]]).shape if best else draw.choice(usual), depth, draw)


def search(
    fitter: Fitter, goal: Goal, findings: Findings, look: Callable[[Schedule], Nearness], seed: int
) -> list[Finding]:
    """Searches for the schedule that meets a time with answers closest to the dense model's.

    Args:
        fitter: Model, method and staircase.
        goal: The time to meet, and the number of schedules to evaluate.
        findings: Earlier findings, of this or other processes; new ones are added.
        look: Evaluates the answers of a schedule.
        seed: Random seed.

    Returns:
        All findings for this goal, the best first; fewer than ``goal.trials`` if no more schedules were found.
    """
    tried = 0
    while tried < _IDLE:
        found = findings.of(goal.name)
        if len(found) >= goal.trials:
            break
        shape = next_shape(found, tried, fitter.planner.shape.depth, seed)
        schedule = fitter.fitted(shape, goal.seconds)
        if schedule is None or any(finding.schedule == schedule for finding in found):
            tried += 1
            continue
        tried = 0
        known = findings.nearness(schedule)  # another goal may have evaluated it
        findings.add(Finding(goal.name, shape, schedule, look(schedule) if known is None else known))
    return sorted(findings.of(goal.name), key=lambda finding: -finding.nearness.cosine)
