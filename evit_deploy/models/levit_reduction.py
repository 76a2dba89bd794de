"""Token reduction for Evo-LeViT: its token plan, its form of Evo-ViT, and its backbone."""

import math
from fractions import Fraction
from typing import Any, ClassVar

import msgspec
import torch
from torch import Tensor, nn

from evit_deploy.errors import InputError, UnsupportedModelError
from evit_deploy.models.levit import (
    BLOCK_RATIO,
    DOWNSAMPLE_RATIO,
    Block,
    ConvNorm,
    Downsample,
    EvoLeViT,
    Reducible,
    stages,
)
from evit_deploy.models.levit_lowered import lower
from evit_deploy.registry import METHODS
from evit_deploy.tokens.methods.evo_vit import EvoViT
from evit_deploy.tokens.plan import BlockCost, BlockPlan, ModelCost, ModelShape, TokenPlan, TokenSpec, scheduled_rate
from evit_deploy.tokens.reducer import TokenReducer
from evit_deploy.tokens.state import TokenState

METHOD = "evo-vit"
"""Name of the method in the registry."""
DENSE_BLOCKS = 2
"""Blocks of the first stage that see every token, until the global attention has settled."""


class LeViTShape(ModelShape, frozen=True):
    """The shape of an Evo-LeViT, as needed for its plan.

    Args:
        stages: Indices of each stage's blocks.
        grid: Rows and columns of patches.
    """

    stages: tuple[tuple[int, ...], ...]
    grid: tuple[int, int]

    def locations(self) -> tuple[int, ...]:
        """The paper's locations: one per stage, at its start; in the first stage after two blocks, if it has more."""
        first, *others = self.stages
        return tuple(stage[0] for stage in (first[DENSE_BLOCKS:], *others) if stage)

    def candidates(self, block: int) -> int:
        """Number of a block's tokens without the prefix."""
        return self.cost.blocks[block].tokens_in - self.prefix

    def places(self, stage: int) -> tuple[int, ...]:
        """Patch indices of a stage's candidates: those in every second, fourth, … row and column."""
        rows, columns = self.grid
        return tuple(
            row * columns + column for row in range(0, rows, 2**stage) for column in range(0, columns, 2**stage)
        )


class EvoLeViTReducer(EvoViT):
    """Evo-ViT in an Evo-LeViT: candidates are separated once per stage, until its end.

    Global attention is a mean over heads, with a separate α for each attention layer, from the first block on. Before a
    downsampling every candidate returns to its position on the grid. Waiting candidates always have a representative.
    """

    class Options(EvoViT.Options, frozen=True, forbid_unknown_fields=True):
        """The options of Evo-ViT; there is always a representative."""

        representative: bool = True

    own_parameters: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def attach(cls, model: Any, options: msgspec.Struct, plan: TokenPlan) -> None:
        """Does nothing: an Evo-LeViT has both heads of its class token already."""

    @classmethod
    def detach(cls, model: Any) -> None:
        """Does nothing."""

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """Computes every token count: K = ⌊rate · N⌋ of the N candidates of a stage, as in the released code.

        Raises:
            InputError: The spec does not fit the model.
        """
        assert isinstance(shape, LeViTShape)
        assert isinstance(options, EvoLeViTReducer.Options)
        if not options.representative:
            raise InputError("in an Evo-LeViT the waiting patches always have a representative", where="representative",
                             seen=False, wanted=True)  # fmt: skip
        keeps = _informative(spec, shape, progress)
        sorting = {block for block in keeps if keeps[block] is not None}
        if options.layer_wise:
            firsts = [(stage, min(sorting & {*stage})) for stage in shape.stages if sorting & {*stage}]
            sorting |= {block for stage, first in firsts for block in stage if block > first}
        last, rows = max(sorting, default=0), []
        for stage, blocks in enumerate(shape.stages):
            rows += [_dense_row(shape, block, block < last) for block in range(len(rows), blocks[0])]
            candidates, keep, places = shape.candidates(blocks[0]), None, shape.places(stage) if stage else ()
            for block in blocks:
                keep = keeps.get(block) or keep
                if keep is None:
                    rows.append(_dense_row(shape, block, block < last))
                    continue
                tokens, sorts = shape.prefix + keep + 1, block in sorting
                rows.append(
                    BlockPlan(
                        block, tokens, keep if sorts else None, sorts, tokens, aside=candidates - keep,
                        choice_indices=candidates if sorts else None, places=places if sorts else (),
                        ranks=block < last,
                    )
                )  # fmt: skip
                places = () if sorts else places  # after this, the previous order determines them
        return TokenPlan(shape.prefix, shape.patches, tuple(rows), shape.cost)

    def forward(self, x: Tensor, q: Any, k: Any, state: TokenState) -> tuple[Tensor, Tensor, TokenState]:
        """Sorts the tokens, and records the token of each grid position; see :meth:`EvoViT.forward`."""
        x, order, state = super().forward(x, q, k, state)
        numbers = order.long()
        places = torch.arange(numbers.shape[1], device=x.device).expand_as(numbers)
        where = torch.zeros_like(numbers).scatter(1, numbers, places)
        return x, order, state._replace(rows=where if state.rows is None else where.gather(1, state.rows))

    def check(self, x: Tensor) -> None:
        """Checks the number of tokens against the plan.

        Raises:
            UnsupportedModelError: The image size differs from the plan's.
        """
        wanted = self.plan.tokens_in
        if x.shape[1] != wanted:
            reason = (
                f"{x.shape[1]} tokens arrived, the plan has {wanted}: another image size needs reduce_tokens_ again"
            )
            raise UnsupportedModelError(f"block {self.plan.block}", [reason])


