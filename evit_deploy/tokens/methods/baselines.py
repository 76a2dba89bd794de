"""What EViT is measured against, at equal token counts: no choice at all, a random one, and the worst one."""

import msgspec
import torch
from torch import Tensor

from evit_deploy.tokens.methods.evit import class_scores
from evit_deploy.tokens.operators.token_reorg import reorganize, select
from evit_deploy.tokens.reducer import TokenReducer


class Slice(TokenReducer):
    """The first tokens stay, nothing is scored or gathered: what the reorganization itself costs is the rest."""

    exports = False
    comparison_only = True

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        assert self.plan.keep is not None
        kept = torch.arange(self.plan.keep, dtype=torch.int32, device=x.device).expand(len(x), -1)
        return x[:, : self.plan.tokens_out], kept


class _Reordered(TokenReducer):
    """Has EViT's scores, and keeps other tokens than they say."""

    exports = False
    comparison_only = True
    score_name = "class attention"

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """EViT's, see :func:`~evit_deploy.tokens.methods.evit.class_scores`."""
        return class_scores(q, k, self.scale, self.prefix)


class RandomDrop(_Reordered):
    """Keeps tokens at random, another choice for every image and call; fuses the rest by their scores, as EViT does."""

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """``seed``: where the random numbers start."""

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
    """Keeps the tokens with the lowest scores of EViT: the sharpest check that the score means something."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        return _reorganize_by(-self.scores(x, q, k), self, x, q, k)


def _reorganize_by(priority: Tensor, reducer: TokenReducer, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    assert reducer.plan.keep is not None
    kept = select(priority, reducer.plan.keep)
    scores = reducer.scores(x, q, k)
    return reorganize(x, scores, kept, reducer.plan.fused, reducer.prefix), kept.to(torch.int32)
