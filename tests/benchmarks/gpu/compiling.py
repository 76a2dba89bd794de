"""``torch.compile`` as used by the parts, with the same settings for compiling ahead and for timing."""

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], *, toy: bool, graphs: bool = False) -> Callable[..., Any]:
    """Compiles a function or model as one full graph with static shapes.

    Args:
        function: What to compile.
        toy: Stops before Inductor, whose C++ for a CPU takes minutes to compile.
        graphs: Whether Inductor launches it by CUDA graphs.
    """
    if toy:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None)
