"""``merge``: an EViT that needs no training. Tokens that are alike become one, and what is attended to stays as it is.

It takes from three papers what helps weights that were never trained with fewer tokens: the class attention that EViT
ranks by (arXiv 2202.07800), sized tokens and proportional attention of ToMe (arXiv 2210.09461), and at few locations
the counts of a plan, which are the same for every image.

To lose token i in token j changes what the class token sees by about a_i · ‖v_i − v_j‖, where a_i is its attention to
all patches in i. So each token looks for the most similar key among those that are attended to more, and its worth is

    sqrt(s_i · a_i) · (1 − max over j of cos(k_i, k_j))        j with s_j · a_j > s_i · a_i

with s patches in it. The K of the highest worth stay; each of the others joins the most similar that stays. Of tokens
that are alike only the one that is attended to most finds no other, so that one of them always stays.
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
    """Lets tokens that are little attended to, or like others, join the most similar token that stays."""

    score_name = "worth"

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """What it takes.

        Args:
            proportional_attention: Whether log(size) is added to the attention logits of the keys.
        """

        proportional_attention: bool = True

    options: Options

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: Any, shape: ModelShape, progress: float) -> TokenPlan:
        """See :meth:`TokenReducer.plan_for`; where no locations are given, :func:`merge_locations`."""
        if spec.locations is None:
            spec = msgspec.structs.replace(spec, locations=merge_locations(shape.depth))
        return make_plan(
            msgspec.structs.replace(spec, fuse=False), prefix=shape.prefix, patches=shape.patches, depth=shape.depth,
            cost=shape.cost, progress=progress, merging=True,
        )  # fmt: skip

    @classmethod
    def label(cls, spec: TokenSpec, options: Any) -> str:
        """The keep rates, and whether attention is not proportional."""
        text = super().label(spec, options)
        return text if options.proportional_attention else f"{text}-no-proportional"

    @classmethod
    def margin(cls, scores: Any, exact: Any, choice: np.ndarray, row: BlockPlan) -> np.ndarray:
        """See :meth:`TokenReducer.margin`.

        Which tokens are attended to more than another can be within rounding too; then its worth lies between what it
        is with and without them.
        """
        assert row.keep is not None
        weight, candidates = exact[0], exact[0].shape[1]
        low, true = (cosines(found[1], candidates) for found in (scores, exact))
        logs = _logarithm(weight)
        more = logs[:, None, :] - logs[:, :, None]  # of j over i
        doubt = rounding_of(_logarithm(scores[0]), logs)
        highest = _worth(weight, true, more > doubt)
        lowest = _worth(weight, true, (more > -doubt) & ~np.eye(candidates, dtype=bool))
        rounding = rounding_of(_worth(scores[0], low, more > 0), _worth(weight, true, more > 0))
        above, below = (_boundary(worth, row.keep) for worth in (highest, lowest))
        clear = np.maximum(np.maximum(lowest - above, below - highest), 0) / rounding
        return join_margin(clear, low, true, choice, row.keep)

    @classmethod
    def nearest_choice(cls, choice: np.ndarray, exact: Any, row: BlockPlan) -> np.ndarray:
        """See :meth:`TokenReducer.nearest_choice`; besides, the least clear of those that move joins another."""
        assert row.keep is not None
        weight = exact[0]
        similarity = cosines(exact[1], weight.shape[1])
        worth = _worth(weight, similarity, weight[:, None, :] > weight[:, :, None])
        return nearest_join(choice, worth, similarity, row.keep)

    @classmethod
    def shown_scores(cls, scores: Any, prefix: int) -> np.ndarray:
        """See :meth:`TokenReducer.shown_scores`: the worth that is ranked by."""
        weight = scores[0]
        return _worth(weight, cosines(scores[1], weight.shape[1]), weight[:, None, :] > weight[:, :, None])

    # ---- one block

    def scores(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState | None = None) -> Any:
        """What the class token's attention to all patches in each candidate is, and what similarity is measured on.

        Args:
            x: See :meth:`TokenReducer.scores`.
            q: See :meth:`TokenReducer.scores`.
            k: See :meth:`TokenReducer.scores`.
            state: Sizes.

        Returns:
            FP32 ``[B, N]``, and the mean of the keys over heads, FP32 ``[B, N, d]``.
        """
        # Which tokens merge has no gradient, so nothing on the way there needs one.
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
    """After each of the first four sixths of the blocks (2, 4, 6, 8 of 12): without training earlier than EViT's."""
    return tuple(sorted({depth * i // 6 for i in (1, 2, 3, 4)} - {0}))


def worth(weight: Tensor, metric: Tensor) -> Tensor:
    """sqrt(weight) · (1 − the highest cosine to one of higher weight), which counts −1 where there is none.

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
    """:func:`worth` in FP64, where ``more`` says at ``[n, i, j]`` whether j may stand in for i."""
    best = np.where(more, similarity, -1.0).max(axis=-1)
    return np.sqrt(weight.astype(np.float64)) * np.maximum(1 - best, 0)


def _boundary(worths: np.ndarray, keep: int) -> np.ndarray:
    """Between the last that stays and the first that does not, ``[n, 1]``."""
    ranked = -np.sort(-worths, axis=1)
    return ranked[:, keep - 1 : keep + 1].mean(axis=1, keepdims=True)


def _logarithm(weight: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(weight.astype(np.float64), _TINY))
