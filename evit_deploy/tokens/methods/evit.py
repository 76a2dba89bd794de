"""EViT: "Not All Patches are What You Need" (ICLR 2022, arXiv 2202.07800), algorithm 1.

Scores (equation 2): softmax of q_cls · Kᵀ · d^-½ over all tokens, prefix columns dropped, mean over heads. The main
attention is never read out: scores have their own row of the attention map, so that fused attention kernels stay fused.
"""

import torch
from torch import Tensor

from evit_deploy.tokens import operator
from evit_deploy.tokens.op import precise
from evit_deploy.tokens.reducer import TokenReducer


class EViT(TokenReducer):
    """Keeps the tokens that the class token attends to most and fuses the rest by the same attention."""

    def scores(self, x: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The attention that the class token pays to each candidate; see :func:`class_scores`."""
        return class_scores(q, k, self.scale, self.prefix)


def class_scores(q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    """Mean over heads of the attention that the class token pays to each candidate.

    Args:
        q: Queries ``[B, N, H, d]`` (after q_norm); only token 0 is read.
        k: Keys ``[B, N, H, d]`` (after k_norm).
        scale: Factor on the logits, d^-½.
        prefix: Tokens in front that are no candidates; their share of the softmax is dropped, not redistributed.

    Returns:
        FP32 ``[B, N - prefix]`` (FP64 from FP64 inputs); a row sums to less than 1.
    """
    if operator.takes_scores(q, k):
        return torch.ops.evit.class_scores(q[:, :1], k, scale, prefix)[0]
    # A product and a sum, not a matmul: K keeps the layout in which the projection left it, nothing is transposed.
    logits = (precise(q[:, :1]) * precise(k)).sum(-1) * scale
    return logits.softmax(dim=1)[:, prefix:].mean(-1)
