"""EViT: "Not All Patches are What You Need" (ICLR 2022, arXiv 2202.07800), algorithm 1."""

from torch import Tensor

from evit_deploy.tokens.op import class_scores, token_reorg
from evit_deploy.tokens.reduce import TokenReducer


class EViT(TokenReducer):
    """Keeps the tokens the class token attends to most and fuses the rest by the same attention."""

    def forward(self, x: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """See :meth:`TokenReducer.forward`."""
        assert self.plan.keep is not None
        scores = class_scores(q, k, self.scale, self.prefix)
        return token_reorg(x, scores, self.plan.keep, self.plan.fused, self.prefix)
