"""The state that a method passes from block to block together with the tokens.

Each block takes a state and returns a new one. A forward pass does not modify modules, so that exports, compiled graphs
and activation checkpointing only handle plain tensors of static shapes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit_deploy.tokens.operators.token_reorg import rows_of


class TokenState(NamedTuple):
    """State of one forward pass; fields that the method does not use are ``None``.

    Args:
        sizes: FP32 ``[B, N]``: number of patches in each token, without the prefix.
        rows: int64 ``[B, patches]``: the token that contains each patch, counted without the prefix; for methods that
            lose no patches.
        attention: FP32 ``[B, N + M]``: global class attention of the tokens, followed by that of the waiting ones.
        aside: ``[B, M, C]``: tokens that wait while others are updated.
        representative: ``[B, 1, C]``: the token that represents the waiting ones, as it was when the stage began.
        mask: ``[B, N]``: 1 for kept tokens, 0 for tokens that training masks instead of removing.
        decisions: Values for the method's loss, one tensor for each location so far.
    """

    sizes: Tensor | None = None
    rows: Tensor | None = None
    attention: Tensor | None = None
    aside: Tensor | None = None
    representative: Tensor | None = None
    mask: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()


class TokenBlocks(nn.Sequential):
    """The blocks of a model with a stateful method: every block is a reduced block and passes the state to the next.

    Parameter names are the same as in the replaced container.

    Args:
        blocks: Reduced blocks; when called with ``state=``, they return tokens and state.
        replaced: The original container; kept so that it can be restored.
    """

    def __init__(self, blocks: list[nn.Module], replaced: nn.Module) -> None:
        super().__init__(*blocks)
        self.replaced = (replaced,)  # in a tuple, where nn.Module does not look for children
        self.checkpointing = False
        """Whether activations are recomputed in the backward pass instead of being stored."""
        self.train(replaced.training)

    def carry(self, x: Tensor) -> tuple[Tensor, TokenState]:
        """Runs all blocks.

        Args:
            x: ``[B, prefix + patches, C]``.

        Returns:
            The input of the model's last norm, and the state after the last block.
        """
        blocks: list[Any] = list(self)
        state = blocks[0].reducer.start(x)
        again = self.checkpointing and torch.is_grad_enabled()
        for block in blocks:
            # The block is called as a module, so that exporters and profilers record its name.
            found: Any = checkpoint(block, x, state=state, use_reentrant=False) if again else block(x, state=state)
            x, state = found
        return blocks[-1].reducer.finish(x, state), state

    def forward(self, input: Tensor) -> Tensor:
        """Like :meth:`carry`, but returns only the tokens."""
        return self.carry(input)[0]


def every_patch(x: Tensor, prefix: int) -> Tensor:
    """Returns the rows before the first location: each patch is in its own token.

    Args:
        x: ``[B, prefix + patches, C]``.
        prefix: Tokens in front of the patches.

    Returns:
        int64 ``[B, patches]``.
    """
    return torch.arange(x.shape[1] - prefix, device=x.device).expand(x.shape[0], -1)


def rows_after(rows: Tensor, choice: Tensor, keep: int) -> Tensor:
    """Returns the token that contains each patch after a merge.

    Args:
        rows: int64 ``[B, patches]``: the token that contains each patch before it.
        choice: Choice of kind ``merge``; see :mod:`evit_deploy.tokens.choices`.
        keep: Number of kept tokens.

    Returns:
        int64 ``[B, patches]``.
    """
    candidates = (choice.shape[1] + keep) // 2
    choice = choice.long()
    staying = torch.arange(keep, device=rows.device).expand(rows.shape[0], -1)
    places = torch.cat([staying, choice[:, candidates:]], 1)
    return torch.empty_like(places).scatter(1, choice[:, :candidates], places).gather(1, rows)


def patches_back(x: Tensor, rows: Tensor, prefix: int) -> Tensor:
    """Copies each token to the positions of its patches, so that a pooling head gets the original number of tokens.

    Args:
        x: ``[B, prefix + N, C]``.
        rows: int64 ``[B, patches]``: the token that contains each patch.
        prefix: Tokens in front of the candidates.

    Returns:
        ``[B, prefix + patches, C]``.
    """
    return torch.cat([x[:, :prefix], rows_of(x, rows, prefix)], 1)


def rows_after_keeping(rows: Tensor, kept: Tensor, candidates: int) -> Tensor:
    """Like :func:`rows_after`, for tokens that were kept while the others were fused into one token after them.

    Args:
        rows: int64 ``[B, patches]``: the token that contains each patch before it.
        kept: int ``[B, K]``.
        candidates: N.

    Returns:
        int64 ``[B, patches]``.
    """
    count = kept.shape[1]
    fused = torch.full((kept.shape[0], candidates), count, device=rows.device)
    places = torch.arange(count, device=rows.device).expand(kept.shape[0], -1)
    return fused.scatter(1, kept.long(), places).gather(1, rows)
