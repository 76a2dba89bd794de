"""Baselines for EViT at equal token counts: the first tokens, random tokens, and the lowest-scored tokens."""

import msgspec
import torch
from torch import Tensor

from evit_deploy.tokens.methods.evit import class_scores
from evit_deploy.tokens.operators.token_reorg import reorganize, select
from evit_deploy.tokens.reducer import TokenReducer


class Slice(TokenReducer):
    """Keeps the first tokens without scoring or gathering; EViT's extra time is the cost of the reorganization."""

    exports = False
    comparison_only = True

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        assert self.plan.keep is not None
        kept = torch.arange(self.plan.keep, dtype=torch.int32, device=x.device).expand(len(x), -1)
        return x[:, : self.plan.tokens_out], kept


class _Reordered(TokenReducer):
    """Computes EViT's scores, but ranks tokens differently."""

    exports = False
    comparison_only = True
    score_name = "class attention"

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """EViT's scores; see :func:`~evit_deploy.tokens.methods.evit.class_scores`."""
        return class_scores(q, k, self.scale, self.prefix)


class RandomDrop(_Reordered):
    """Keeps random tokens, drawn for every image and call; fuses the rest by their scores, as EViT does."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Options of the method.

        Args:
            seed: Seed of the random numbers.
        """

        seed: int = 0

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        if not hasattr(self, "_generator"):
            assert isinstance(self.options, RandomDrop.Options)
            seed = 1000 * self.options.seed + self.plan.block  # every location draws its own numbers
            self._generator = torch.Generator().manual_seed(seed)
        candidates = x.shape[1] - self.prefix
        priority = torch.rand(len(x), candidates, generator=self._generator).to(x.device)
        return _reorganize_by(priority, self, x, q, k)


class InverseDrop(_Reordered):
    """Keeps the tokens with EViT's lowest scores: the strictest test of whether the scores are meaningful."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        return _reorganize_by(-self.scores(x, q, k), self, x, q, k)


def _reorganize_by(priority: Tensor, reducer: TokenReducer, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    assert reducer.plan.keep is not None
    kept = select(priority, reducer.plan.keep)
    scores = reducer.scores(x, q, k)
    return reorganize(x, scores, kept, reducer.plan.fused, reducer.prefix), kept.to(torch.int32)
