"""DynamicViT (NeurIPS 2021, arXiv 2106.02034): small predictors, trained with the model, choose the patches to keep.

Some blocks are preceded by a predictor. In deployment, the patches with the highest scores are kept, in order of their
scores, and the others are removed. In training mode, all patches are kept: each location draws a decision for every
patch (:func:`draw`), and dropped patches are masked from then on. The predictors' losses are in
``training/dynamicvit.py``.

Counts: the s-th location keeps ``int(patches · ρ^s)``, computed exactly for the rate as a decimal number. The released
code uses floats. They give the same counts for every rate of two decimals at 196 and 576 patches, the sizes it was
released for; at some other sizes they are one lower (48 instead of 49 of 100 at .7²). With one rate per location, the
s-th location keeps ``int(patches · ρ₁ · … · ρ_s)``.
"""

import logging
import math
from fractions import Fraction
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from evit_deploy.errors import InputError
from evit_deploy.tokens.choices import linear_margin
from evit_deploy.tokens.operators.token_reorg import precise
from evit_deploy.tokens.plan import BlockPlan, ModelShape, TokenPlan, TokenSpec, scheduled_rate
from evit_deploy.tokens.reducer import TokenReducer, own_weights
from evit_deploy.tokens.state import TokenState

_LOG = logging.getLogger(__name__)


