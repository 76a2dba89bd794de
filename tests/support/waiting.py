"""What makes a CPU wait for a GPU, found where there is none: operators that give Python a number."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "lift_fresh")
"""Operators that hand a number or a size to Python; the last one is ``torch.tensor(…)``, which on a GPU is copied from
ordinary memory."""


class NothingWaits(TorchDispatchMode):
    """Inside, an operator that would wait for a GPU is an error."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        assert name not in WAITING, f"{name} waits for a GPU"
        return func(*args, **(kwargs or {}))
