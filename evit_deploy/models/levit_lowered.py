"""LeViT and Evo-LeViT in export form: batch norms folded, and 2-D tokens for linear layers."""

import copy
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from evit_deploy.models.levit import (
    BLOCK_RATIO,
    DOWNSAMPLE_RATIO,
    HEADS,
    Attention,
    Block,
    ConvNorm,
    Downsample,
    Downsampling,
    EvoLeViT,
    LeViTAttention,
    Mlp,
)
from evit_deploy.models.timm_vit import LoweredMlp
from evit_deploy.tokens.backbone import copy_sharing_weights


class FoldedAttention(nn.Module):
    """Attention with its norms folded, and separate projections for queries, keys and values.

    Does not use the ONNX operator ``Attention``: some runtimes require values as wide as keys, and here they are wider.

    Args:
        attention: The attention to fold, of either model and kind.
        projections: Projections of queries, keys and values; see :func:`parts`.
        bias: Added to the logits, ``[H, queries, keys]``.
    """

    flat: bool = True
    """See :class:`evit_deploy.models.timm_vit.LoweredAttention`."""
    bias: Tensor | None

    def __init__(self, attention: Any, projections: Sequence[nn.Linear], bias: Tensor | None = None) -> None:
        super().__init__()
        self.q, self.k, self.v = projections
        self.act, self.proj = attention.proj[0], folded(attention.proj[1])
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.register_buffer("bias", bias, persistent=False)

    def attended(self, asking: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Attends from query tokens ``[B, n, C]`` to tokens ``[B, N, C]``; see ``LeViTAttention.attend``."""
        q, k, v = self._heads(self.q, asking), self._heads(self.k, x), self._heads(self.v, x)
        logits = q.transpose(1, 2) @ k.permute(0, 2, 3, 1) * self.scale
        share = (logits if self.bias is None else logits + self.bias).softmax(-1)
        y = self.act((share @ v.transpose(1, 2)).transpose(1, 2).flatten(2))
        y = self.proj(y.flatten(0, 1)).unflatten(0, (-1, y.shape[1])) if self.flat else self.proj(y)
        return y, q, k

    def _heads(self, linear: nn.Module, x: Tensor) -> Tensor:
        heads = (self.num_heads, -1)
        if self.flat:  # directly to four dimensions: via three would add a Reshape
            return linear(x.flatten(0, 1)).unflatten(1, heads).unflatten(0, (-1, x.shape[1]))
        return linear(x).unflatten(-1, heads)


class LoweredAttention(FoldedAttention, LeViTAttention):
    """Attention of a block of Evo-LeViT."""

    def __init__(self, attention: Attention, projections: Sequence[nn.Linear]) -> None:
        super().__init__(attention, projections)
        self.learn_tradeoff, self.learns_alpha = attention.learn_tradeoff, attention.learns_alpha

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`LeViTAttention.attend`."""
        return self.attended(x, x)


class LoweredDownsample(FoldedAttention, Downsampling):
    """Downsampling of Evo-LeViT."""

    def __init__(self, attention: Downsample, projections: Sequence[nn.Linear]) -> None:
        super().__init__(attention, projections)
        self.learn_tradeoff, self.learns_alpha = attention.learn_tradeoff, attention.learns_alpha
        self.poss, self.reducer = attention.poss, attention.reducer
        self.register_buffer("asking", attention.asking, persistent=False)

    def attend(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See :meth:`LeViTAttention.attend`."""
        x = x + self.poss
        return self.attended(x.index_select(1, self.asking), x)


def folded(pair: Any) -> Any:
    """Folds the norm of a ``ConvNorm`` or ``LinearNorm``, ours or timm's, into its layer.

    Computed in FP64, so that a folded weight is rounded only once.
    """
    own = pair.c if hasattr(pair, "c") else pair.linear
    layer, norm = copy.deepcopy(own).double().eval(), copy.deepcopy(pair.bn).double().eval()
    wide = fuse_conv_bn_eval(layer, norm) if isinstance(layer, nn.Conv2d) else fuse_linear_bn_eval(layer, norm)
    return wide.to(own.weight.dtype).requires_grad_(False)


def parts(linear: nn.Linear, heads: int, *widths: int) -> Iterator[nn.Linear]:
    """Splits a projection with rows ordered by head into one per width, with rows ordered by head."""
    weights = linear.weight.unflatten(0, (heads, -1)).split(list(widths), dim=1)
    biases = linear.bias.unflatten(0, (heads, -1)).split(list(widths), dim=1)
    for weight, bias in zip(weights, biases, strict=True):
        yield _linear(weight.flatten(0, 1), bias.flatten())


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    made.weight = nn.Parameter(weight.detach().contiguous(), requires_grad=False)
    made.bias = nn.Parameter(bias.detach().contiguous(), requires_grad=False)
    return made


def _lowered_attention(attention: Attention | Downsample) -> FoldedAttention:
    d, heads = attention.key_dim, attention.num_heads
    if isinstance(attention, Attention):
        return LoweredAttention(attention, list(parts(folded(attention.qkv), heads, d, d, BLOCK_RATIO * d)))
    keys_and_values = parts(folded(attention.kv), heads, d, DOWNSAMPLE_RATIO * d)
    return LoweredDownsample(attention, [folded(attention.q[1]), *keys_and_values])


def _lowered_mlp(mlp: Mlp) -> LoweredMlp:
    return LoweredMlp(nn.Sequential(folded(mlp[0]), mlp[1], folded(mlp[2])))


def one_classifier(classifiers: Iterable[Any]) -> nn.Linear:
    """Folds the mean of classifiers, each a batch norm ``bn`` and a linear layer, into one layer, in FP64."""
    weights, biases, dtype = [], [], torch.float32
    for classifier in classifiers:
        own = classifier.l if hasattr(classifier, "l") else classifier.linear
        norm, layer, dtype = copy.deepcopy(classifier.bn).double(), copy.deepcopy(own).double(), own.weight.dtype
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        weights.append(layer.weight * scale)
        biases.append(layer.bias + layer.weight @ (norm.bias - norm.running_mean * scale))
    return _linear(torch.stack(weights).mean(0).to(dtype), torch.stack(biases).mean(0).to(dtype))


def lower(model: EvoLeViT) -> Any:
    """A copy in export form: batch norms folded, the classifiers of the mean combined, tokens in 2-D."""
    lowered: Any = copy_sharing_weights(model)
    for index, part in enumerate(lowered.patch_embed):
        if isinstance(part, ConvNorm):
            lowered.patch_embed[index] = folded(part)
    for index, block in enumerate(lowered.blocks):
        if isinstance(block, Block):
            block.m1.m, block.m2.m = _lowered_attention(block.m1.m), _lowered_mlp(block.m2.m)
        elif isinstance(block, Downsample):
            lowered.blocks[index] = _lowered_attention(block)
        else:
            block.m = _lowered_mlp(block.m)
    if model.num_classes > 0:
        lowered.head = one_classifier(model.get_submodule(name) for name in model.heads if name in HEADS[:2])
    for name in lowered.heads[1:]:
        delattr(lowered, name)
    lowered.heads = HEADS[:1]
    return lowered.eval()
