"""EViT: "Not All Patches are What You Need" (ICLR 2022, arXiv 2202.07800), algorithm 1, and fused-token variants.

Scores (equation 2): softmax of q_cls · Kᵀ · d^-½ over all tokens, prefix columns dropped, mean over heads. This row of
the attention map is computed separately instead of being read from the block's attention, so that fused attention
kernels can still be used.

The option ``squeeze`` is TPS: "Joint Token Pruning and Squeezing" (CVPR 2023, arXiv 2304.10716).
"""

from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor, nn

from evit_deploy.errors import InputError
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.choices import share_margin
from evit_deploy.tokens.joining import cosines, join_margin, nearest_join, nearest_kept
from evit_deploy.tokens.operators import torch_ops
from evit_deploy.tokens.operators.token_merge import token_merge
from evit_deploy.tokens.operators.token_reorg import precise
from evit_deploy.tokens.plan import BlockPlan, ModelShape, TokenPlan, TokenSpec, make_plan
from evit_deploy.tokens.reducer import TokenReducer
from evit_deploy.tokens.state import TokenState, every_patch, patches_back, rows_after, rows_after_keeping

_TINY = float(np.finfo(np.float32).tiny)


class EViT(TokenReducer):
    """Keeps the tokens that the class token attends to most and fuses the rest by the same attention."""

    score_name = "class attention"

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """How the tokens that are not kept are combined.

        Args:
            normalize: Whether the fused token is the mean Σ a·x / Σ a instead of the paper's sum Σ a·x, with attention
                a and token x.
            squeeze: Whether to keep one more token instead of a fused token. Every dropped token is then merged into
                the kept one with the highest cosine similarity (TPS); each token is the mean of its patches.
            sized: Whether a pooling head gets, at the position of every patch, the token that contains the patch. In
                its mean, a kept token then counts once and a fused token once per patch.
        """

        normalize: bool = False
        squeeze: bool = False
        sized: bool = False

        def __post_init__(self) -> None:
            if self.squeeze and self.normalize:
                raise ValueError("normalize changes the fused token, and squeeze has none")
            if self.squeeze and self.sized:
                raise ValueError("squeeze already counts the patches in every token: leave sized out")
            if self.sized and not self.normalize:
                raise ValueError(
                    "sized needs normalize=true: to count for as many patches as it holds, the fused token has to be "
                    "their mean; the sum is as much smaller as they have attention"
                )

    options: Options

    def __init__(self, plan: BlockPlan, prefix: int, scale: float, options: Any) -> None:
        super().__init__(plan, prefix, scale, options)
        if getattr(options, "normalize", False):  # subclasses may have other options
            self.exact = _Mean()

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: Any, shape: ModelShape, progress: float) -> TokenPlan:
        """See :meth:`TokenReducer.plan_for`.

        Raises:
            InputError: An option needs the fused token, but ``fuse`` is off.
        """
        if options.sized and not spec.fuse:
            raise InputError(
                "without a fused token there is no place for a patch that is dropped", where="options.sized",
                fix="Leave sized or fuse=False out, or take squeeze=true.",
            )  # fmt: skip
        if options.normalize and not spec.fuse:
            raise InputError(
                "normalize changes the fused token, and fuse=False removes it", where="options.normalize",
                fix="Leave one of the two out.",
            )  # fmt: skip
        return make_plan(
            spec, prefix=shape.prefix, patches=shape.patches, depth=shape.depth, cost=shape.cost, progress=progress,
            merging=options.squeeze,
        )  # fmt: skip

    @classmethod
    def carries_state(cls, options: Any, pools: bool) -> bool:
        """True with ``squeeze`` (token sizes), and with ``sized`` if the head pools (the token of every patch)."""
        return options.squeeze or (options.sized and pools)

    @classmethod
    def serves_pooling(cls, options: Any) -> bool:
        """True for the options with which no patch is lost."""
        return options.squeeze or options.sized

    @classmethod
    def label(cls, spec: TokenSpec, options: Any) -> str:
        """The keep rates and the enabled options."""
        chosen = [name for name in options.__struct_fields__ if getattr(options, name)]
        return "-".join([super().label(spec, options), *chosen])

    def bind(self, model: Any) -> None:
        """Stores whether the head pools, because the state then needs the token of every patch."""
        self.pools = backbone_of(model).pools(model)

    def scores(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState | None = None) -> Any:
        """The class token's attention to each candidate; see :func:`class_scores`.

        With ``squeeze`` also the tokens, because the choice also depends on their similarity.
        """
        scores = class_scores(q, k, self.scale, self.prefix)
        return (scores, precise(x)) if self.options.squeeze else scores

    def start(self, x: Tensor) -> TokenState:
        """The initial state, in which every patch is its own token."""
        rows = every_patch(x, self.prefix) if self.pools else None
        sizes = None
        if self.options.squeeze:
            sizes = torch.ones(x.shape[0], x.shape[1] - self.prefix, dtype=precise(x).dtype, device=x.device)
        return TokenState(sizes=sizes, rows=rows)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState | None = None) -> tuple[Any, ...]:
        """See :meth:`TokenReducer.forward`."""
        assert self.plan.keep is not None
        if self.options.squeeze:
            assert state is not None
            return self._squeezed(x, class_scores(q, k, self.scale, self.prefix), state)
        scores = class_scores(q, k, self.scale, self.prefix)
        y, kept = self.reorganized(x, scores, self.plan.keep, self.plan.fused)
        if self.options.normalize:
            y = torch.cat([y[:, :-1], self.exact(y[:, -1:], scores, kept)], dim=1)
        if state is None:
            return y, kept
        assert state.rows is not None
        return y, kept, state._replace(rows=rows_after_keeping(state.rows, kept, scores.shape[1]))

    def _squeezed(self, x: Tensor, scores: Tensor, state: TokenState) -> tuple[Tensor, Tensor, TokenState]:
        keep, sizes, rows = self.plan.keep, state.sizes, state.rows
        assert keep is not None
        assert sizes is not None
        choice = self.given if self.given is not None else nearest_kept(x, scores, keep, self.prefix)
        y, sizes = token_merge(x, sizes, choice, (scores, x), keep, self.prefix)
        if rows is not None:
            rows = rows_after(rows, choice, keep)
        return y, choice, state._replace(sizes=sizes, rows=rows)

    def finish(self, x: Tensor, state: TokenState) -> Tensor:
        """If the head pools, copies each token to the positions of its patches."""
        return x if state.rows is None else patches_back(x, state.rows, self.prefix)

    @classmethod
    def margin(cls, scores: Any, exact: Any, choice: np.ndarray, row: BlockPlan) -> np.ndarray:
        """See :meth:`TokenReducer.margin`; with ``squeeze``, includes which kept token a dropped one joins.

        That also changes if the kept token may be dropped, or if a more similar one may be kept.
        """
        if row.choice != "merge":
            return super().margin(scores, exact, choice, row)
        assert row.keep is not None
        clear = share_margin(scores[0], exact[0], row.keep)
        candidates = clear.shape[1]
        return join_margin(clear, cosines(scores[1], candidates), cosines(exact[1], candidates), choice, row.keep)

    @classmethod
    def nearest_choice(cls, choice: np.ndarray, exact: Any, row: BlockPlan) -> np.ndarray:
        """See :meth:`TokenReducer.nearest_choice`; with ``squeeze``, the least clear join changes as well."""
        if row.choice != "merge":
            return super().nearest_choice(choice, exact, row)
        assert row.keep is not None
        return nearest_join(choice, exact[0], cosines(exact[1], exact[0].shape[1]), row.keep)


