"""Base class of methods that track token sizes: patches per token (ToMe, arXiv 2210.09461, section 3)."""

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
    """Merges tokens into their mean weighted by size; the method's options have ``proportional_attention``."""

    fuses = False
    options: Any

    @classmethod
    def carries_state(cls, options: msgspec.Struct, pools: bool) -> bool:
        """Always true: the state holds token sizes."""
        return True

    @classmethod
    def serves_pooling(cls, options: msgspec.Struct) -> bool:
        """Always true: every patch is in a token."""
        return True

    def bind(self, model: Any) -> None:
        """See :meth:`TokenReducer.bind`."""
        self.pools = backbone_of(model).pools(model)

    def start(self, x: Tensor) -> TokenState:
        """If the head pools, tracks the token of each patch; without sizes, all tokens have size 1."""
        return TokenState(rows=every_patch(x, self.prefix) if self.pools else None)

    def key_bias(self, state: TokenState) -> Tensor | None:
        """log(size), and 0 for the prefix, so that a token attracts as much attention as its patches did together.

        ``None`` while all sizes are 1.
        """
        if state.sizes is None or not self.options.proportional_attention:
            return None
        return F.pad(state.sizes.log(), (self.prefix, 0))[:, None, None]

    def merged(
        self, x: Tensor, choice: Tensor, evidence: tuple[Tensor, ...], state: TokenState
    ) -> tuple[Tensor, Tensor, TokenState]:
        """Applies a choice; the result is what :meth:`forward` returns.

        Args:
            x: ``[B, prefix + N, C]``.
            choice: int32 ``[B, 2N - K]``, of kind ``merge``.
            evidence: Values that the choice is based on; see
                :func:`~evit_deploy.tokens.operators.token_merge.token_merge`.
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
        """If the head pools, copies each token to the positions of its patches.

        The mean over patches is then the mean over tokens weighted by size. Other kinds of pooling get the same input
        as if each merged token had been computed once per patch.
        """
        return x if state.rows is None else patches_back(x, state.rows, self.prefix)