def _informative(spec: TokenSpec, shape: LeViTShape, progress: float) -> dict[int, int | None]:
    """Number of informative candidates at each location; ``None`` for all of them.

    Raises:
        InputError: A location does not exist in the model, there are more or fewer rates than locations, or a rate
            keeps nothing.
    """
    found = dict(_rates(spec, shape))
    keeps = {block: _count(rate, block, shape) for block, rate in found.items()}
    if progress == 1:
        return keeps
    # A schedule whose final rate keeps all candidates keeps all of them throughout.
    on_the_way = {block: scheduled_rate(found[block], progress) for block in found if keeps[block] is not None}
    return {block: _count(rate, block, shape) for block, rate in on_the_way.items()}


def _count(rate: float, block: int, shape: LeViTShape) -> int | None:
    candidates = shape.candidates(block)
    keep = math.floor(Fraction(repr(float(rate))) * candidates)
    if keep == 0:
        raise InputError(
            "the keep rate leaves no informative token", where=f"block {block}", seen=f"{rate:g} of {candidates}",
            wanted=f"{1 / candidates:.3g} or more",
        )  # fmt: skip
    return keep if keep < candidates else None


class DenseOnly(TokenReducer):
    """A method that a family does not support: only the dense model is available."""

    family: ClassVar[str] = "an Evo-LeViT"
    reason: ClassVar[str] = "its downsampling needs every patch at its position, and this method drops some"
    fix: ClassVar[str] = f"Use --method {METHOD}."
    needs_class_token = False

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """The dense plan.

        Raises:
            UnsupportedModelError: The spec reduces tokens.
        """
        if not spec.dense:
            raise UnsupportedModelError(f"{cls.family} with the method {spec.method!r}", [cls.reason], fix=cls.fix)
        costs = enumerate(shape.cost.blocks)
        rows = tuple(BlockPlan(block, cost.tokens_in, None, False, cost.tokens_out) for block, cost in costs)
        return TokenPlan(shape.prefix, shape.patches, rows, shape.cost)


def dense_only(form: type[DenseOnly], name: str) -> type[DenseOnly]:
    """A dense-only form of the method with this name; it accepts the method's options."""
    general = METHODS.get(name)
    return type(general.__name__, (form,), {"Options": general.Options})


def _rates(spec: TokenSpec, shape: LeViTShape) -> tuple[tuple[int, float], ...]:
    """Pairs of location and keep rate.

    Raises:
        InputError: A location does not exist in the model, or there are more or fewer rates than locations.
    """
    chosen = msgspec.structs.replace(
        spec,
        keep_rate=EvoViT.default_keep_rate if spec.keep_rate is None else spec.keep_rate,
        locations=shape.locations() if spec.locations is None else spec.locations,
    )
    found = chosen.resolve(shape.depth)
    possible = [block for stage in shape.stages for block in stage if block > 0]
    wrong = next((block for block, _ in found if block not in possible), None)
    if wrong is not None:
        what = (
            "the first block has no attention before it to sort by" if wrong == 0 else "a downsampling is no location"
        )
        wanted = ", ".join(map(str, possible))
        raise InputError(what, where="--locations", seen=wrong, wanted=f"some of the blocks {wanted}")
    return found


def _dense_row(shape: LeViTShape, block: int, ranks: bool) -> BlockPlan:
    cost = shape.cost.blocks[block]
    return BlockPlan(block, cost.tokens_in, None, False, cost.tokens_out, ranks=ranks)


