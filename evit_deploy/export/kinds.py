"""Kinds of blocks: blocks that the exporter writes identically except for weights and token counts."""

from typing import Any

import msgspec
import torch
from torch import nn

from evit_deploy.tokens.plan import BlockPlan
from evit_deploy.tokens.reducer import TokenReducer

SMALL = 8
"""Numbers up to this are axes, signs or prefix token counts, never token counts."""

_OF_EVERY_MODULE = frozenset(vars(nn.Module()))
_NOT_EXPORTED = frozenset(("replaced", "plan", "given", "drop_prob"))
"""Attributes that do not affect the export, or that are compared separately."""


class Kind(msgspec.Struct, frozen=True):
    """Blocks that differ only in weights and token counts.

    Args:
        signature: What the export depends on; see :func:`signature_of`.
        row: Plan of the first of them, which is exported.
        prefix: Number of prefix tokens.
    """

    signature: Any
    row: BlockPlan
    prefix: int

    def takes(self, signature: Any, row: BlockPlan) -> bool:
        """Whether a block is of this kind, and the exported one can be renumbered to its token counts."""
        return self.signature == signature and renumbered(self.row, row, self.prefix, numbers_in(signature)) is not None


def renumbered(old: BlockPlan, new: BlockPlan, prefix: int, others: set[int]) -> dict[int, int] | None:
    """Maps the token counts of one block's plan to those of another's.

    Args:
        old: Plan of what was exported.
        new: The other.
        prefix: Number of prefix tokens.
        others: Numbers in the same block that are not token counts.

    Returns:
        Old count -> new count; ``None`` if a number is ambiguous: a count or something else, or two counts at once.
    """
    pairs = set(zip(_counts(old, prefix), _counts(new, prefix), strict=True))
    if all(one == other for one, other in pairs):
        return {}
    found = dict(pairs)
    clear = len(found) == len(pairs) and min(found) > SMALL and not found.keys() & others
    return found if clear else None


def _counts(row: BlockPlan, prefix: int) -> tuple[int, ...]:
    kept = () if row.keep is None else (row.keep,)
    return (row.tokens_in, row.tokens_in - prefix, *kept, row.tokens_out, row.tokens_out - prefix)


def signature_of(module: nn.Module) -> Any:
    """Everything about a module that affects its export, except the values of its parameters.

    Modules with buffers, hooks or attributes that cannot be compared are never equal to others; neither are reducers
    that carry state or have layers elsewhere.

    Args:
        module: A block in export form.

    Returns:
        Nested tuples that can be compared.
    """
    own: list[Any] = [type(module)]
    for name, value in vars(module).items():
        if name in _OF_EVERY_MODULE:
            if "hooks" in name and value:
                return object()
        elif name not in _NOT_EXPORTED:
            own.append((name, _comparable(value)))
    if isinstance(module, TokenReducer):
        if module.stateful or module.own_parameters:
            return object()
        own.append(("plan", module.plan.keep is None, module.plan.fused, module.plan.choice))
    drops = module.training and getattr(module, "drop_prob", 0)
    if drops or any(buffer is not None for buffer in module._buffers.values()):
        return object()
    for name, tensor in module._parameters.items():
        own.append((name, None if tensor is None else (tuple(tensor.shape), tensor.dtype)))
    return (*own, *((name, signature_of(child)) for name, child in module.named_children()))


def _comparable(value: Any) -> Any:
    if value is None or isinstance(value, bool | int | float | str | torch.dtype | msgspec.Struct):
        return value
    if isinstance(value, tuple) and all(isinstance(item, bool | int | float | str) for item in value):
        return tuple(value)
    return value if callable(value) and not isinstance(value, nn.Module) else object()


def numbers_in(signature: Any) -> set[int]:
    """All integers in a signature, such as weight sizes and numbers of heads."""
    if isinstance(signature, tuple):
        return {number for part in signature for number in numbers_in(part)}
    return {signature} if isinstance(signature, int) and not isinstance(signature, bool) else set()
