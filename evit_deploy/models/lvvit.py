"""LV-ViT ("All Tokens Matter", NeurIPS 2021, arXiv 2104.10858), and its backbone.

The model extends timm's ``VisionTransformer``. It differs in the stem (four convolutions), in the residual branches
(divided by λ), and in a second classifier for all patch tokens. Parameters have the names of the released checkpoints.
Importing this module registers ``lvvit_t`` … ``lvvit_l`` with ``timm.create_model``.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import msgspec
from timm.layers import PatchEmbed
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer, checkpoint_filter_fn
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from evit_deploy.errors import InputError
from evit_deploy.models.timm_vit import LoweredMlp, TimmViT, unusual_blocks
from evit_deploy.tokens.plan import ModelCost

STRIDE = 16
AUX_WEIGHT = 0.5
"""Weight of the patch tokens' maximum logit in the model's output (as in the released evaluation code)."""


class ConvStem(PatchEmbed):
    """Three convolutions at half the resolution, then an 8 × 8 patch embedding: total stride 16.

    Args:
        img_size: Height and width of the image, or its side.
        patch_size: Stride of the whole stem; must be 16.
        in_chans: Channels of the image.
        embed_dim: Width of the tokens.
        stem_width: Channels of the three convolutions.
        bias: Whether the last one has a bias.
        dynamic_img_pad: As in timm; must be false.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = STRIDE,
        in_chans: int = 3,
        embed_dim: int = 384,
        stem_width: int = 64,
        bias: bool = True,
        dynamic_img_pad: bool = False,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        assert patch_size == STRIDE
        assert not dynamic_img_pad
        # timm's patch embedding, on the stem's channels, becomes the last convolution; its stride is set below
        super().__init__(img_size, patch_size, stem_width, embed_dim, bias=bias, device=device, dtype=dtype)
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv1 = nn.Conv2d(in_chans, stem_width, 7, stride=2, padding=3, bias=False, **made)
        self.bn1: nn.Module = nn.BatchNorm2d(stem_width, **made)
        self.conv2 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False, **made)
        self.bn2: nn.Module = nn.BatchNorm2d(stem_width, **made)
        self.conv3 = nn.Conv2d(stem_width, stem_width, 3, padding=1, bias=False, **made)
        self.bn3: nn.Module = nn.BatchNorm2d(stem_width, **made)
        self.relu = nn.ReLU()
        self.proj = nn.Conv2d(stem_width, embed_dim, STRIDE // 2, stride=STRIDE // 2, bias=bias, **made)

    def set_input_size(self, img_size: Any = None, patch_size: Any = None) -> None:
        """Changes the image size; the stride stays the same."""
        assert patch_size in (None, STRIDE, (STRIDE, STRIDE))
        super().set_input_size(img_size=img_size)

    def forward(self, x: Tensor) -> Tensor:
        """Images ``[B, C, H, W]`` to tokens ``[B, H·W/256, D]``."""
        size: Any = self.img_size
        assert tuple(x.shape[2:]) == tuple(size), f"images of {tuple(x.shape[2:])} in a model that is built for {size}"
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.relu(self.bn2(self.conv2(x)))
        x = self.relu(self.bn3(self.conv3(x)))
        return self.proj(x).flatten(2).transpose(1, 2)


class Divide(nn.Module):
    """Divides a residual branch by λ (the paper's skip λ); replaces timm's layer scale.

    Args:
        by: λ.
    """

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def forward(self, x: Tensor) -> Tensor:
        """``x / λ``."""
        return x / self.by

    def extra_repr(self) -> str:
        """λ, shown in the module's repr."""
        return f"{self.by:g}"


class LVViT(VisionTransformer):
    """LV-ViT. Its logits are the class token's, plus half of the maximum over the patch tokens' for each class.

    After token reduction, the patch tokens are the remaining ones, including the fused token.

    Args:
        img_size: Height and width of the image, or its side; multiples of 16.
        in_chans: Channels of the image.
        num_classes: Classes; 0 for the class token's features.
        embed_dim: Width.
        depth: Blocks.
        num_heads: Attention heads.
        mlp_ratio: Ratio of MLP width to token width.
        skip_lam: λ, the divisor of every residual branch.
        stem_width: Channels of the stem's convolutions.
        drop_rate: Dropout before the classifiers.
        pos_drop_rate: Dropout after the position embedding.
        proj_drop_rate: Dropout after attention's projection and inside the MLPs.
        attn_drop_rate: Dropout of the attention map.
        drop_path_rate: Stochastic depth of the last block; rises from 0 at the first.
        device: Of the parameters.
        dtype: Of the parameters.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 384,
        depth: int = 16,
        num_heads: int = 6,
        mlp_ratio: float = 3.0,
        skip_lam: float = 2.0,
        stem_width: int = 64,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        super().__init__(
            img_size=img_size,
            patch_size=STRIDE,
            in_chans=in_chans,
            num_classes=num_classes,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            qkv_bias=False,
            drop_rate=drop_rate,
            pos_drop_rate=pos_drop_rate,
            proj_drop_rate=proj_drop_rate,
            attn_drop_rate=attn_drop_rate,
            drop_path_rate=drop_path_rate,
            embed_layer=partial(ConvStem, stem_width=stem_width),
            norm_layer=partial(nn.LayerNorm, eps=1e-5),  # PyTorch's default, as in the released code
            device=device,
            dtype=dtype,
        )
        if skip_lam != 1:
            for block in self.blocks:
                block.ls1, block.ls2 = Divide(skip_lam), Divide(skip_lam)
        assert self.cls_token is not None
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.aux_head = self._aux_head()

    def _aux_head(self) -> nn.Module:
        if self.num_classes <= 0:
            return nn.Identity()
        like = self.norm.weight
        head = nn.Linear(self.embed_dim, self.num_classes, device=like.device, dtype=like.dtype)
        nn.init.trunc_normal_(head.weight, std=0.02)
        nn.init.zeros_(head.bias)
        return head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Reinitializes both classifiers."""
        if global_pool not in (None, "token"):
            raise InputError("LV-ViT classifies from its class token", seen=global_pool, wanted="global_pool 'token'")
        super().reset_classifier(num_classes)
        self.aux_head = self._aux_head().train(self.training)

    def class_logits(self, x: Tensor) -> Tensor:
        """Logits of the class token: normalized tokens ``[B, N, D]`` to ``[B, classes]``."""
        return self.head(self.head_drop(x[:, 0]))

    def token_logits(self, x: Tensor) -> Tensor:
        """Logits of every other token: normalized tokens ``[B, N, D]`` to ``[B, N - 1, classes]``."""
        return self.aux_head(self.head_drop(x[:, self.num_prefix_tokens :]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Normalized tokens ``[B, N, D]`` to logits; to the class token's features with ``pre_logits``."""
        if pre_logits or self.num_classes <= 0:
            return self.head_drop(x[:, 0])
        return self.class_logits(x) + AUX_WEIGHT * self.token_logits(x).amax(dim=1)


def _cfg(**values: Any) -> dict[str, Any]:
    # No URL: the releases are single files on GitHub, passed to evit-deploy by path.
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "fixed_input_size": True,
        "crop_pct": 0.9,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.conv1",
        "classifier": ("head", "aux_head"),
        "license": "apache-2.0",
        **values,
    }


default_cfgs = generate_default_cfgs(
    {
        "lvvit_t": _cfg(),
        "lvvit_s": _cfg(),
        "lvvit_m": _cfg(crop_pct=1.0),
        "lvvit_l": _cfg(crop_pct=1.0),
    }
)


def _create(name: str, pretrained: bool, size: dict[str, Any], given: dict[str, Any]) -> LVViT:
    filter_weights: Callable[..., Any] = checkpoint_filter_fn
    return build_model_with_cfg(
        LVViT, name, pretrained, pretrained_filter_fn=filter_weights, feature_cfg={"feature_cls": "getter"},
        **(size | given),
    )  # fmt: skip


@register_model
def lvvit_t(pretrained: bool = False, **given: Any) -> LVViT:
    """LV-ViT-T: 8.5 M parameters, 79.1 % top-1 on ImageNet as published."""
    return _create("lvvit_t", pretrained, {"embed_dim": 240, "depth": 12, "num_heads": 4, "skip_lam": 1.0}, given)


@register_model
def lvvit_s(pretrained: bool = False, **given: Any) -> LVViT:
    """LV-ViT-S: 26.2 M parameters, 83.3 %."""
    return _create("lvvit_s", pretrained, {"embed_dim": 384, "depth": 16, "num_heads": 6}, given)


@register_model
def lvvit_m(pretrained: bool = False, **given: Any) -> LVViT:
    """LV-ViT-M: 55.8 M parameters, 84.0 %."""
    return _create("lvvit_m", pretrained, {"embed_dim": 512, "depth": 20, "num_heads": 8}, given)


@register_model
def lvvit_l(pretrained: bool = False, **given: Any) -> LVViT:
    """LV-ViT-L: 150 M parameters, 86.2 % at 448 pixels."""
    size = {"embed_dim": 768, "depth": 24, "num_heads": 12, "skip_lam": 3.0, "stem_width": 128}
    return _create("lvvit_l", pretrained, size, given)


class LVViTBackbone(TimmViT):
    """The backbone's entry in the registry; see :class:`evit_deploy.tokens.backbone.Backbone`.

    Everything else is inherited from ``VisionTransformer``, including the reduced block, because λ takes the position
    of timm's layer scale.
    """

    @staticmethod
    def unsupported(model: Any) -> list[str]:
        """Reasons why this model cannot be reduced exactly; empty if it can."""
        return unusual_blocks(model) if isinstance(model, LVViT) else ["it is not an LV-ViT"]

    @staticmethod
    def channels(model: Any) -> int:
        """Channels of the input image."""
        return model.patch_embed.conv1.in_channels

    @staticmethod
    def cost(model: Any) -> ModelCost:
        """Multiply-adds of the parts, including three convolutions at half the resolution and a classifier on every
        token."""
        plain, stem = TimmViT.cost(model), model.patch_embed
        height, width = stem.img_size
        convolutions = sum(conv.weight.numel() for conv in (stem.conv1, stem.conv2, stem.conv3))
        aux = model.aux_head.weight.numel() if isinstance(model.aux_head, nn.Linear) else 0
        return msgspec.structs.replace(
            plain,
            stem=plain.stem + (height // 2) * (width // 2) * convolutions,
            token_head=aux,
            head_tokens=0 if aux else plain.head_tokens,
        )

    @staticmethod
    def lower(model: Any) -> Any:
        """A copy in export form: batch norms folded into convolutions, λ into the layer before it, tokens in 2-D."""
        lowered = TimmViT.lower(model)
        stem = lowered.patch_embed
        for number in "123":
            conv, norm = getattr(stem, f"conv{number}"), getattr(stem, f"bn{number}")
            setattr(stem, f"conv{number}", _folded(conv, norm))
            setattr(stem, f"bn{number}", nn.Identity())
        for block in lowered.blocks:
            if isinstance(block.ls1, Divide):
                block.attn.proj = _divided(block.attn.proj, block.ls1.by)
                block.mlp.inner.fc2 = _divided(block.mlp.inner.fc2, block.ls2.by)
                block.ls1, block.ls2 = nn.Identity(), nn.Identity()
        if isinstance(lowered.aux_head, nn.Linear):
            lowered.aux_head = LoweredMlp(lowered.aux_head)
        return lowered


def _folded(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> nn.Conv2d:
    # In FP64, so that a folded weight is rounded only once, at the end; works on copies of the parameters.
    wide = fuse_conv_bn_eval(copy.deepcopy(conv).double().eval(), copy.deepcopy(norm).double().eval())
    return wide.to(conv.weight.dtype).requires_grad_(False)


def _divided(linear: nn.Linear, by: float) -> nn.Linear:
    part = nn.Linear(linear.in_features, linear.out_features, device="meta")
    part.weight = nn.Parameter(linear.weight.detach() / by, requires_grad=False)
    part.bias = nn.Parameter(linear.bias.detach() / by, requires_grad=False)
    return part
