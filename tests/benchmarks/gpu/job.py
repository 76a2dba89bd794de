"""The environment of a part."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from evit_deploy.report.statistics import median_interval

from .device import Device
from .rows import Rows


@dataclass(frozen=True)
class Job:
    """Everything passed to a part.

    Attributes:
        rows: Writer of results.
        device: Device to run on.
        toy: Whether to use the small sizes of a dry run.
        libraries: Usable kernel libraries by name; the first is used by evit_deploy.
        scratch: A temporary folder.
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
    """The median, as a JSON number."""
    return float(np.median(values))
