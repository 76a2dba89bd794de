"""What a GPU's clocks did while something was measured: whether they moved, and what slowed it down."""

import contextlib
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from evit_deploy.environment.nvidia import GpuState, gpu_reader, reasons_in_words
from evit_deploy.report.report import GpuSummary

_IDLE = 0x1
_HARMLESS = _IDLE | 0x2 | 0x100  # nobody's clock suffers from being idle between calls, or from what its owner has set
MOVED = 0.03
"""Clocks that differ by more than this share during a measurement are said to have moved."""
INTERVAL = 0.05
"""Seconds between samples: seldom enough not to take the interpreter from who is being timed."""


class Watch:
    """Watches a GPU's clocks while something is measured; a context manager.

    Args:
        device: PyTorch's number of it.

    Raises:
        MissingRequirement: No GPU, or no nvidia-ml-py.
    """

    def __init__(self, device: int = 0) -> None:
        self.device = device
        self.states: list[GpuState] = []

    def __enter__(self) -> Self:
        self._reader = contextlib.ExitStack()
        self._read = self._reader.enter_context(gpu_reader(self.device))
        self.look()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="gpu-clocks", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
        try:
            self.look()
        finally:
            self._reader.close()

    def look(self) -> None:
        """Takes a sample now, beside those that are taken all the time."""
        self.states.append(self._read())

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.look()

    @property
    def notes(self) -> list[str]:
        """Sentences on clocks that moved and on what slowed the GPU down; none when all was steady."""
        return notes_on(self.states)


def summarize_states(states: Sequence[GpuState], batch: int) -> GpuSummary:
    """Condenses what a GPU did while one batch size was measured; idle samples are left out.

    Args:
        states: Samples of one GPU, at least one.
        batch: Images per call.
    """
    busy = [state for state in states if not state.throttled_by & _IDLE]
    slowed = 0
    for state in busy:
        slowed |= state.throttled_by & ~_HARMLESS
    last = states[-1]
    return GpuSummary(
        name=last.name,
        driver=last.driver,
        compute_capability=last.compute_capability,
        batch=batch,
        samples=len(busy),
        sm_clock=_span([state.sm_clock for state in busy]),
        sm_clock_max=last.sm_clock_max,
        memory_clock=_span([state.memory_clock for state in busy]),
        memory_clock_max=last.memory_clock_max,
        slowed_down=sum(bool(state.throttled_by & ~_HARMLESS) for state in busy) / max(len(busy), 1),
        reasons=tuple(reasons_in_words(slowed)),
        temperature=max((state.temperature for state in busy if state.temperature is not None), default=None),
        power=max((state.power for state in busy if state.power is not None), default=None),
        power_limit=last.power_limit,
    )


def _span(clocks: Sequence[int | None]) -> tuple[int, int] | None:
    known = [clock for clock in clocks if clock]
    return (min(known), max(known)) if known else None


def notes_on(states: Sequence[GpuState]) -> list[str]:
    """Says in sentences whether clocks moved between samples, and what slowed the GPU down.

    Idle samples are left out: before and between the calls a GPU lowers its clocks, and nobody is timed then.

    Args:
        states: Samples of one GPU.
    """
    busy = [state for state in states if not state.throttled_by & _IDLE]
    notes = []
    for label, clocks in (
        ("SM", [state.sm_clock for state in busy if state.sm_clock]),
        ("memory", [state.memory_clock for state in busy if state.memory_clock]),
    ):
        if clocks and max(clocks) > min(clocks) * (1 + MOVED):
            notes.append(
                f"The GPU's {label} clock moved between {min(clocks)} and {max(clocks)} MHz while it was measured: "
                "lock it (nvidia-smi --lock-gpu-clocks, --lock-memory-clocks) and measure again."
            )
    slowed = 0
    for state in busy:
        slowed |= state.throttled_by & ~_HARMLESS
    if slowed:
        share = sum(bool(state.throttled_by & ~_HARMLESS) for state in busy) / len(busy)
        notes.append(f"The GPU was slowed down in {share:.0%} of the samples: {'; '.join(reasons_in_words(slowed))}.")
    return notes