class EvoLeViTBackbone:
    """The backbone's entry in the registry; see :class:`evit_deploy.tokens.backbone.Backbone`.

    Blocks are numbered as in checkpoints: a downsampling counts as two, attention and MLP.
    """

    @staticmethod
    def unsupported(model: Any) -> list[str]:
        """Reasons why this model cannot be reduced exactly; empty if it can."""
        if not isinstance(model, EvoLeViT):
            return ["it is not an Evo-LeViT"]
        return [
            f"block {index} is a {type(block).__name__}, not one of Evo-LeViT's"
            for index, block in enumerate(model.blocks)
            if not isinstance(block, Reducible)
        ]

    @staticmethod
    def prefix_tokens(model: EvoLeViT) -> int:
        """The class token."""
        return model.num_prefix_tokens

    @staticmethod
    def patches(model: EvoLeViT) -> int:
        """Patch tokens of the first stage."""
        return model.patch_embed.num_patches

    @staticmethod
    def image_size(model: EvoLeViT) -> tuple[int, int]:
        """Height and width in pixels."""
        return model.patch_embed.img_size

    @staticmethod
    def channels(model: Any) -> int:
        """Channels of the input image."""
        return model.patch_embed[0].c.in_channels

    @staticmethod
    def shape(model: EvoLeViT) -> LeViTShape:
        """The model's shape, as needed for a token plan."""
        return LeViTShape(
            prefix=model.num_prefix_tokens,
            patches=model.patch_embed.num_patches,
            depth=len(model.blocks),
            width=model.embed_dim[0],
            cost=EvoLeViTBackbone.cost(model),
            stages=tuple(map(tuple, stages(model))),
            grid=model.patch_embed.grid_size,
        )

    @staticmethod
    def pools(model: EvoLeViT) -> bool:
        """True: the heads pool the patches."""
        return True

    @staticmethod
    def method(name: str) -> type[TokenReducer]:
        """The method with this name: LeViT's form of Evo-ViT; all other methods are dense-only."""
        return EvoLeViTReducer if name == METHOD else dense_only(DenseOnly, name)

    @staticmethod
    def blocks(model: EvoLeViT) -> nn.Sequential:
        """Blocks and downsampling, numbered as in checkpoints."""
        return model.blocks

    @staticmethod
    def set_blocks(model: EvoLeViT, blocks: nn.Sequential) -> None:
        """Replaces the model's container of blocks."""
        model.blocks = blocks

    @staticmethod
    def scale(block: Any) -> float:
        """Factor on the attention logits of a block."""
        return block.m1.m.scale if isinstance(block, Block) else getattr(block, "scale", 1.0)

    @staticmethod
    def cost(model: Any) -> ModelCost:
        """Multiply-adds of the parts, block by block."""
        (height, width), convolutions = model.patch_embed.img_size, 0
        for part in model.patch_embed:
            if isinstance(part, ConvNorm):
                height, width = (height + 1) // 2, (width + 1) // 2
                convolutions += height * width * part.c.weight.numel()
        heads = [head.weight.numel() for head in model.get_classifier() if isinstance(head, nn.Linear)]
        tokens, blocks = 1 + model.patch_embed.num_patches, []
        for block in model.blocks:
            found = _cost(block, tokens)
            blocks.append(found)
            tokens = found.tokens_out
        return ModelCost(convolutions, 0, 0, 0, sum(heads), blocks=tuple(blocks))

    @staticmethod
    def reduced(block: Any, reducer: Any) -> Any:
        """The block itself, with the reducer."""
        block.reducer = reducer
        return block

    @staticmethod
    def original(block: Any) -> Any:
        """The block without a reducer."""
        block.reducer = None
        return block

    @staticmethod
    def ending(block: Any, rows: int) -> Any:
        """Not used: the heads pool, and need every token."""
        return block

    @staticmethod
    def lower(model: EvoLeViT) -> Any:
        """A copy in export form; see :func:`lower`."""
        return lower(model)


def _cost(block: Any, tokens: int) -> BlockCost:
    """Multiply-adds of a block in which every token takes part."""
    if isinstance(block, Block):
        attention = block.m1.m
        pair = (1 + BLOCK_RATIO) * attention.key_dim * attention.num_heads
        return BlockCost(tokens, tokens, _linear_weights(block.m1), _linear_weights(block.m2), pair)
    if isinstance(block, Downsample):
        after = len(block.asking)
        pair = (1 + DOWNSAMPLE_RATIO) * block.key_dim * block.num_heads
        asked, asking = _linear_weights(block.kv), _linear_weights(block.q) + _linear_weights(block.proj)
        return BlockCost(tokens, after, fixed=tokens * asked + after * asking + tokens * after * pair)
    return BlockCost(tokens, tokens, fixed=tokens * _linear_weights(block.m))


def _linear_weights(part: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Linear))
