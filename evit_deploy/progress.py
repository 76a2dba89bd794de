"""How far long work has come, as records of the logger ``evit_deploy``.

Every module logs through ``logging.getLogger(__name__)``: warnings are what the user should know (assumptions, costs,
trouble that was overcome), infos are facts worth a line. Progress is logged here, as infos and debug records that carry
a :class:`Progress` in their attribute ``progress``, so that a display can show it in place instead of line by line; the
command line's is :class:`evit_deploy.cli.output.Output`. Without a handler progress is silent, as Python's logging is.
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
    """The place that a record speaks of.

    Args:
        stage: Number of the stage, from 1; ``None`` outside of :func:`stages`.
        stages: How many there are.
        done: Steps of a stage that lie behind, where it is counted in steps.
        total: Its steps in all.
        figures: What is measured on the way, ``images/s`` or ``loss``.
    """

    stage: int | None = None
    stages: int | None = None
    done: int | None = None
    total: int | None = None
    figures: dict[str, float] = field(default_factory=dict)


@contextmanager
def stages(count: int) -> Iterator[None]:
    """Says how many stages the work has. Of nested ones the outermost counts: the inner ones are details of its stage.

    Args:
        count: How often :func:`stage` will be called.
    """
    token = _PLAN.set(_Plan(count, outer=_PLAN.get()))
    try:
        yield
    finally:
        _PLAN.reset(token)


def in_stages(items: Collection[T]) -> Iterator[T]:
    """The items of a loop whose body begins a stage each."""
    with stages(len(items)):
        yield from items


def stage(log: logging.Logger, text: str) -> None:
    """Logs the beginning of the next stage."""
    plan = _PLAN.get()
    if plan is not None:
        plan.reached += 1
    doing(log, text)


def doing(log: logging.Logger, text: str) -> None:
    """Logs what is being done now, within the stage."""
    log.info(text, extra={"progress": _here()})


def step(log: logging.Logger, text: str, done: int, total: int, **figures: float) -> None:
    """Logs one of many steps within the stage, as a debug record.

    Args:
        log: The caller's logger.
        text: What is being done.
        done: Steps that lie behind.
        total: Steps in all.
        figures: What is measured on the way.
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
