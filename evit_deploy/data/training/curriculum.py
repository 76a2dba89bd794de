"""The difficulty level of training images, which rises as the model learns.

With small objects on photographs from the first step on, a small vision transformer stays at chance for longer than a
small training budget lasts. It learns if it starts with a large white object on black and the difficulty then rises.
"""

from collections import deque
from typing import Any

from evit_deploy.errors import InputError


class Curriculum:
    """A level from 0 (easiest) to 1 (full difficulty) that rises while the running accuracy is high enough.

    The level depends only on the updates, so a run can be repeated and resumed. With several processes, all must be
    updated with the same accuracy: the mean over all processes.

    Args:
        threshold: Running accuracy at and above which the level rises.
        rate: Increase of the level per step.
        memory: Length of the running mean in steps: the weight of a new value is 1 / ``memory``.
        delay: Steps before an update takes effect, so that this many batches can be prepared ahead of time. The images
            are the same for any number of worker processes.
    """

    def __init__(self, threshold: float = 0.7, rate: float = 0.005, memory: int = 20, delay: int = 8) -> None:
        if not (0 <= threshold <= 1 and rate > 0 and memory >= 1 and delay >= 0):
            raise InputError("not a valid curriculum", seen=(threshold, rate, memory, delay))
        self.threshold, self.rate, self.memory, self.delay = threshold, rate, memory, delay
        self.level, self.accuracy, self.steps = 0.0, 0.0, 0
        self._recent: deque[float] = deque([0.0], maxlen=delay + 1)  # levels after the latest updates

    def update(self, correct_share: float) -> float:
        """Updates the level; call it once per step, after the forward pass.

        Args:
            correct_share: Fraction of the step's images, over all processes, that were classified correctly.

        Returns:
            The new level.
        """
        self.steps += 1
        self.accuracy += (correct_share - self.accuracy) / self.memory
        if self.accuracy >= self.threshold:
            self.level = min(1.0, self.level + self.rate)
        self._recent.append(self.level)
        return self.level

    def at(self, step: int) -> float:
        """Returns the level for a step's images, which is the level after update ``step - delay``.

        Args:
            step: 0-based; at most ``delay`` ahead of the updates so far.

        Raises:
            InputError: The step is too far ahead or behind.
        """
        after = step - self.delay
        if after <= 0:
            return 0.0
        back = self.steps - after
        if not 0 <= back < len(self._recent):
            raise InputError(
                "the level of this step is unknown", seen=f"step {step} after {self.steps} updates",
                wanted=f"a step from {self.steps} to {self.steps + self.delay}",
                fix="Call Curriculum.update once a step, and give training() the start_step that belongs to it.",
            )  # fmt: skip
        return self._recent[len(self._recent) - 1 - back]

    def unfinished(self, stage: str) -> str:
        """The message for a run that has ended below level 1.

        Args:
            stage: The run's section in the recipe.
        """
        return (
            f"{stage}: the run ended at level {self.level:.2f} of the curriculum, below 1: the model has not seen "
            "images as hard as those it is evaluated on. "
            f"Its running accuracy is {self.accuracy:.2f}; from {self.threshold:g} on the level rises by "
            f"{self.rate:g} a step. Raise {stage}.steps or data.curriculum_rate, or lower data.curriculum_threshold."
        )

    def state_dict(self) -> dict[str, Any]:
        """Returns the state as plain numbers, for resuming a run."""
        return {"level": self.level, "accuracy": self.accuracy, "steps": self.steps, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state from :meth:`state_dict`."""
        self.level, self.accuracy, self.steps = float(state["level"]), float(state["accuracy"]), int(state["steps"])
        self._recent = deque(map(float, state["recent"]), maxlen=self.delay + 1)
