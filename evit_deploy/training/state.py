"""What a training run needs to go on as if nothing had happened: written atomically, read without running any code.

One file a stage holds the model, its average, the optimizer, the loss scaler, every random number generator, how far
the run has come and what it was asked for. On a CPU a run that goes on from it gives the same bits as one that was
never stopped.
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
# What may differ between a run and its continuation: it has no influence on the weights.
_FREE = {
    "data": ("workers", "evaluation_batch_size"),
    "dense": ("save_every", "threads"),
    "finetune": ("save_every", "threads"),
}
_DENSE = ("seed", "model", "data", "dense")
_STAGES = {"dense": _DENSE, "finetune": (*_DENSE, "tokens", "finetune", "teacher")}


def state_path(out: Path, stage: str) -> Path:
    """Where the state of an unfinished stage lies."""
    return out / f"{stage}.state"


def asked(recipe: Recipe, stage: str) -> dict[str, Any]:
    """The part of a recipe that decides what a stage's weights become, as plain values."""
    plain = msgspec.json.decode(msgspec.json.encode(recipe))  # as a file gives it back
    wanted = {key: plain[key] for key in _STAGES[stage]}
    for section, keys in _FREE.items():
        if isinstance(wanted.get(section), dict):
            wanted[section] = {key: value for key, value in wanted[section].items() if key not in keys}
    return wanted


class StateFile:
    """The state of one stage of one recipe.

    Args:
        path: The file.
        recipe: What is being done.
        stage: ``dense`` or ``finetune``.
    """

    def __init__(self, path: Path, recipe: Recipe, stage: str) -> None:
        self.path, self.asked = path, asked(recipe, stage)

    def write(self, state: dict[str, Any]) -> None:
        """Writes a state whole or not at all.

        Args:
            state: Tensors, numbers, texts, and lists and dicts of them.

        Raises:
            StageError: The disk is full or failed; what was there before is still there.
        """
        content = io.BytesIO()
        torch.save({"format": FORMAT, "asked": msgspec.json.encode(self.asked).decode(), **state}, content)
        write_atomically(self.path, content.getvalue())

    def read(self) -> dict[str, Any] | None:
        """The state, with its tensors on the CPU; ``None`` where there is none.

        Raises:
            InputError: It is damaged, or of a run that was asked for something else.
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
        """Forgets the state: the stage is finished."""
        self.path.unlink(missing_ok=True)


def _differences(then: Any, now: Any, where: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*then, *now]):
            if key not in then or key not in now or then[key] != now[key]:  # a null is not the same as no key
                yield from _differences(then.get(key), now.get(key), f"{where}.{key}" if where else key)
    else:
        yield where, then, now


def random_state() -> dict[str, Any]:
    """All generators that training draws from."""
    version, numbers, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": [version, list(numbers), gauss],
        "numpy": [name, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached],
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Puts the generators back to where :func:`random_state` found them."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))


class Interruption:
    """Whether somebody asked the run to stop; see :func:`interruptible`."""

    asked = False


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Lets SIGINT and SIGTERM wait for the end of a step, so that a whole state can be written; a later one does not.

    What comes shortly after the first belongs to it (:mod:`evit_deploy.interrupts`): Ctrl-C reaches the processes of
    ``torchrun`` from the terminal, and as SIGTERM from ``torchrun``.

    Only the main thread gets signals; elsewhere nothing changes.
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
