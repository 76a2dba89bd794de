"""Methods whose tokens have sizes: how many patches each stands for (ToMe, arXiv 2210.09461, section 3)."""

from typing import Any

import msgspec
import torch
from torch import Tensor
from torch.nn import functional as F

from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.operators.token_merge import token_merge
from evit_deploy.tokens.operators.token_reorg import precise
from evit_deploy.tokens.reducer import TokenReducer
from evit_deploy.tokens.state import TokenState, every_patch, patches_back, rows_after


class SizedReducer(TokenReducer):
    """Merges tokens into means by size; its options have ``proportional_attention``."""

    fuses = False
    options: Any

    @classmethod
    def carries_state(cls, options: msgspec.Struct, pools: bool) -> bool:
        """Always: sizes."""
        return True

    @classmethod
    def serves_pooling(cls, options: msgspec.Struct) -> bool:
        """Every patch is in some token."""
        return True

    def bind(self, model: Any) -> None:
        """See :meth:`TokenReducer.bind`."""
        self.pools = backbone_of(model).pools(model)

    def start(self, x: Tensor) -> TokenState:
        """Where the head pools, every patch is in its own token; no sizes means that all are 1."""
        return TokenState(rows=every_patch(x, self.prefix) if self.pools else None)

    def key_bias(self, state: TokenState) -> Tensor | None:
        """log(size), 0 for the prefix: attention as if all patches of a token were there. Nothing while all are 1."""
        if state.sizes is None or not self.options.proportional_attention:
            return None
        return F.pad(state.sizes.log(), (self.prefix, 0))[:, None, None]

    def merged(
        self, x: Tensor, choice: Tensor, evidence: tuple[Tensor, ...], state: TokenState
    ) -> tuple[Tensor, Tensor, TokenState]:
        """What :meth:`forward` returns, when it has chosen.

        Args:
            x: ``[B, prefix + N, C]``.
            choice: int32 ``[B, 2N - K]``, of kind ``merge``.
            evidence: What the choice was made by, see :func:`~evit_deploy.tokens.operators.token_merge.token_merge`.
            state: Sizes and rows before the merge.
        """
        keep, sizes = self.plan.keep, state.sizes
        assert keep is not None
        if sizes is None:
            sizes = torch.ones(x.shape[0], x.shape[1] - self.prefix, dtype=precise(x[:1, :0]).dtype, device=x.device)
        x, sizes = token_merge(x, sizes, choice, evidence, keep, self.prefix)
        rows = None if state.rows is None else rows_after(state.rows, choice, keep)
        return x, choice, state._replace(sizes=sizes, rows=rows)

    def finish(self, x: Tensor, state: TokenState) -> Tensor:
        """Where the head pools, each patch gets its token, so that it pools by size; all of them have gone through it.

        The mean over patches is then the mean over tokens weighted by size, and any other way of pooling sees what a
        model would that had computed the merged tokens once for each of their patches.
        """
        return x if state.rows is None else patches_back(x, state.rows, self.prefix)
