"""How hard the training images are: a level that rises as the model learns.

A small vision transformer that is shown small things on photographs from its first step on stays at chance for longer
than a small budget lasts. One that begins with a large white thing on black, and is led from there, does not.
"""

from collections import deque
from typing import Any

from evit_deploy.errors import InputError


class Curriculum:
    """A level from 0 (easiest) to 1 (full difficulty) that moves on while the running accuracy is high enough.

    The level depends on the updates alone, so a run can be repeated and resumed. Where several processes train, every
    one has to be given the same share: the mean over all of them.

    Args:
        threshold: Running accuracy from which on the level rises.
        rate: What it rises by in one step.
        memory: How many steps the running mean looks back: its weight of a new value is 1 / ``memory``.
        delay: Steps before an update takes effect, so that as many batches can be prepared ahead of time. The same
            images come whatever the number of worker processes.
    """

    def __init__(self, threshold: float = 0.7, rate: float = 0.005, memory: int = 20, delay: int = 8) -> None:
        if not (0 <= threshold <= 1 and rate > 0 and memory >= 1 and delay >= 0):
            raise InputError("not a valid curriculum", seen=(threshold, rate, memory, delay))
        self.threshold, self.rate, self.memory, self.delay = threshold, rate, memory, delay
        self.level, self.accuracy, self.steps = 0.0, 0.0, 0
        self._recent: deque[float] = deque([0.0], maxlen=delay + 1)  # levels after the latest updates

    def update(self, correct_share: float) -> float:
        """Takes in one step; call it once a step, after the forward pass.

        Args:
            correct_share: Share of the step's images, of all processes, that were classified correctly.

        Returns:
            The level from now on.
        """
        self.steps += 1
        self.accuracy += (correct_share - self.accuracy) / self.memory
        if self.accuracy >= self.threshold:
            self.level = min(1.0, self.level + self.rate)
        self._recent.append(self.level)
        return self.level

    def at(self, step: int) -> float:
        """The level that a step's images are made at: that after update ``step - delay``.

        Args:
            step: 0-based; at most ``delay`` ahead of the updates so far.

        Raises:
            InputError: The step lies too far ahead or behind.
        """
        after = step - self.delay  # updates that count for it
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
        """What to tell where a run has ended below level 1.

        Args:
            stage: The recipe's section of the run.
        """
        return (
            f"{stage}: the run ended at level {self.level:.2f} of the curriculum, below 1: the model has not seen "
            "images as hard as those it is evaluated on. "
            f"Its running accuracy is {self.accuracy:.2f}; from {self.threshold:g} on the level rises by "
            f"{self.rate:g} a step. Raise {stage}.steps or data.curriculum_rate, or lower data.curriculum_threshold."
        )

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: plain numbers."""
        return {"level": self.level, "accuracy": self.accuracy, "steps": self.steps, "recent": list(self._recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes on from :meth:`state_dict`."""
        self.level, self.accuracy, self.steps = float(state["level"]), float(state["accuracy"]), int(state["steps"])
        self._recent = deque(map(float, state["recent"]), maxlen=self.delay + 1)
