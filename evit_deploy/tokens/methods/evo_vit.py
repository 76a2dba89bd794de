"""Evo-ViT: "Slow-Fast Token Evolution for Dynamic Vision Transformer" (AAAI 2022, arXiv 2108.01390).

A stage begins by sorting the patches by their global class attention g. The first K are *informative*: they go through
the blocks of the stage. The others wait and are put back when the next stage begins, or behind the last block, so that
no patch is ever lost and heads that pool see all of them. What is different from block to block stands in the plan: a
row with ``keep`` sorts, one with ``aside`` has tokens waiting, one with ``ranks`` refreshes g.
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
    """Sorts the patches at the start of a stage; the first ones go through its blocks, the others wait.

    g is the sum over heads of the attention that the class token pays to a patch. The block before the first sorting
    sets it; from there on it is the mean of what it was and of what the block's attention says. Only patches that take
    part are refreshed. No block computes g for a sorting that never comes.
    """

    fuses: ClassVar[bool] = False
    own_parameters: ClassVar[tuple[str, ...]] = ("norm_cls.", "head_cls.weight", "head_cls.bias")
    default_keep_rate: ClassVar[float | None] = _DEFAULT_RATE
    score_name: ClassVar[str] = "global class attention"

    class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
        """How the patches that wait are treated, and how often they change.

        ``representative``: whether they learn from the blocks by a token that stands for all of them, the mean weighted
        by g (the paper), or stay as they are (the released DeiT models). ``layer_wise``: whether every block from the
        first location on sorts anew, as in the first part of the published training.
        """

        representative: bool = False
        layer_wise: bool = False

    options: Options

    def __init__(self, plan: BlockPlan, prefix: int, scale: float, options: msgspec.Struct) -> None:
        super().__init__(plan, prefix, scale, options)
        # Modules, so that what they compute carries the reducer's name in an exported file.
        self.refresh, self.put_back, self.exact = _Refresh(prefix, scale), _PutBack(), _WeightedMean()

    @classmethod
    def unsupported(cls, model: Any) -> list[str]:
        """A distilled model has two tokens that classify, and the method is defined for one."""
        if hasattr(model, "dist_token"):
            return ["it is distilled: Evo-ViT ranks patches by one class token, and this model has two that classify"]
        return []

    @classmethod
    def attach(cls, model: Any, options: msgspec.Struct, plan: TokenPlan) -> None:
        """Puts the class token's second head back, where one came with the weights; it only serves training."""
        if own_weights(model, cls):
            add_class_head(model)

    @classmethod
    def detach(cls, model: Any) -> None:
        """Takes that head away; it comes back with the next :meth:`attach`."""
        for name in ("norm_cls", "head_cls"):
            if hasattr(model, name):
                weights = getattr(model, name).state_dict(prefix=f"{name}.")
                model.method_weights = getattr(model, "method_weights", {}) | weights
                delattr(model, name)

    @classmethod
    def carries_state(cls, options: msgspec.Struct, pools: bool) -> bool:
        """Always: g, and the tokens that wait."""
        return True

    @classmethod
    def serves_pooling(cls, options: msgspec.Struct) -> bool:
        """Every patch is back behind the last block."""
        return True

    @classmethod
    def label(cls, spec: TokenSpec, options: msgspec.Struct) -> str:
        """``k0.5``, with ``-representative`` or ``-layer-wise`` where that is asked for."""
        assert isinstance(options, EvoViT.Options)
        rates = spec.rates or (_DEFAULT_RATE,)
        asked = [name.replace("_", "-") for name in options.__struct_fields__ if getattr(options, name)]
        return "-".join(["k" + "-".join(f"{rate:g}" for rate in rates), *asked])

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """Decides every token count: of the P patches int(rate · P) are informative in a stage.

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
        """Sorts all patches; the first K stay, the others wait.

        Args:
            x: All tokens ``[B, prefix + patches, C]``.
            q: Not used: it sorts before the block's attention.
            k: Not used.
            state: Its ``attention`` is g.

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
        """Where a stage begins: the patches that waited are put back, and all are sorted."""
        if self.plan.keep is not None or not self.plan.aside:
            x, state = self._put_back(x, state)
        if self.plan.keep is not None:
            x, _, state = self(x, None, None, state)
        return x, state

    def between(self, x: Tensor, q: Tensor, k: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        """Refreshes g where a later block sorts by it."""
        if not self.plan.ranks:
            return x, state
        present = q.shape[1] - self.prefix - (state.representative is not None)
        return x, state._replace(attention=self.refresh(q, k, state.attention, present))

    def finish(self, x: Tensor, state: TokenState) -> Tensor:
        """All patches, in another order than the image's."""
        return self._put_back(x, state)[0]

    def _put_back(self, x: Tensor, state: TokenState) -> tuple[Tensor, TokenState]:
        if state.aside is None:
            return x, state
        x = self.put_back(x, state.aside, state.representative)
        return x, state._replace(aside=None, representative=None)


def add_class_head(model: Any) -> None:
    """Gives a model whose head pools the class token's head that it is trained with beside, in place.

    Weights that came with the model's are taken, as far as they are for its classes; else it begins anew.

    Args:
        model: Any whose head pools; nothing happens if it has the head already.
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
    """g after a block.

    Args:
        prefix: Tokens in front of the patches.
        scale: Factor on the attention logits.
    """

    def __init__(self, prefix: int, scale: float) -> None:
        super().__init__()
        self.prefix, self.scale = prefix, scale

    def forward(self, q: Tensor, k: Tensor, g: Tensor | None, present: int) -> Tensor:
        """New g of the ``present`` patches that took part, then the old one of those that wait."""
        seen = class_scores(q, k, self.scale, self.prefix)[:, :present] * q.shape[2]  # the sum over heads
        if g is None:
            return seen
        refreshed = 0.5 * (g[:, :present] + seen)
        return refreshed if present == g.shape[1] else torch.cat([refreshed, g[:, present:]], dim=1)


class _PutBack(nn.Module):
    """All tokens at the end of a stage."""

    def forward(self, x: Tensor, waiting: Tensor, began: Tensor | None) -> Tensor:
        """Those that took part, then those that waited.

        Args:
            x: Tokens that took part, with the representative last, if there is one.
            waiting: ``[B, M, C]``.
            began: The representative as the stage began, ``[B, 1, C]``: all that the blocks have added to it since, is
                added to those that waited.
        """
        if began is not None:
            waiting = waiting + (x[:, -1:] - began)
            x = x[:, :-1]
        return torch.cat([x, waiting], dim=1)


class _WeightedMean(nn.Module):
    """The representative of the tokens that wait."""

    def forward(self, tokens: Tensor, weights: Tensor) -> Tensor:
        """``[B, 1, C]`` of ``[B, M, C]``, by weights ``[B, M]`` that need not add up to 1."""
        with torch.autocast(tokens.device.type, enabled=False):  # or mixed-precision training sums in half precision
            shares = (weights / weights.sum(dim=1, keepdim=True)).unsqueeze(1)
            exact = precise(tokens)
            return torch.bmm(shares.to(exact.dtype), exact).to(tokens.dtype)


def _informative(spec: TokenSpec, shape: ModelShape, progress: float) -> Mapping[int, int]:
    """For each location how many patches its stage updates."""
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
