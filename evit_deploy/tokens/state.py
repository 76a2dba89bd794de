"""What a method carries from block to block beside the tokens.

The state travels as a value: a block takes it and gives a new one. Nothing is written to a module in a forward pass, so
that an export, a compiled graph and recomputed activations see plain tensors of static shapes.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from evit_deploy.tokens.operators.token_reorg import rows_of


class TokenState(NamedTuple):
    """State of one forward pass; ``None`` where the method does not use a field.

    Args:
        sizes: FP32 ``[B, N]``: how many patches each token behind the prefix stands for.
        rows: int64 ``[B, patches]``: the token behind the prefix that each patch is in; of methods that lose no patch.
        attention: FP32 ``[B, N + M]``: global class attention of the tokens, then of those that wait.
        aside: ``[B, M, C]``: tokens that wait while others are updated.
        representative: ``[B, 1, C]``: the token that stands for those that wait, as it entered the block.
        mask: ``[B, N]``: 1 for tokens that are kept, 0 for those that are only masked while training.
        decisions: Of each location so far, what the method's loss has to know.
    """

    sizes: Tensor | None = None
    rows: Tensor | None = None
    attention: Tensor | None = None
    aside: Tensor | None = None
    representative: Tensor | None = None
    mask: Tensor | None = None
    decisions: tuple[Tensor, ...] = ()


class TokenBlocks(nn.Sequential):
    """The blocks of a model whose method has state: every one is reduced, and hands the state on to the next.

    Parameter names are those of the container that it replaces.

    Args:
        blocks: Reduced blocks; called with ``state=`` they give tokens and state.
        replaced: The container; kept, so that it can be put back.
    """

    def __init__(self, blocks: list[nn.Module], replaced: nn.Module) -> None:
        super().__init__(*blocks)
        self.replaced = (replaced,)  # in a tuple, where nn.Module does not look for children
        self.checkpointing = False
        """Whether a block's activations are computed again on the way back instead of being kept."""
        self.train(replaced.training)

    def carry(self, x: Tensor) -> tuple[Tensor, TokenState]:
        """Runs all blocks.

        Args:
            x: ``[B, prefix + patches, C]``.

        Returns:
            What the model's last norm sees, and the state behind the last block.
        """
        blocks: list[Any] = list(self)
        state = blocks[0].reducer.start(x)
        again = self.checkpointing and torch.is_grad_enabled()
        for block in blocks:
            # A call, so that what an exporter or a profiler sees carries the block's name.
            found: Any = checkpoint(block, x, state=state, use_reentrant=False) if again else block(x, state=state)
            x, state = found
        return blocks[-1].reducer.finish(x, state), state

    def forward(self, input: Tensor) -> Tensor:
        """See :meth:`carry`; gives the tokens alone."""
        return self.carry(input)[0]


def every_patch(x: Tensor, prefix: int) -> Tensor:
    """Returns the rows before the first location: each patch is in its own token.

    Args:
        x: ``[B, prefix + patches, C]``.
        prefix: Tokens in front.

    Returns:
        int64 ``[B, patches]``.
    """
    return torch.arange(x.shape[1] - prefix, device=x.device).expand(x.shape[0], -1)


def rows_after(rows: Tensor, choice: Tensor, keep: int) -> Tensor:
    """Which token each patch is in once tokens have merged.

    Args:
        rows: int64 ``[B, patches]``: the token that each was in.
        choice: Of kind ``merge``, see :mod:`evit_deploy.tokens.choices`.
        keep: How many tokens stay.

    Returns:
        int64 ``[B, patches]``.
    """
    candidates = (choice.shape[1] + keep) // 2
    choice = choice.long()
    staying = torch.arange(keep, device=rows.device).expand(rows.shape[0], -1)
    places = torch.cat([staying, choice[:, candidates:]], 1)
    return torch.empty_like(places).scatter(1, choice[:, :candidates], places).gather(1, rows)


def patches_back(x: Tensor, rows: Tensor, prefix: int) -> Tensor:
    """Gives every patch a copy of the token that it is in, so that a head that pools sees as many as there were.

    Args:
        x: ``[B, prefix + N, C]``.
        rows: int64 ``[B, patches]``.
        prefix: Tokens in front.

    Returns:
        ``[B, prefix + patches, C]``.
    """
    return torch.cat([x[:, :prefix], rows_of(x, rows, prefix)], 1)


def rows_after_keeping(rows: Tensor, kept: Tensor, candidates: int) -> Tensor:
    """The same where tokens were kept, and the others fused into one behind them.

    Args:
        rows: int64 ``[B, patches]``: the token that each was in.
        kept: int ``[B, K]``.
        candidates: N.

    Returns:
        int64 ``[B, patches]``.
    """
    count = kept.shape[1]
    fused = torch.full((kept.shape[0], candidates), count, device=rows.device)
    places = torch.arange(count, device=rows.device).expand(kept.shape[0], -1)
    return fused.scatter(1, kept.long(), places).gather(1, rows)
