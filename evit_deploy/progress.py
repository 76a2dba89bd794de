"""Progress of long work, as records of the logger ``evit_deploy``.

Every module logs through ``logging.getLogger(__name__)``: warnings report what the user should know (assumptions,
costs, recovered errors), infos report facts worth a line. Progress is logged here, as info and debug records with a
:class:`Progress` in the attribute ``progress``, so that a display can update in place;
:class:`evit_deploy.cli.output.Output` is the one of the command line. Without a logging handler, nothing is shown.
"""

import logging
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TypeVar

T = TypeVar("T")


@dataclass
class _Plan:
    count: int
    reached: int = 0
    outer: "_Plan | None" = None


_PLAN: ContextVar[_Plan | None] = ContextVar("stages", default=None)


@dataclass(frozen=True)
class Progress:
    """Position in the work that a record refers to.

    Args:
        stage: Number of the stage, from 1; ``None`` outside of :func:`stages`.
        stages: How many there are.
        done: Completed steps of the stage, if it counts steps.
        total: Total number of its steps.
        figures: Current measurements, such as ``images/s`` or ``loss``.
    """

    stage: int | None = None
    stages: int | None = None
    done: int | None = None
    total: int | None = None
    figures: dict[str, float] = field(default_factory=dict)


@contextmanager
def stages(count: int) -> Iterator[None]:
    """Declares the number of stages. If calls are nested, only the outermost counts.

    Args:
        count: How often :func:`stage` will be called.
    """
    token = _PLAN.set(_Plan(count, outer=_PLAN.get()))
    try:
        yield
    finally:
        _PLAN.reset(token)


def in_stages(items: Collection[T]) -> Iterator[T]:
    """Iterates over items, each of which is one stage."""
    with stages(len(items)):
        yield from items


def stage(log: logging.Logger, text: str) -> None:
    """Logs the start of the next stage."""
    plan = _PLAN.get()
    if plan is not None:
        plan.reached += 1
    doing(log, text)


def doing(log: logging.Logger, text: str) -> None:
    """Logs the current activity within the stage."""
    log.info(text, extra={"progress": _here()})


def step(log: logging.Logger, text: str, done: int, total: int, **figures: float) -> None:
    """Logs one of many steps within the stage, as a debug record.

    Args:
        log: The caller's logger.
        text: What is being done.
        done: Completed steps.
        total: Total number of steps.
        figures: Current measurements.
    """
    here = _here()
    log.debug(text, extra={"progress": Progress(here.stage, here.stages, done, total, figures)})


def _here() -> Progress:
    plan = _PLAN.get()
    while plan is not None and plan.outer is not None:
        plan = plan.outer
    if plan is None:
        return Progress()
    return Progress(min(plan.reached, plan.count) or None, plan.count)
