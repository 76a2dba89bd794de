"""Log of a training run: a CSV file, and TensorBoard if it is installed."""

import csv
import importlib.util
import io
import math
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from evit_deploy.files import write_atomically
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.training.step import StepResult

COLUMNS = (
    "step", "epoch", "loss", "validation_top1", "learning_rate", "gradient_norm", "tokens", "keep_rate",
    "images_per_second", "loader_wait", "gpu_memory",
)  # fmt: skip
_BARS = "▁▂▃▄▅▆▇█"
_IN_A_LINE = 20  # bars, so that a curve's line fits 80 columns


class TrainingLog:
    """Adds a row every ``every`` steps, at every evaluation and at the last step.

    A row has means over the steps since the previous row. ``validation_top1``, a share, is empty without an evaluation.

    Args:
        folder: Folder for ``<stage>.csv`` and ``tensorboard/<stage>``.
        stage: Name of the stage.
        every: Steps per row.
    """

    def __init__(self, folder: Path, stage: str, every: int = 10) -> None:
        self.path, self.every = folder / f"{stage}.csv", every
        self._board_path, self._stage = folder / "tensorboard" / stage, stage
        self._rows: list[dict[str, str]] = []
        self._steps: list[StepResult] = []
        self._latest: dict[str, Any] = {}  # values that a row takes from its last step
        self._losses: Sequence[float] = ()
        self._per_epoch = 1
        self._board: Any = None

    def begin(self, step: int, per_epoch: int = 1) -> None:
        """Opens the log at a step; rows after it, from an interrupted attempt, are dropped.

        Args:
            step: Number of steps done so far.
            per_epoch: Steps per epoch.
        """
        self._rows = [row for row in _read(self.path) if int(row["step"]) <= step]
        self._steps, self._per_epoch = [], per_epoch
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._board_path), purge_step=step)

    def add(self, done: StepResult, losses: Sequence[float], rate: float, plan: TokenPlan) -> None:
        """Adds a step.

        Args:
            done: Result of the step.
            losses: Losses of all steps so far, including this one.
            rate: Its learning rate.
            plan: Its token plan; the row has the final token count and the keep rate of the first location.
        """
        self._steps.append(done)
        tokens = plan.blocks[-1].tokens_out
        self._losses = losses
        self._latest = {"learning_rate": rate, "tokens": tokens, "keep_rate": _keep_rate(plan)}
        if len(losses) % self.every == 0:
            self.row()

    def row(self) -> None:
        """Ends the current row, unless one already ended at the last step."""
        if not self._steps:
            return
        step, seconds = len(self._losses), sum(one.seconds for one in self._steps)
        self._rows = [
            row for row in self._rows if int(row["step"]) < step
        ]  # drop later rows if the run returned to an earlier state
        latest = self._losses[int(self._rows[-1]["step"]) if self._rows else 0 :]
        row = {
            "step": step,
            "epoch": step / self._per_epoch,
            "loss": sum(latest) / len(latest),
            "validation_top1": "",
            "learning_rate": self._latest["learning_rate"],
            "gradient_norm": sum(one.norm for one in self._steps) / len(self._steps),
            "tokens": self._latest["tokens"],
            "keep_rate": self._latest["keep_rate"],
            "images_per_second": sum(one.images for one in self._steps) / seconds,
            "loader_wait": sum(one.waited for one in self._steps) / seconds,
            "gpu_memory": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0,
        }
        self._steps = []
        self._rows.append(
            {key: f"{value:.6g}" if isinstance(value, float) else str(value) for key, value in row.items()}
        )
        if self._board is not None:
            for key, value in row.items():
                if key not in ("step", "validation_top1"):
                    self._board.add_scalar(key, value, step)

    def evaluated(self, top1: float) -> None:
        """Adds the validation accuracy, a share, to the row of the last step."""
        self.row()
        if not self._rows:
            return
        self._rows[-1]["validation_top1"] = f"{top1:.6g}"
        if self._board is not None:
            self._board.add_scalar("validation_top1", top1, int(self._rows[-1]["step"]))

    def curve(self) -> str | None:
        """Returns the evaluations so far as one line of text, or ``None`` for fewer than two."""
        points = [(float(row["epoch"]), float(row["validation_top1"])) for row in self._rows if row["validation_top1"]]
        if len(points) < 2:
            return None
        (first, start), (last, end) = points[0], points[-1]
        at, best = max(points, key=lambda point: point[1])
        line = sparkline([top1 for _, top1 in points], _IN_A_LINE)
        text = f"{self._stage}: validation top-1 {start:.2%} {line} {end:.2%}"
        text += f", epochs {first:.3g} to {last:.3g}"
        return text if best == end else f"{text}; highest at epoch {at:.3g}: {best:.2%}"

    def loss_curve(self) -> str | None:
        """Returns the loss so far as one line of text, each bar a mean over rows, or ``None`` for fewer than two."""
        points = [(float(row["epoch"]), float(row["loss"])) for row in self._rows]
        if len(points) < 2:
            return None
        bars = min(len(points), _IN_A_LINE)
        ends = [round(i * len(points) / bars) for i in range(bars + 1)]
        means = [sum(loss for _, loss in points[a:b]) / (b - a) for a, b in pairwise(ends)]
        line = sparkline(means) if all(map(math.isfinite, means)) else "is not finite"
        (first, start), (last, end) = points[0], points[-1]
        return f"{self._stage}: loss {start:.3g} {line} {end:.3g}, epochs {first:.3g} to {last:.3g}"

    def write(self) -> None:
        """Writes all rows to disk.

        Raises:
            StageError: The disk is full or failed.
        """
        text = io.StringIO()
        writer: Any = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows)
        write_atomically(self.path, text.getvalue().encode())
        if self._board is not None:
            self._board.flush()

    def close(self) -> None:
        """Closes TensorBoard's writer. The CSV file is complete after every :meth:`write`."""
        if self._board is not None:
            self._board.close()


def _keep_rate(plan: TokenPlan) -> float:
    """Share of its candidates that the first location keeps; 1 if no location reduces."""
    first = next(iter(plan.locations), None)
    return 1.0 if first is None or first.keep is None else first.keep / (first.tokens_in - plan.prefix)


def sparkline(values: Sequence[float], width: int = 60) -> str:
    """Draws values as one line of bars, scaled from the lowest to the highest value.

    Args:
        values: At least one value. If there are more than ``width``, evenly spaced ones are drawn, including the first
            and the last.
        width: Maximum number of bars.
    """
    if len(values) > width:
        values = [values[round(i * (len(values) - 1) / (width - 1))] for i in range(width)]
    low, span = min(values), max(values) - min(values)
    return "".join(_BARS[round((value - low) / span * (len(_BARS) - 1)) if span else 3] for value in values)


def read_log(path: Path) -> list[dict[str, float]]:
    """Reads the rows of a log as numbers, without empty cells.

    Args:
        path: The CSV file; a missing file has no rows.
    """
    return [{name: float(value) for name, value in row.items() if value} for row in _read(path)]


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if set(row) == set(COLUMNS) and row["step"].isdecimal()]
