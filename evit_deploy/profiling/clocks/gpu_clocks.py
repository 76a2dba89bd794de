"""Watches a GPU's clock rates during a measurement: whether they changed, and what slowed the GPU down."""

import contextlib
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from evit_deploy.environment.nvidia import GpuState, gpu_reader, reasons_in_words
from evit_deploy.report.report import GpuSummary

_IDLE = 0x1
_HARMLESS = _IDLE | 0x2 | 0x100  # idle between calls, or limits set by the user
MOVED = 0.03
"""A change of clock rates by more than this share is reported."""
INTERVAL = 0.05
"""Seconds between samples; long enough not to disturb the measurement by holding the GIL."""


class Watch:
    """Watches a GPU's clocks in a background thread; a context manager.

    Args:
        device: PyTorch's number of the GPU.

    Raises:
        MissingRequirement: There is no GPU, or nvidia-ml-py is not installed.
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
        """Takes an additional sample now."""
        self.states.append(self._read())

    def _sample(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.look()

    @property
    def notes(self) -> list[str]:
        """Notes on clock rates that changed and on what slowed the GPU down; empty if steady."""
        return notes_on(self.states)


def summarize_states(states: Sequence[GpuState], batch: int) -> GpuSummary:
    """Summarizes the samples of a GPU during the measurement of one batch size, without idle samples.

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
    """Returns notes on clock rates that changed between samples, and on what slowed the GPU down.

    Idle samples are ignored: before and between calls a GPU lowers its clocks, when nothing is timed.

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