class _Mean(nn.Module):
    """Divides a fused token by the total attention to its parts; a module, so that exported files divide in FP32."""

    def forward(self, fused: Tensor, scores: Tensor, kept: Tensor) -> Tensor:
        """Takes the fused token ``[B, 1, C]``, scores ``[B, N]`` and kept int ``[B, K]``; returns ``[B, 1, C]``."""
        # Kept scores are overwritten, because subtracting them from the total would cancel.
        rest = scores.scatter(1, kept.long(), 0.0).sum(dim=1).clamp_min(_TINY)
        return (fused / rest[:, None, None]).to(fused.dtype)


def class_scores(q: Tensor, k: Tensor, scale: float, prefix: int) -> Tensor:
    """Mean over heads of the class token's attention to each candidate.

    Args:
        q: Queries ``[B, N, H, d]`` (after q_norm); only token 0 is read.
        k: Keys ``[B, N, H, d]`` (after k_norm).
        scale: Factor on the logits, d^-½.
        prefix: Tokens in front that are not candidates; their share of the softmax is dropped, not redistributed.

    Returns:
        FP32 ``[B, N - prefix]`` (FP64 from FP64 inputs); a row sums to less than 1.
    """
    if torch_ops.takes_scores(q, k):
        return torch.ops.evit.class_scores(q[:, :1], k, scale, prefix)[0]
    # A product and a sum instead of a matmul: K keeps the projection's layout, without a transpose.
    logits = (precise(q[:, :1]) * precise(k)).sum(-1) * scale
    return logits.softmax(dim=1)[:, prefix:].mean(-1)
