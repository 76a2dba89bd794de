"""Detects, without a GPU, what would make the CPU wait for one: operators that return a number to Python."""

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

WAITING = ("_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "lift_fresh")
"""Operators that return a number or a size to Python; the last one is ``torch.tensor(…)``, which copies from pageable
memory to a GPU."""


class NothingWaits(TorchDispatchMode):
    """Raises, inside the block, for an operator that would wait for a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[-1].split(".")[0]
        assert name not in WAITING, f"{name} waits for a GPU"
        return func(*args, **(kwargs or {}))
