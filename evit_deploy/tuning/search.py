"""The search: of the schedules that just meet a time by the staircase, the one that answers most like the dense model.

What varies is a *shape*: which blocks reduce, and how the removal is divided among them. How much is removed in all
follows from the time that is to be met, so that every schedule that is looked at is worth looking at.

The search begins with shapes that are usual, then changes the best ones a little. All that it knows are the findings,
so it goes on where it was interrupted, and several processes search together by sharing them.
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
"""Shapes that are changed: the best ones, the very best most often."""
_HALVINGS = 24
_IDLE = 200
"""Shapes in a row that give nothing new, after which there is nothing more to find."""


class Goal(msgspec.Struct, frozen=True):
    """A time to meet.

    Args:
        name: What findings call it.
        seconds: A call may take so long, by the staircase.
        trials: Schedules to look at.
    """

    name: str
    seconds: float
    trials: int


class Fitter:
    """Finds the schedule of a shape that just meets a time.

    Args:
        planner: Model and method.
        staircase: What parts of the model cost.
    """

    def __init__(self, planner: Planner, staircase: Staircase) -> None:
        self.planner, self.staircase = planner, staircase
        self._steps = staircase.efficient
        self._seconds: dict[Schedule, float] = {}

    def seconds(self, schedule: Schedule) -> float:
        """What a schedule is expected to take, a call."""
        if schedule not in self._seconds:
            plan = self.planner.plan_of(self.planner.spec_of(schedule))
            self._seconds[schedule] = self.staircase.seconds(plan)
        return self._seconds[schedule]

    @property
    def dense(self) -> float:
        """What the dense model is expected to take."""
        return self.staircase.seconds(self.planner.plan_of(TokenSpec(keep_rate=1.0)))

    @property
    def floor(self) -> float:
        """The least that a schedule can be expected to take: all that may be removed goes at the first block."""
        return self.seconds(Schedule((0,), self._steps[-1:]))

    def fitted(self, shape: Shape, target: float) -> Schedule | None:
        """The schedule of a shape that takes no longer than a time and keeps as much as it may.

        Args:
            shape: Which blocks reduce, and how.
            target: Seconds a call.

        Returns:
            ``None`` where even removing all that may be is too slow.
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
        """The schedule of a shape whose counts are the nearest just below a step."""
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
        """Raises counts by a step while the time allows it, the one that costs least first."""
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
    """Shapes to begin with: the paper's places, others as far apart, and every second block, divided evenly."""
    quarter = max(1, depth // 4)
    places = [default_locations(depth), *(tuple(range(first, depth - 1, quarter)) for first in range(quarter))]
    places += [(0, depth // 2), (depth // 4, depth // 2), tuple(range(depth // 6, depth - 2, 2)), (0,)]
    inside = [tuple(location for location in locations if location < depth - 1) for locations in places]
    return [Shape(locations, (1.0,) * len(locations)) for locations in dict.fromkeys(inside) if locations]


def changed(shape: Shape, depth: int, draw: random.Random) -> Shape:
    """A shape a little away: a location moved, added or left out, or the removal divided otherwise."""
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
    """The shape to try next: first those that are usual, then one a little away from one of the best.

    Args:
        found: What was found for the same time so far.
        tried: How often this was asked since anything new was found.
        depth: Blocks of the model.
        seed: Where random numbers start.
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
    """Looks for the schedule that meets a time and answers most like the dense model.

    Args:
        fitter: Model, method and staircase.
        goal: The time to meet, and how many schedules to look at.
        findings: What was found before, here or by another process; takes what is new.
        look: How near a schedule's answers are.
        seed: Where random numbers start.

    Returns:
        All that was found for this goal, the best first; fewer than were asked for where there are no more.
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
        known = findings.nearness(schedule)  # for another goal
        findings.add(Finding(goal.name, shape, schedule, look(schedule) if known is None else known))
    return sorted(findings.of(goal.name), key=lambda finding: -finding.nearness.cosine)
