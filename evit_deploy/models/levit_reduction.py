"""What token reduction must know of Evo-LeViT: its plan, Evo-ViT in the form that it takes there, its backbone."""

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
"""The method's name in the registry."""
DENSE_BLOCKS = 2
"""Blocks of the first stage that see every token: global attention has to settle first."""


class LeViTShape(ModelShape, frozen=True):
    """What a plan has to know of an Evo-LeViT.

    Args:
        stages: Numbers of each stage's blocks.
        grid: Rows and columns of patches.
    """

    stages: tuple[tuple[int, ...], ...]
    grid: tuple[int, int]

    def locations(self) -> tuple[int, ...]:
        """The paper's places: once a stage, at its beginning; in the first after two blocks, if it has more."""
        first, *others = self.stages
        return tuple(stage[0] for stage in (first[DENSE_BLOCKS:], *others) if stage)

    def candidates(self, block: int) -> int:
        """Tokens of a block behind the prefix."""
        return self.cost.blocks[block].tokens_in - self.prefix

    def places(self, stage: int) -> tuple[int, ...]:
        """Patches that the candidates of a stage stand for: those in every second, fourth, … row and column."""
        rows, columns = self.grid
        return tuple(
            row * columns + column for row in range(0, rows, 2**stage) for column in range(0, columns, 2**stage)
        )


class EvoLeViTReducer(EvoViT):
    """Evo-ViT in an Evo-LeViT: candidates are set apart once a stage, until its end.

    Global attention is a mean over heads with an α of each attention's own, from the first block on. Before a
    downsampling every candidate goes back to its place on the grid. Those that wait always have a representative.
    """

    class Options(EvoViT.Options, frozen=True, forbid_unknown_fields=True):
        """Evo-ViT's own, but that there is always a representative."""

        representative: bool = True

    own_parameters: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def attach(cls, model: Any, options: msgspec.Struct, plan: TokenPlan) -> None:
        """Adds nothing: an Evo-LeViT has both heads of its class token from the start."""

    @classmethod
    def detach(cls, model: Any) -> None:
        """Takes nothing away."""

    @classmethod
    def plan_for(cls, spec: TokenSpec, options: msgspec.Struct, shape: ModelShape, progress: float) -> TokenPlan:
        """Decides every token count; K = ⌊rate · N⌋ of the N candidates of a stage, as released.

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
                places = () if sorts else places  # from now on they are told by the order before
        return TokenPlan(shape.prefix, shape.patches, tuple(rows), shape.cost)

    def forward(self, x: Tensor, q: Any, k: Any, state: TokenState) -> tuple[Tensor, Tensor, TokenState]:
        """Sorts, and remembers where each place of the grid has its token; see :meth:`EvoViT.forward`."""
        x, order, state = super().forward(x, q, k, state)
        numbers = order.long()
        places = torch.arange(numbers.shape[1], device=x.device).expand_as(numbers)
        where = torch.zeros_like(numbers).scatter(1, numbers, places)
        return x, order, state._replace(rows=where if state.rows is None else where.gather(1, state.rows))

    def check(self, x: Tensor) -> None:
        """Refuses tokens that the plan does not have.

        Raises:
            UnsupportedModelError: The image has another size than the plan was made for.
        """
        wanted = self.plan.tokens_in
        if x.shape[1] != wanted:
            reason = (
                f"{x.shape[1]} tokens arrived, the plan has {wanted}: another image size needs reduce_tokens_ again"
            )
            raise UnsupportedModelError(f"block {self.plan.block}", [reason])


def _informative(spec: TokenSpec, shape: LeViTShape, progress: float) -> dict[int, int | None]:
    """For each location how many candidates are informative; ``None`` where that is all of them.

    Raises:
        InputError: A location is none of the model's, there are more or fewer rates than locations, or a rate leaves
            nothing.
    """
    found = dict(_rates(spec, shape))
    keeps = {block: _count(rate, block, shape) for block, rate in found.items()}
    if progress == 1:
        return keeps
    # One that sets none apart at the end sets none apart on the way either.
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
    """A method that a family cannot carry: there is only the dense model."""

    family: ClassVar[str] = "an Evo-LeViT"
    reason: ClassVar[str] = "its downsampling needs every patch in its place, and this method gives some up"
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
    """The method of a name where it cannot be carried: it takes its options all the same."""
    general = METHODS.get(name)
    return type(general.__name__, (form,), {"Options": general.Options})


def _rates(spec: TokenSpec, shape: LeViTShape) -> tuple[tuple[int, float], ...]:
    """Pairs of location and keep rate.

    Raises:
        InputError: A location is none of the model's, or there are more or fewer rates than locations.
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

    Blocks bear the numbers that they have in a checkpoint: a downsampling counts as two, attention and MLP.
    """

    @staticmethod
    def unsupported(model: Any) -> list[str]:
        """Why this model cannot be reduced exactly; empty when it can."""
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
        """What a token plan has to know of the model."""
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
        """Its answer comes from the patches."""
        return True

    @staticmethod
    def method(name: str) -> type[TokenReducer]:
        """The method of a name: Evo-ViT in LeViT's own form, and of all others only the dense model."""
        return EvoLeViTReducer if name == METHOD else dense_only(DenseOnly, name)

    @staticmethod
    def blocks(model: EvoLeViT) -> nn.Sequential:
        """Blocks and downsampling, as they are numbered in a checkpoint."""
        return model.blocks

    @staticmethod
    def set_blocks(model: EvoLeViT, blocks: nn.Sequential) -> None:
        """Puts another container of blocks into the model."""
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
        """Never asked for: its heads pool, and need every token."""
        return block

    @staticmethod
    def lower(model: EvoLeViT) -> Any:
        """A copy in export form; see :func:`lower`."""
        return lower(model)


def _cost(block: Any, tokens: int) -> BlockCost:
    """Multiply-adds of a block of which every token takes part."""
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
