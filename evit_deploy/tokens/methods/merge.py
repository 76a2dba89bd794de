"""``merge``: a variant of EViT that needs no training. It merges similar tokens and keeps the most attended ones.

It combines ideas that help weights which were not trained with fewer tokens: ranking by class attention, as in EViT
(arXiv 2202.07800); token sizes and proportional attention, as in ToMe (arXiv 2210.09461); and a few locations with
fixed token counts, the same for every image.

Merging token i into token j changes the class token's attention output by about a_i · ‖v_i − v_j‖, where a_i is its
attention to all patches in i. Each token is therefore matched to the most similar key among the tokens with more
attention, and its worth is

    sqrt(s_i · a_i) · (1 − max over j of cos(k_i, k_j))        j with s_j · a_j > s_i · a_i

where s is a token's number of patches. The K tokens of highest worth are kept; each of the others joins the most
similar kept token. In a group of similar tokens, only the one with the most attention has no match, so that one of them
is always kept.
"""

from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from evit_deploy.tokens.choices import rounding_of
from evit_deploy.tokens.joining import cosines, in_full, join_margin, nearest_join, nearest_kept
from evit_deploy.tokens.methods.evit import class_scores
from evit_deploy.tokens.operators.token_reorg import precise
from evit_deploy.tokens.plan import BlockPlan, ModelShape, TokenPlan, TokenSpec, make_plan
from evit_deploy.tokens.sized import SizedReducer
from evit_deploy.tokens.state import TokenState

_TINY = float(np.finfo(np.float32).tiny)


class Merge(SizedReducer):
    """Merges tokens that get little attention or resemble others into the most similar kept token."""

    score_name = "worth"

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """Options of the method.

        Args:
            proportional_attention: Whether log(size) is added to the attention logits of the keys.
        """

        proportional_attention: bool = True

    options: Options

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: Any, shape: ModelShape, progress: float) -> TokenPlan:
        """See :meth:`TokenReducer.plan_for`; the default locations are :func:`merge_locations`."""
        if spec.locations is None:
            spec = msgspec.structs.replace(spec, locations=merge_locations(shape.depth))
        return make_plan(
            msgspec.structs.replace(spec, fuse=False), prefix=shape.prefix, patches=shape.patches, depth=shape.depth,
            cost=shape.cost, progress=progress, merging=True,
        )  # fmt: skip

    @classmethod
    def label(cls, spec: TokenSpec, options: Any) -> str:
        """The keep rates, with ``-no-proportional`` if attention is not proportional."""
        text = super().label(spec, options)
        return text if options.proportional_attention else f"{text}-no-proportional"

    @classmethod
    def margin(cls, scores: Any, exact: Any, choice: np.ndarray, row: BlockPlan) -> np.ndarray:
        """See :meth:`TokenReducer.margin`.

        Rounding can also decide which tokens get more attention than a given one; the worth of that token then lies
        between its values with and without them.
        """
        assert row.keep is not None
        weight, candidates = exact[0], exact[0].shape[1]
        low, true = (cosines(found[1], candidates) for found in (scores, exact))
        logs = _logarithm(weight)
        more = logs[:, None, :] - logs[:, :, None]  # how much more j gets than i
        doubt = rounding_of(_logarithm(scores[0]), logs)
        highest = _worth(weight, true, more > doubt)
        lowest = _worth(weight, true, (more > -doubt) & ~np.eye(candidates, dtype=bool))
        rounding = rounding_of(_worth(scores[0], low, more > 0), _worth(weight, true, more > 0))
        above, below = (_boundary(worth, row.keep) for worth in (highest, lowest))
        clear = np.maximum(np.maximum(lowest - above, below - highest), 0) / rounding
        return join_margin(clear, low, true, choice, row.keep)

    @classmethod
    def nearest_choice(cls, choice: np.ndarray, exact: Any, row: BlockPlan) -> np.ndarray:
        """See :meth:`TokenReducer.nearest_choice`; the least clear moving token also joins another."""
        assert row.keep is not None
        weight = exact[0]
        similarity = cosines(exact[1], weight.shape[1])
        worth = _worth(weight, similarity, weight[:, None, :] > weight[:, :, None])
        return nearest_join(choice, worth, similarity, row.keep)

    @classmethod
    def shown_scores(cls, scores: Any, prefix: int) -> np.ndarray:
        """See :meth:`TokenReducer.shown_scores`: the worth of each token."""
        weight = scores[0]
        return _worth(weight, cosines(scores[1], weight.shape[1]), weight[:, None, :] > weight[:, :, None])

    # ---- one block

    def scores(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState | None = None) -> Any:
        """The class token's attention to all patches in each candidate, and the vectors compared for similarity.

        Args:
            x: See :meth:`TokenReducer.scores`.
            q: See :meth:`TokenReducer.scores`.
            k: See :meth:`TokenReducer.scores`.
            state: State with the token sizes.

        Returns:
            FP32 ``[B, N]``, and the mean of the keys over heads, FP32 ``[B, N, d]``.
        """
        # The choice of tokens has no gradient, so its inputs are detached.
        weight = class_scores(q.detach(), k.detach(), self.scale, self.prefix)
        if state is not None and state.sizes is not None:
            weight = weight * state.sizes
        return weight, precise(k[:, self.prefix :].detach()).mean(2)

    def forward(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, Tensor, TokenState]:  # type: ignore[override]
        """See :meth:`TokenReducer.forward`."""
        keep = self.plan.keep
        assert keep is not None
        weight, metric = self.scores(x, q, k, state)
        choice = self.given if self.given is not None else nearest_kept(metric, worth(weight, metric), keep, 0)
        return self.merged(x, choice, (weight, metric), state)


def merge_locations(depth: int) -> tuple[int, ...]:
    """After each of the first four sixths of the blocks (2, 4, 6, 8 of 12), earlier than EViT's default."""
    return tuple(sorted({depth * i // 6 for i in (1, 2, 3, 4)} - {0}))


def worth(weight: Tensor, metric: Tensor) -> Tensor:
    """sqrt(weight) · (1 − the highest cosine to a token of higher weight); the cosine is −1 if there is no such token.

    Args:
        weight: ``[B, N]``, at least 0.
        metric: ``[B, N, d]``.

    Returns:
        ``[B, N]``, at least 0.
    """
    unit = metric / metric.norm(dim=-1, keepdim=True).clamp_min(_TINY)
    with in_full(metric):
        similarity = unit @ unit.transpose(1, 2)
    more = weight.unsqueeze(1) > weight.unsqueeze(2)
    best = torch.where(more, similarity, -1.0).amax(-1)
    return weight.sqrt() * (1 - best).clamp_min(0)


def _worth(weight: np.ndarray, similarity: np.ndarray, more: np.ndarray) -> np.ndarray:
    """:func:`worth` in FP64; ``more`` is true at ``[n, i, j]`` if token j may replace token i."""
    best = np.where(more, similarity, -1.0).max(axis=-1)
    return np.sqrt(weight.astype(np.float64)) * np.maximum(1 - best, 0)


def _boundary(worths: np.ndarray, keep: int) -> np.ndarray:
    """Mean worth of the last kept token and the first that is not kept, ``[n, 1]``."""
    ranked = -np.sort(-worths, axis=1)
    return ranked[:, keep - 1 : keep + 1].mean(axis=1, keepdims=True)


def _logarithm(weight: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(weight.astype(np.float64), _TINY))
