"""Evo-ViT: "Slow-Fast Token Evolution for Dynamic Vision Transformer" (AAAI 2022, arXiv 2108.01390).

A stage begins by sorting the patches by their global class attention g. The first K are *informative*: they pass
through the blocks of the stage. The others wait and are put back when the next stage begins or after the last block, so
that no patch is lost and pooling heads use all of them. The plan defines the differences between blocks: a row with
``keep`` sorts, a row with ``aside`` has waiting tokens, and a row with ``ranks`` updates g.
"""

import copy
import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from evit_deploy.errors import InputError
from evit_deploy.tokens.methods.evit import class_scores
from evit_deploy.tokens.operators.token_reorg import precise
from evit_deploy.tokens.plan import BlockPlan, ModelShape, TokenPlan, TokenSpec, scheduled_rate
from evit_deploy.tokens.reducer import TokenReducer, own_weights
from evit_deploy.tokens.state import TokenState

_DEFAULT_RATE = 0.5


class EvoViT(TokenReducer):
    """Sorts the patches at the start of a stage; the first ones pass through its blocks, the others wait.

    g is the sum over heads of the class token's attention to a patch. The block before the first sorting sets it; later
    blocks replace it by the mean of its old value and their own attention, only for patches that take part. g is not
    updated after the last sorting.
    """

    fuses: ClassVar[bool] = False
    own_parameters: ClassVar[tuple[str, ...]] = ("norm_cls.", "head_cls.weight", "head_cls.bias")
    default_keep_rate: ClassVar[float | None] = _DEFAULT_RATE
    score_name: ClassVar[str] = "global class attention"

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """How waiting patches are updated, and how often patches are sorted.

        Args:
            representative: Whether the waiting patches are updated through a token that represents them, their mean
                weighted by g (the paper), or are left unchanged (the released DeiT models).
            layer_wise: Whether every block from the first location on sorts the patches again, as in the first part of
                the published training.
        """

        representative: bool = False
        layer_wise: bool = False

    options: Options

    def __init__(self, plan: BlockPlan, prefix: int, scale: float, options: msgspec.Struct) -> None:
        super().__init__(plan, prefix, scale, options)
        # Modules, so that their nodes in an exported file are named after the reducer.
        self.refresh, self.put_back, self.exact = _Refresh(prefix, scale), _PutBack(), _WeightedMean()

    @classmethod
    def unsupported(cls, model: Any) -> list[str]:
        """See :meth:`TokenReducer.unsupported`: distilled models have two classification tokens instead of one."""
        if hasattr(model, "dist_token"):
            return ["it is distilled: Evo-ViT ranks patches by one class token, and this model has two that classify"]
        return []

    @classmethod
    def attach(cls, model: Any, options: msgspec.Struct, plan: TokenPlan) -> None:
        """Restores the second head on the class token, if it was loaded with the weights; only training uses it."""
        if own_weights(model, cls):
            add_class_head(model)

    @classmethod
    def detach(cls, model: Any) -> None:
        """Removes that head; the next :meth:`attach` restores it."""
        for name in ("norm_cls", "head_cls"):
            if hasattr(model, name):
                weights = getattr(model, name).state_dict(prefix=f"{name}.")
                model.method_weights = getattr(model, "method_weights", {}) | weights
                delattr(model, name)

    @classmethod
    def carries_state(cls, options: msgspec.Struct, pools: bool) -> bool:
        """Always true: the state holds g and the waiting tokens."""
        return True

    @classmethod
    def serves_pooling(cls, options: msgspec.Struct) -> bool:
        """Always true: every patch is put back after the last block."""
        return True

    @classmethod
    def label(cls, spec: TokenSpec, options: msgspec.Struct) -> str:
        """``k0.5``, with ``-representative`` or ``-layer-wise`` if that option is set."""
        assert isinstance(options, EvoViT.Options)
        rates = spec.rates or (_DEFAULT_RATE,)
        asked = [name.replace("_", "-") for name in options.__struct_fields__ if getattr(options, name)]
        return "-".join(["k" + "-".join(f"{rate:g}" for rate in rates), *asked])

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """Decides every token count: in a stage, int(rate · P) of the P patches are informative.

        Locations are the blocks that begin a stage, by default ``depth // 3`` and ``2 · depth // 3``.

        Raises:
            InputError: The spec does not fit the model.
        """
        assert isinstance(options, EvoViT.Options)
        informative = _informative(spec, shape, progress)
        alone = shape.prefix + options.representative
        blocks, keep = [], shape.patches
        for block in range(shape.depth):
            begins = block in informative
            keep = informative.get(block, keep)
            if keep == shape.patches:
                blocks.append(BlockPlan(block, shape.prefix + keep, None, False, shape.prefix + keep))
                continue
            sorts = begins or options.layer_wise
            blocks.append(
                BlockPlan(
                    block, alone + keep, keep if sorts else None, sorts and options.representative, alone + keep,
                    aside=shape.patches - keep, choice_indices=shape.patches if sorts else None,
                )
            )  # fmt: skip
        sorting = [row.block for row in blocks if row.keep is not None]
        if sorting and sorting[0] == 0:
            raise InputError(
                "block 0 cannot sort its patches: no attention has been computed before it",
                where="locations", seen=0, wanted="blocks from 1 on",
            )  # fmt: skip
        ranked = range(sorting[0] - 1, sorting[-1]) if sorting else range(0)
        rows = tuple(msgspec.structs.replace(row, ranks=True) if row.block in ranked else row for row in blocks)
        return TokenPlan(shape.prefix, shape.patches, rows, shape.cost)

    def scores(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> Tensor:  # type: ignore[override]
        """g of all patches ``[B, patches]``."""
        assert state.attention is not None
        return state.attention

    def forward(  # type: ignore[override]
        self, x: Tensor, q: Tensor | None, k: Tensor | None, state: TokenState
    ) -> tuple[Tensor, Tensor, TokenState]:
        """Sorts all patches; the first K are kept, the others wait.

        Args:
            x: All tokens ``[B, prefix + patches, C]``.
            q: Not used, because sorting precedes the block's attention.
            k: Not used.
            state: State with g in ``attention``.

        Returns:
            Tokens ``[B, tokens_in, C]``, the order of all patches, int32 ``[B, patches]``, and the new state.
        """
        g, keep = state.attention, self.plan.keep
        assert g is not None
        assert keep is not None
        x, choice = self.reorganized(x, g, g.shape[1], fuse=False)
        g = g.gather(1, choice.long())
        x, waiting = x[:, : self.prefix + keep], x[:, self.prefix + keep :]
        stands_for_all = None
        if self.options.representative:
            stands_for_all = self.exact(waiting, g[:, keep:])
            x = torch.cat([x, stands_for_all], dim=1)
        return x, choice, state._replace(attention=g, aside=waiting, representative=stands_for_all)

    def before(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """At the start of a stage, puts the waiting patches back and sorts all patches."""
        if self.plan.keep is not None or not self.plan.aside:
            x, state = self._put_back(x, state)
        if self.plan.keep is not None:
            x, _, state = self(x, None, None, state)
        return x, state

    def between(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Updates g if a later block sorts by it."""
        if not self.plan.ranks:
            return x, state
        present = q.shape[1] - self.prefix - (state.representative is not None)
        return x, state._replace(attention=self.refresh(q, k, state.attention, present))

    def finish(self, x: Tensor, state: TokenState) -> Tensor:
        """Puts the waiting patches back; the patches are not in the image's order."""
        return self._put_back(x, state)[0]

    def _put_back(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        if state.aside is None:
            return x, state
        x = self.put_back(x, state.aside, state.representative)
        return x, state._replace(aside=None, representative=None)


def add_class_head(model: Any) -> None:
    """Adds the class token's head, a second head for training, to a model with a pooling head, in place.

    Weights that were loaded with the model's are used if their shapes fit; otherwise the head is initialized.

    Args:
        model: A model with a pooling head; if it already has the second head, nothing changes.
    """
    if hasattr(model, "head_cls"):
        return
    like, found = next(model.parameters()), own_weights(model, EvoViT)
    norm = copy.deepcopy(model.fc_norm if isinstance(model.norm, nn.Identity) else model.norm)
    norm.reset_parameters()
    head = nn.Linear(model.embed_dim, model.num_classes, device=like.device, dtype=like.dtype)
    nn.init.trunc_normal_(head.weight, std=0.02)
    nn.init.zeros_(head.bias)
    for name, layer in (("norm_cls", norm), ("head_cls", head)):
        weights = {key.removeprefix(f"{name}."): value for key, value in found.items() if key.startswith(f"{name}.")}
        if {key: value.shape for key, value in weights.items()} == {k: v.shape for k, v in layer.state_dict().items()}:
            layer.load_state_dict(weights)
        setattr(model, name, layer.train(model.training))


class _Refresh(nn.Module):
    """Updates g after a block.

    Args:
        prefix: Tokens in front of the patches.
        scale: Factor on the attention logits.
    """

    def __init__(self, prefix: int, scale: float) -> None:
        super().__init__()
        self.prefix, self.scale = prefix, scale

    def forward(self, q: Tensor, k: Tensor, g: Tensor | None, present: int) -> Tensor:
        """Returns the updated g of the ``present`` patches that took part, followed by the old g of the others."""
        seen = class_scores(q, k, self.scale, self.prefix)[:, :present] * q.shape[2]  # the sum over heads
        if g is None:
            return seen
        refreshed = 0.5 * (g[:, :present] + seen)
        return refreshed if present == g.shape[1] else torch.cat([refreshed, g[:, present:]], dim=1)


class _PutBack(nn.Module):
    """Puts the waiting tokens back at the end of a stage."""

    def forward(self, x: Tensor, waiting: Tensor, began: Tensor | None) -> Tensor:
        """Returns the tokens that took part, followed by those that waited.

        Args:
            x: Tokens that took part, with the representative last, if there is one.
            waiting: ``[B, M, C]``.
            began: The representative at the start of the stage, ``[B, 1, C]``: its change since then is added to the
                waiting tokens.
        """
        if began is not None:
            waiting = waiting + (x[:, -1:] - began)
            x = x[:, :-1]
        return torch.cat([x, waiting], dim=1)


class _WeightedMean(nn.Module):
    """Computes the representative of the waiting tokens."""

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """Takes tokens ``[B, M, C]`` and weights ``[B, M]``, not necessarily with sum 1; returns ``[B, 1, C]``."""
        with torch.autocast(tokens.device.type, enabled=False):  # otherwise AMP sums in half precision
            shares = (weights / weights.sum(dim=1, keepdim=True)).unsqueeze(1)
            exact = precise(tokens)
            return torch.bmm(shares.to(exact.dtype), exact).to(tokens.dtype)


def _informative(spec: TokenSpec, shape: ModelShape, progress: float) -> Mapping[int, int]:
    """For each location, the number of informative patches in its stage."""
    thirds = tuple(sorted({max(1, shape.depth * third // 3) for third in (1, 2)}))
    asked = msgspec.structs.replace(
        spec,
        keep_rate=_DEFAULT_RATE if spec.keep_rate is None else spec.keep_rate,
        locations=thirds if spec.locations is None else spec.locations,
    )
    found = {}
    for location, rate in asked.resolve(shape.depth):
        rate = scheduled_rate(rate, progress)
        found[location] = math.floor(Fraction(repr(float(rate))) * shape.patches)
        if not found[location]:
            raise InputError(
                "no patch would be informative", where=f"the keep rate of block {location}", seen=rate,
                wanted=f"at least {1 / shape.patches:.3g}: one of {shape.patches} patches",
            )  # fmt: skip
    return found
