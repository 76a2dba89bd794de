"""Schedules: token counts after each location, and their conversion to token specs."""

from collections.abc import Sequence
from typing import Any

import msgspec

from evit_deploy.errors import InputError
from evit_deploy.registry import METHODS
from evit_deploy.tokens.plan import ModelShape, TokenPlan, TokenSpec, keep_count
from evit_deploy.tokens.reducer import options_of

_RATE_DIGITS = 6


class Schedule(msgspec.Struct, frozen=True, order=True):
    """Token counts of a model; equal schedules result in the same model.

    Args:
        locations: 0-based blocks that reduce their tokens, strictly rising.
        counts: Number of tokens after each location, including the prefix, falling.
    """

    locations: tuple[int, ...]
    counts: tuple[int, ...]

    def __str__(self) -> str:
        return ", ".join(
            f"{count} from block {where}" for where, count in zip(self.locations, self.counts, strict=True)
        )


class Planner:
    """Converts schedules of one model and method to specs and plans.

    Args:
        spec: Method, options and fusion; its rates and locations are ignored.
        shape: Shape of the model.
        method: The method's class, as adapted by the model's family.

    Raises:
        InputError: The method has no token count for each location, or cannot be exported.
    """

    def __init__(self, spec: TokenSpec, shape: ModelShape, method: Any) -> None:
        self.spec, self.shape, self.method = spec, shape, method
        check_method_has_schedules(spec.method)
        self._options = options_of(method, spec)
        if not self._free():
            raise _without_schedules(spec.method)

    def _free(self) -> bool:
        """Whether tokens are reduced at the given locations, as requested, and nowhere else."""
        if self.shape.cost.blocks or self.shape.depth < 3:
            return False
        try:
            plan = self.plan_of(msgspec.structs.replace(self.spec, keep_rate=(0.8, 0.5), locations=(0, 1)))
        except InputError:
            return False
        outs = [row.tokens_out for row in plan.blocks]
        steps = all(row.tokens_in == before for row, before in zip(plan.blocks[1:], outs, strict=False))
        return steps and not any(row.aside for row in plan.blocks) and outs[0] > outs[1] == outs[-1]

    def plan_of(self, spec: TokenSpec) -> TokenPlan:
        """Token plan of a spec."""
        return self.method.plan_for(spec, self._options, self.shape, 1.0)

    def schedule_of(self, spec: TokenSpec) -> Schedule:
        """Schedule of a spec, without locations that remove nothing."""
        rows = self.plan_of(spec).locations
        return Schedule(tuple(row.block for row in rows), tuple(row.tokens_out for row in rows))

    def spec_of(self, schedule: Schedule) -> TokenSpec:
        """Spec that results in a schedule, with the shortest possible rates.

        Raises:
            InputError: The method cannot produce these counts.
        """
        rates: list[float] = []
        tokens = self.shape.prefix + self.shape.patches
        for number, count in enumerate(schedule.counts):
            rates.append(self._rate(schedule.locations[: number + 1], rates, tokens, count))
            tokens = count
        return msgspec.structs.replace(self.spec, keep_rate=tuple(rates), locations=schedule.locations)

    def _rate(self, locations: tuple[int, ...], before: Sequence[float], tokens: int, count: int) -> float:
        candidates = tokens - self.shape.prefix
        keep = count - self.shape.prefix
        # With fusion, one of the tokens is usually the fused one.
        for kept in (keep - 1, keep) if self.spec.fuse else (keep, keep - 1):
            rate = rate_of(kept, candidates) if 0 < kept < candidates else None
            if rate is None:
                continue
            spec = msgspec.structs.replace(self.spec, keep_rate=(*before, rate), locations=locations)
            if self.plan_of(spec).blocks[locations[-1]].tokens_out == count:
                return rate
        raise InputError(f"{self.spec.method} cannot make {count} tokens of {tokens}", where=f"block {locations[-1]}")


def check_method_has_schedules(name: str) -> None:
    """Checks, before the model is built, that schedules of a method can be searched.

    Args:
        name: Name in the registry of methods.

    Raises:
        InputError: The method cannot be exported, or has no keep rates.
    """
    method = METHODS.get(name)
    if not method.exports:
        raise InputError(f"the method {name!r} has no exported form", where="--method", fix="Use --method evit.")
    if not method.takes_keep_rate:
        raise _without_schedules(name)


def _without_schedules(name: str) -> InputError:
    return InputError(
        f"the method {name!r} has no keep rate for each location here, and so no schedule to search",
        where="--method", fix="Use --method evit.",
    )  # fmt: skip


def rate_of(keep: int, candidates: int) -> float | None:
    """Returns the shortest keep rate that keeps K of N candidates; ``None`` if six decimals are not enough.

    >>> rate_of(138, 196), rate_of(14, 25)
    (0.7, 0.56)

    Args:
        keep: K.
        candidates: N, larger than K.
    """
    for digits in range(1, _RATE_DIGITS + 1):
        rate = (keep * 10**digits // candidates) / 10**digits
        if rate > 0 and keep_count(rate, candidates) == keep:
            return rate
    return None
