"""timm's LeViT (arXiv 2104.01136), in dense form only.

Its attention adds a learned bias for every distance on the grid, so every token must be at its position, and no method
can remove tokens. Evo-LeViT (:mod:`evit_deploy.models.levit`) is the variant that supports token reduction.
"""

from typing import Any

import torch
from timm.models.levit import Levit, LevitDistilled
from torch import Tensor, nn

from evit_deploy.models.levit_lowered import FoldedAttention, folded, one_classifier, parts
from evit_deploy.models.levit_reduction import DenseOnly, dense_only
from evit_deploy.models.timm_vit import LoweredMlp
from evit_deploy.tokens.backbone import copy_sharing_weights, shape_of
from evit_deploy.tokens.plan import BlockCost, ModelCost, ModelShape
from evit_deploy.tokens.reducer import TokenReducer


class BiasedOnly(DenseOnly):
    """Stands for every method: LeViT is only available in dense form."""

    family = "a LeViT"
    reason = "its attention biases need every token in its place"
    fix = "Take its Evo form, evo_levit_128s to evo_levit_384, with --method evo-vit."


class FoldedDownsample(FoldedAttention):
    """A downsampling's attention with its norms folded.

    Args:
        attention: timm's ``AttentionDownsample``.
    """

    asking: Tensor

    def __init__(self, attention: Any) -> None:
        d, heads = attention.key_dim, attention.num_heads
        projections = parts(folded(attention.kv), heads, d, attention.val_dim)
        super().__init__(attention, [folded(attention.q.ln), *projections], _biases(attention))
        rows, columns = attention.resolution
        places = torch.arange(rows * columns).reshape(rows, columns)
        places = places[:: attention.stride, :: attention.stride].flatten()
        self.register_buffer("asking", places.to(attention.attention_biases.device), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to ``[B, n, C']``."""
        return self.attended(x.index_select(1, self.asking), x)[0]


class FoldedSelfAttention(FoldedAttention):
    """A block's attention with its norms folded.

    Args:
        attention: timm's ``Attention`` of LeViT.
    """

    def __init__(self, attention: Any) -> None:
        d, heads = attention.key_dim, attention.num_heads
        projections = parts(folded(attention.qkv), heads, d, d, attention.val_dim)
        super().__init__(attention, list(projections), _biases(attention))

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, C]`` to the same."""
        return self.attended(x, x)[0]


def _biases(attention: Any) -> Tensor:
    return attention.attention_biases.detach()[:, attention.attention_bias_idxs]


def _lowered_mlp(mlp: Any) -> LoweredMlp:
    return LoweredMlp(nn.Sequential(folded(mlp.ln1), mlp.act, folded(mlp.ln2)))


class TimmLeViT:
    """The backbone's entry in the registry; see :class:`evit_deploy.tokens.backbone.Backbone`.

    Blocks are numbered through all stages; a downsampling (attention and MLP) counts as one.
    """

    @staticmethod
    def unsupported(model: Any) -> list[str]:
        """Reasons why this model is not supported; empty if it is."""
        if type(model) not in (Levit, LevitDistilled):
            return ["it is not a LeViT of timm's"]
        reasons = []
        if model.use_conv:
            reasons.append("it is LeViT's convolutional form, of the same arithmetic as levit_128s … levit_384")
        if model.global_pool != "avg":
            reasons.append("it returns every token (global_pool='')")
        return reasons

    @staticmethod
    def prefix_tokens(model: Any) -> int:
        """Zero: LeViT has no prefix tokens."""
        return 0

    @staticmethod
    def patches(model: Any) -> int:
        """Patch tokens of the first stage."""
        rows, columns = model.stages[0].blocks[0].attn.resolution
        return rows * columns

    @staticmethod
    def image_size(model: Any) -> tuple[int, int]:
        """Height and width in pixels."""
        rows, columns = model.stages[0].blocks[0].attn.resolution
        return rows * model.stem.stride, columns * model.stem.stride

    @staticmethod
    def channels(model: Any) -> int:
        """Channels of the input image."""
        return model.in_chans

    @staticmethod
    def shape(model: Any) -> ModelShape:
        """The model's shape, as needed for a token plan."""
        return shape_of(TimmLeViT, model, model.embed_dim[0])

    @staticmethod
    def pools(model: Any) -> bool:
        """True: the heads pool the patches."""
        return True

    @staticmethod
    def method(name: str) -> type[TokenReducer]:
        """A dense-only form of the method with this name."""
        return dense_only(BiasedOnly, name)

    @staticmethod
    def blocks(model: Any) -> list[nn.Module]:
        """Downsampling and blocks of all stages."""
        return [part for stage in model.stages for part in (stage.downsample, *stage.blocks) if _does_something(part)]

    @staticmethod
    def set_blocks(model: Any, blocks: Any) -> None:
        """Not used: no block is ever replaced."""
        raise NotImplementedError

    @staticmethod
    def scale(block: Any) -> float:
        """Factor on the attention logits of a block."""
        return (block.attn if hasattr(block, "attn") else block.attn_downsample).scale

    @staticmethod
    def cost(model: Any) -> ModelCost:
        """Multiply-adds of the parts, block by block."""
        (height, width), convolutions = TimmLeViT.image_size(model), 0
        for layer in (module for module in model.stem.modules() if isinstance(module, nn.Conv2d)):
            height, width = (height + 1) // 2, (width + 1) // 2
            convolutions += height * width * layer.weight.numel()
        tokens, blocks = TimmLeViT.patches(model), []
        for block in TimmLeViT.blocks(model):
            blocks.append(_cost(block, tokens))
            tokens = blocks[-1].tokens_out
        heads = sum(map(_weights, classifiers(model)))
        return ModelCost(convolutions, 0, 0, 0, heads, blocks=tuple(blocks))

    @staticmethod
    def reduced(block: Any, reducer: Any) -> Any:
        """Not used: no method reduces a LeViT."""
        raise NotImplementedError

    @staticmethod
    def original(block: Any) -> Any:
        """The block itself."""
        return block

    @staticmethod
    def ending(block: Any, rows: int) -> Any:
        """Not used: the heads pool, and need every token."""
        return block

    @staticmethod
    def lower(model: Any) -> Any:
        """A copy in export form: norms folded, biases looked up, tokens in 2-D, the classifiers as one."""
        lowered: Any = copy_sharing_weights(model)
        for name, part in list(lowered.stem.named_children()):
            if name.startswith("conv"):
                setattr(lowered.stem, name, folded(part))
        for block in TimmLeViT.blocks(lowered):
            made: Any = block
            if hasattr(made, "attn"):
                made.attn = FoldedSelfAttention(made.attn)
            else:
                made.attn_downsample = FoldedDownsample(made.attn_downsample)
            made.mlp = _lowered_mlp(made.mlp)
        if model.num_classes > 0:
            lowered.head = one_classifier(classifiers(model))
        if isinstance(model, LevitDistilled):
            del lowered.head_dist
            lowered.__class__ = Levit  # a Levit has one classifier
        return lowered.eval()


def classifiers(model: Any) -> list[nn.Module]:
    """The classifiers that are averaged."""
    return [model.head, model.head_dist] if isinstance(model, LevitDistilled) else [model.head]


def _does_something(part: nn.Module) -> bool:
    return not isinstance(part, nn.Identity)


def _weights(part: nn.Module) -> int:
    return sum(layer.weight.numel() for layer in part.modules() if isinstance(layer, nn.Linear))


def _cost(block: Any, tokens: int) -> BlockCost:
    if hasattr(block, "attn"):
        attention = block.attn
        pair = (attention.key_dim + attention.val_dim) * attention.num_heads
        return BlockCost(tokens, tokens, _weights(attention), _weights(block.mlp), pair)
    attention = block.attn_downsample
    after = attention.attention_bias_idxs.shape[0]
    pair = (attention.key_dim + attention.val_dim) * attention.num_heads
    asking = _weights(attention.q) + _weights(attention.proj) + _weights(block.mlp)
    return BlockCost(tokens, after, fixed=tokens * _weights(attention.kv) + after * asking + tokens * after * pair)
