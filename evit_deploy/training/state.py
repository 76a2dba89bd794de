"""Saved state of a training run, for resuming it: written atomically, read without executing code.

One file per stage contains the model, the weight average, the optimizer, the loss scaler, all random number generators,
the progress, and the settings of the run. On a CPU, a resumed run gives bit-identical weights to an uninterrupted one.
"""

import io
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import msgspec
import numpy as np
import torch

from evit_deploy import interrupts
from evit_deploy.errors import InputError
from evit_deploy.files import write_atomically
from evit_deploy.recipe.recipe import Recipe

FORMAT = 1
# Settings that may change on resume, because they do not affect the weights.
_FREE = {
    "data": ("workers", "evaluation_batch_size"),
    "dense": ("save_every", "threads"),
    "finetune": ("save_every", "threads"),
}
_DENSE = ("seed", "model", "data", "dense")
_STAGES = {"dense": _DENSE, "finetune": (*_DENSE, "tokens", "finetune", "teacher")}


def state_path(out: Path, stage: str) -> Path:
    """Returns the path of the state of an unfinished stage."""
    return out / f"{stage}.state"


def asked(recipe: Recipe, stage: str) -> dict[str, Any]:
    """Returns the settings that affect a stage's weights, as plain values."""
    plain = msgspec.json.decode(msgspec.json.encode(recipe))  # in the form that is read back from a file
    wanted = {key: plain[key] for key in _STAGES[stage]}
    for section, keys in _FREE.items():
        if isinstance(wanted.get(section), dict):
            wanted[section] = {key: value for key, value in wanted[section].items() if key not in keys}
    return wanted


class StateFile:
    """The state of one stage of one recipe.

    Args:
        path: The file.
        recipe: The recipe.
        stage: ``dense`` or ``finetune``.
    """

    def __init__(self, path: Path, recipe: Recipe, stage: str) -> None:
        self.path, self.asked = path, asked(recipe, stage)

    def write(self, state: dict[str, Any]) -> None:
        """Writes a state atomically.

        Args:
            state: Tensors, numbers, text, and lists and dicts of them.

        Raises:
            StageError: The disk is full or failed; the previous state is kept.
        """
        content = io.BytesIO()
        torch.save({"format": FORMAT, "asked": msgspec.json.encode(self.asked).decode(), **state}, content)
        write_atomically(self.path, content.getvalue())

    def read(self) -> dict[str, Any] | None:
        """Reads the state, with tensors on the CPU; ``None`` if there is no file.

        Raises:
            InputError: The file is damaged, or belongs to a run with other settings.
        """
        if not self.path.exists():
            return None
        try:
            state = torch.load(io.BytesIO(self.path.read_bytes()), map_location="cpu", weights_only=True)
            then = msgspec.json.decode(state["asked"])
            if state["format"] != FORMAT:
                raise ValueError(f"format {state['format']}, expected {FORMAT}")
        except Exception as error:  # torch.load fails in many ways on a damaged file
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(
                f"the interrupted run's state cannot be read ({reason})", where=self.path,
                fix="Start again with --force.",
            ) from None  # fmt: skip
        if then != self.asked:
            key, old, new = next(_differences(then, self.asked))
            raise InputError(
                "the interrupted run had different settings", where=self.path, seen=f"{key} {new}",
                wanted=f"{key} {old}", fix="Continue with the same recipe, or start again with --force.",
            )  # fmt: skip
        return state

    def remove(self) -> None:
        """Deletes the state of a finished stage."""
        self.path.unlink(missing_ok=True)


def _differences(then: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            if key not in then or key not in now or then[key] != now[key]:  # a null differs from a missing key
                yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    else:
        yield where, then, now


def random_state() -> dict[str, Any]:
    """Returns the state of all random number generators that training uses."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restores a result of :func:`random_state`."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


class Interruption:
    """Whether the run was asked to stop; see :func:`interruptible`."""

    asked = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Defers SIGINT and SIGTERM to the end of a step, so that the state can be saved; a second signal stops at once.

    Signals shortly after the first count as the same one (:mod:`evit_deploy.interrupts`): Ctrl-C reaches the processes
    of ``torchrun`` from the terminal and again as a SIGTERM from ``torchrun``.

    Has no effect outside the main thread, which alone receives signals.
    """
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found
        return

    def note(number: int, frame: FrameType | None) -> None:
        if not found.asked:
            interrupts.note(number)
        elif not interrupts.repeated():
            raise KeyboardInterrupt
        found.asked = True

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
