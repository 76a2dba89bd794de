"""Rows of a training run: a CSV file, and TensorBoard where it is installed."""

import csv
import importlib.util
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from evit_deploy.files import write_atomically
from evit_deploy.tokens.plan import TokenPlan
from evit_deploy.training.step import StepResult

COLUMNS = ("step", "loss", "learning_rate", "gradient_norm", "tokens", "images_per_second", "loader_wait", "gpu_memory")


class TrainingLog:
    """Writes one row for every ``every`` steps: means of the steps in between.

    Args:
        folder: Where ``<stage>.csv`` and ``tensorboard/<stage>`` go.
        stage: Name of the run.
        every: Steps a row.
    """

    def __init__(self, folder: Path, stage: str, every: int = 10) -> None:
        self.path, self.every = folder / f"{stage}.csv", every
        self._board_path = folder / "tensorboard" / stage
        self._rows: list[dict[str, str]] = []
        self._steps: list[StepResult] = []
        self._board: Any = None

    def begin(self, step: int) -> None:
        """Goes on after a number of steps; later rows of an earlier attempt are dropped."""
        self._rows = [row for row in _read(self.path) if int(row["step"]) <= step]
        self._steps = []
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(self._board_path), purge_step=step)

    def add(self, done: StepResult, losses: Sequence[float], rate: float, plan: TokenPlan) -> None:
        """Takes a step.

        Args:
            done: What it did.
            losses: Of all steps so far, this one's last.
            rate: Its learning rate.
            plan: Its token counts; the row has those at the end.
        """
        self._steps.append(done)
        if len(losses) % self.every:
            return
        latest = losses[-self.every :]
        self._rows = [row for row in self._rows if int(row["step"]) < len(losses)]  # the run may have gone back
        seconds = sum(one.seconds for one in self._steps)
        row = {
            "step": len(losses),
            "loss": sum(latest) / len(latest),
            "learning_rate": rate,
            "gradient_norm": sum(one.norm for one in self._steps) / len(self._steps),
            "tokens": plan.blocks[-1].tokens_out,
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
                if key != "step":
                    self._board.add_scalar(key, value, len(losses))

    def write(self) -> None:
        """Puts what there is on disk.

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
        """Ends TensorBoard's file; the CSV file is whole after every :meth:`write`."""
        if self._board is not None:
            self._board.close()


def _read(path: Path) -> list[dict[str, str]]:
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [row for row in rows if set(row) == set(COLUMNS) and row["step"].isdecimal()]
