"""``torch.compile`` as the parts use it, the same where a program is compiled ahead and where it is timed."""

from collections.abc import Callable
from typing import Any

import torch


def compiled(function: Callable[..., Any], *, toy: bool, graphs: bool = False) -> Callable[..., Any]:
    """A function or model, compiled whole for static shapes.

    Args:
        function: What to compile.
        toy: Stops before Inductor, whose C++ for a CPU takes minutes to compile.
        graphs: Whether Inductor launches it by CUDA graphs.
    """
    if toy:
        return torch.compile(function, fullgraph=True, dynamic=False, backend="aot_eager")
    return torch.compile(function, fullgraph=True, dynamic=False, mode="reduce-overhead" if graphs else None)
