"""What a part is given."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evit_deploy.report.statistics import median_interval

from .device import Device
from .rows import Rows


@dataclass(frozen=True)
class Job:
    """A part's surroundings.

    Attributes:
        rows: Where results go.
        device: Where it runs.
        toy: Whether sizes are those of a dry run.
        libraries: Kernel libraries that run here, by name; the first is the one that the product uses.
        scratch: A folder that is removed afterwards.
    """

    rows: Rows
    device: Device
    toy: bool
    libraries: dict[str, Path]
    scratch: Path


def ratio(one: list[float], other: list[float]) -> list[float]:
    """Median of ``one / other`` over rounds, and the ends of its 95 % interval."""
    values = np.array(one) / np.array(other)
    return [round(float(value), 4) for value in (np.median(values), *median_interval(values))]


def median(values: list[float]) -> float:
    """The median, as a number that JSON takes."""
    return float(np.median(values))
