"""Models of several families for tests of the reduction, with weights that make every part matter."""

import math
import zlib
from typing import Any

import pytest
import timm
import torch
from torch import nn

from evit_deploy.registry import METHODS
from evit_deploy.tokens.backbone import load_backbones
from evit_deploy.tokens.plan import TokenSpec

load_backbones()  # registers our models with timm

# Small instances of the families: 16 patches, few blocks, different widths, prefixes, norms and heads.
MODELS = {
    "deit": ("deit_tiny_patch16_224", {"img_size": 64, "depth": 4}),
    "deit_distilled": ("deit_tiny_distilled_patch16_224", {"img_size": 64, "depth": 4}),
    "deit3": ("deit3_small_patch16_224", {"img_size": 64, "depth": 4}),
    "augreg": ("vit_tiny_patch16_224.augreg_in21k_ft_in1k", {"img_size": 64, "depth": 4}),
    "dinov2_registers": ("vit_small_patch14_reg4_dinov2", {"img_size": 56, "depth": 4, "num_classes": 10}),
    "test_vit": ("test_vit", {"img_size": 64}),
    "qk_norm": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4, "qk_norm": True, "qkv_bias": False}),
    "norms": ("vit_tiny_patch16_224", {"img_size": 64, "depth": 4, "scale_attn_norm": True, "init_values": 0.1}),
    "lvvit": ("lvvit_s", {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 3}),
    "lvvit_lambda_3": ("lvvit_l", {"img_size": 64, "embed_dim": 192, "depth": 4, "num_heads": 4, "stem_width": 16}),
}
SPEC = TokenSpec(keep_rate=0.6)


def spec_of(method: str, **fields: Any) -> TokenSpec:
    """Options for any method that keep about three fifths of the patches."""
    if METHODS.get(method).takes_keep_rate:
        return TokenSpec(**({"keep_rate": 0.6, "method": method} | fields))
    options: dict[str, Any] = {"merge": 3} | fields.pop("options", {})
    return TokenSpec(method=method, options=options, **fields)


each_method = pytest.mark.parametrize("method", METHODS.names())
each_model = pytest.mark.parametrize("name", MODELS)


def create(name: str) -> nn.Module:
    """A model with deterministic random weights, large enough that every part matters.

    timm initializes LayerScale, class token and biases close to zero, so that wrong code would pass.
    """
    model_name, options = MODELS[name]
    model = timm.create_model(model_name, pretrained=False, **options).eval()
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    with torch.no_grad():
        for key, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "norm" in key and key.endswith("weight"):
                parameter.copy_(1 + 0.2 * noise)
            elif key.endswith(("gamma",)):
                parameter.copy_(0.5 + 0.1 * noise)
            elif parameter.ndim >= 2 and key.endswith("weight"):
                parameter.copy_(noise * (1.2 / math.sqrt(parameter[0].numel())))
            else:
                parameter.copy_(0.5 * noise)
        for key, buffer in sorted(model.named_buffers()):
            if key.endswith(("running_mean", "running_var")):
                noise = torch.randn(buffer.shape, generator=generator)
                buffer.copy_(0.5 * noise if key.endswith("mean") else (0.3 * noise).exp())
    return model


def images(model: nn.Module, batch: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, 3, *model.patch_embed.img_size, generator=torch.Generator().manual_seed(seed))


@torch.inference_mode()
def logits(model: nn.Module, batch: int = 3) -> torch.Tensor:
    return model(images(model, batch))