class DynamicViT(TokenReducer):
    """Keeps the patches that a predictor scores highest and removes the others without a fused token."""

    fuses: ClassVar[bool] = False
    needs_class_token: ClassVar[bool] = False
    needs_own_weights: ClassVar[bool] = True
    learns_from_dense: ClassVar[bool] = True
    own_parameters: ClassVar[tuple[str, ...]] = ("score_predictor.",)
    score_name: ClassVar[str] = "predicted value"

    @classmethod
    def unsupported(cls, model: Any) -> list[str]:
        """See :meth:`TokenReducer.unsupported`."""
        return [] if model.embed_dim % 4 == 0 else [f"its width, {model.embed_dim}, cannot be divided by 4"]

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """Decides token counts as described in the module; a location reduces its tokens before its attention."""
        stages = spec.resolve(shape.depth)
        if not spec.dense and any(rate == 1 for _, rate in stages):
            raise InputError(
                "a location of dynamicvit keeps everything", where="--keep-rate",
                seen=",".join(f"{rate:g}" for _, rate in stages), wanted="rates below 1, or 1 everywhere",
                fix="Leave that location out of --locations.",
            )  # fmt: skip
        shares = dict(zip((block for block, _ in stages), ratios(spec, shape.depth, progress), strict=True))
        candidates, blocks = shape.patches, []
        for block in range(shape.depth):
            keep, macs = None, 0
            if shares.get(block, 1) < 1:
                keep = int(shape.patches * shares[block])
                if keep < 1:
                    raise InputError(
                        f"no patch is left at block {block}", where="--keep-rate",
                        seen=f"{float(shares[block]):.3g} of {shape.patches} patches", wanted="at least one",
                        fix="Take a higher keep rate or fewer locations.",
                    )  # fmt: skip
                candidates, macs = keep, candidates * _predictor_macs(shape.width)
            tokens = shape.prefix + candidates
            blocks.append(BlockPlan(block, tokens, keep, False, tokens, method_macs=macs))
        return TokenPlan(shape.prefix, shape.patches, tuple(blocks), shape.cost)

    @classmethod
    def carries_state(cls, options: msgspec.Struct, pools: bool) -> bool:
        """Always true: a location reduces before its attention, and in training every block applies the mask."""
        return True

    @classmethod
    def attach(cls, model: Any, options: msgspec.Struct, plan: TokenPlan) -> None:
        """Adds a predictor for each location, with the weights that were loaded with the model's, or else new ones.

        Raises:
            InputError: The weights are for a different number of locations, or do not fit the model.
        """
        like = next(model.parameters())
        layers = Predictors([row.block for row in plan.locations], model.embed_dim).to(like.device, like.dtype)
        found = own_weights(model, cls)
        if found:
            _load(layers, {name.removeprefix("score_predictor."): value for name, value in found.items()})
        else:
            _LOG.warning(
                "no trained predictors came with these weights: new ones choose at random until they are trained"
            )
        model.score_predictor = layers.train(model.training)

    @classmethod
    def detach(cls, model: Any) -> None:
        """Removes the predictors; the next :meth:`attach` restores their weights."""
        if hasattr(model, "score_predictor"):
            weights = model.score_predictor.state_dict(prefix="score_predictor.")
            model.method_weights = getattr(model, "method_weights", {}) | weights
            del model.score_predictor

    @classmethod
    def margin(cls, scores: Any, exact: Any, choice: np.ndarray, row: BlockPlan) -> np.ndarray:
        """See :meth:`TokenReducer.margin`; the scores are logits, with an absolute rounding error."""
        assert row.keep is not None
        return linear_margin(scores, exact, row.keep)

    def bind(self, model: Any) -> None:
        """Finds the location's predictor."""
        blocks = model.score_predictor.blocks
        found = (model.score_predictor[blocks.index(self.plan.block)],) if self.plan.block in blocks else ()
        self._predictor: tuple[nn.Module, ...] = found

    def scores(self, x: Tensor, q: Any, k: Any, state: TokenState) -> Tensor:  # type: ignore[override]
        """The logit of keeping each patch minus that of dropping it, FP32 ``[B, N - prefix]``.

        The order is the same as by the log-probability that the paper sorts by, but the difference does not saturate.
        """
        return self._predictor[0](x[:, self.prefix :], state.mask)

    def forward(self, x: Tensor, q: Any, k: Any, state: TokenState) -> tuple[Any, ...]:  # type: ignore[override]
        """See :meth:`TokenReducer.forward`; ``q`` and ``k`` are not used."""
        assert self.plan.keep is not None
        return *self.reorganized(x, self.scores(x, q, k, state), self.plan.keep, fuse=False), state

    def start(self, x: Tensor) -> TokenState:
        """In training, starts with a mask that keeps every patch."""
        return TokenState(mask=x.new_ones(len(x), x.shape[1] - self.prefix).float()) if self.training else TokenState()

    def before(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Removes patches, or masks them in training."""
        if self.plan.keep is None:
            return x, state
        if state.mask is not None:
            mask = state.mask * draw(self.scores(x, None, None, state))
            return x, state._replace(mask=mask, decisions=(*state.decisions, mask))
        x, _, state = self(x, None, None, state)
        return x, state

    def keep_mask(self, state: TokenState) -> Tensor | None:
        """The mask, extended by the prefix, which is always kept."""
        return None if state.mask is None else F.pad(state.mask, (self.prefix, 0), value=1.0)

    @classmethod
    def idle(cls, row: BlockPlan) -> bool:
        """See :meth:`TokenReducer.idle`; patches are removed before the attention."""
        return row.keep is None

    def between(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Does nothing: the location has reduced its tokens before its attention."""
        return x, state


class Predictor(nn.Module):
    """Scores each patch from its features and the mean of the kept patches; parameters have their released names.

    Args:
        width: C, channels of a token; a multiple of 4.
    """

    flat: bool = False
    """Whether linear layers get their input as 2-D ``[B·N, C]``; set by the exporter."""

    def __init__(self, width: int) -> None:
        super().__init__()
        # As in the released code, the norm has PyTorch's default eps, independent of the model's.
        self.in_conv = nn.Sequential(nn.LayerNorm(width, eps=1e-5), nn.Linear(width, width), nn.GELU())
        self.out_conv = nn.Sequential(
            nn.Linear(width, width // 2), nn.GELU(), nn.Linear(width // 2, width // 4), nn.GELU(),
            nn.Linear(width // 4, 2),
        )  # fmt: skip

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Computes the logit of keeping minus that of dropping.

        Args:
            x: Patches ``[B, N, C]``.
            mask: ``[B, N]``: 1 for patches kept so far; ``None`` if all are kept.

        Returns:
            ``[B, N]``, at least FP32.
        """
        patches, half = x.shape[1], x.shape[2] // 2
        x = self._patches(self.in_conv(self._rows(x)), patches)
        own, others = x[..., :half], x[..., half:]
        if mask is None:
            mean = others.mean(dim=1, keepdim=True)
        else:
            weights = mask.unsqueeze(-1).to(x.dtype)
            mean = (others * weights).sum(dim=1, keepdim=True) / weights.sum(dim=1, keepdim=True).clamp(min=1)
        x = self._rows(torch.cat([own, mean.expand(-1, patches, -1)], dim=-1))
        hidden, last = self.out_conv[:-1](x), self.out_conv[-1]
        # Computes one logit in full precision instead of the difference of two rounded ones.
        assert isinstance(last, nn.Linear)
        weight, bias = precise(last.weight), precise(last.bias)
        return self._patches((precise(hidden) * (weight[0] - weight[1])).sum(dim=-1) + (bias[0] - bias[1]), patches)

    def _rows(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1) if self.flat else x

    def _patches(self, rows: Tensor, patches: int) -> Tensor:
        return rows.unflatten(0, (-1, patches)) if self.flat else rows


class Predictors(nn.ModuleList):
    """A predictor for each location.

    Args:
        blocks: The locations.
        width: Channels of a token.
    """

    def __init__(self, blocks: list[int], width: int) -> None:
        super().__init__(Predictor(width) for _ in blocks)
        self.blocks = tuple(blocks)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # initialized like the models' layers
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.zeros_(layer.bias)


def _load(layers: Predictors, weights: dict[str, Tensor]) -> None:
    given = len({name.split(".")[0] for name in weights})
    if given != len(layers):
        raise InputError(
            "the number of locations is not the number of trained predictors", where="--locations", seen=len(layers),
            wanted=given,
        )  # fmt: skip
    try:
        layers.load_state_dict(weights)
    except RuntimeError as error:  # its lines name the tensors
        reasons = "; ".join(line.strip().rstrip(".") for line in str(error).splitlines()[1:4])
        raise InputError("the trained predictors do not fit the model", where="score_predictor", seen=reasons) from None


def _predictor_macs(width: int) -> int:
    """Multiply-adds of a predictor's linear layers for one patch."""
    return width * width + width * (width // 2) + (width // 2) * (width // 4) + (width // 4) * 2


def ratios(spec: TokenSpec, depth: int, progress: float = 1.0) -> list[Fraction]:
    """The fraction of all patches that is left after each location.

    Args:
        spec: The spec; each of its rates is a fraction of the patches before that location.
        depth: Number of blocks.
        progress: Position on the keep-rate schedule.
    """
    rates = [Fraction(repr(float(scheduled_rate(rate, progress)))) for _, rate in spec.resolve(depth)]
    return [math.prod(rates[: stage + 1], start=Fraction(1)) for stage in range(len(rates))]


def logistic_noise(like: Tensor) -> Tensor:
    """Draws the difference of two samples from the Gumbel distribution."""
    one, other = (torch.empty_like(like).exponential_().log() for _ in range(2))
    return other - one


def draw(scores: Tensor) -> Tensor:
    """Draws the patches to keep: hard Gumbel softmax of keeping and dropping at temperature 1.

    Args:
        scores: See :meth:`DynamicViT.scores`.

    Returns:
        0 or 1 for each patch, with the gradient of the soft sample (straight-through estimator).
    """
    soft = (scores + logistic_noise(scores)).sigmoid()
    return (soft >= 0.5).to(soft.dtype) + (soft - soft.detach())
