"""Small seeded models of other projects: the files that their own code writes, and its outputs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import safetensors.torch
import torch
import torchvision
import transformers
from torch import Tensor, nn

from evit_deploy.models.checkpoint import Checkpoint
from evit_deploy.models.files.prefixes import inside
from evit_deploy.models.identify import Identity, identify
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.known import LAYOUTS, SIGNS

SIZE = 96
_SMALL: dict[str, Any] = {
    "hidden_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "intermediate_size": 100,
    "image_size": SIZE,
    "patch_size": 16,
    "id2label": {i: f"class {i}" for i in range(5)},
    "label2id": {f"class {i}": i for i in range(5)},
}
_DINOV2 = {key: value for key, value in _SMALL.items() if key not in ("intermediate_size", "id2label", "label2id")}
_DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 64,
    "mask_ratio": 0.0,
}


class Owner(msgspec.Struct, frozen=True):
    """A model of another project.

    Args:
        make: Builds it with arbitrary weights.
        answer: Computes its output for images.
        model: Expected timm name.
        output: Expected kind of output.
        left_out: Name prefixes of the tensors without a counterpart in timm.
    """

    make: Callable[[], nn.Module]
    answer: Callable[[Any, Tensor], Tensor]
    model: str
    output: str = "logits"
    left_out: tuple[str, ...] = ()


def _logits(model: Any, images: Tensor) -> Tensor:
    return model(images).logits


def _class_token(model: Any, images: Tensor) -> Tensor:
    return model(images).last_hidden_state[:, 0]


def _of_encoder(model: Any, images: Tensor) -> Tensor:
    return model.vit(images).last_hidden_state[:, 0]


def _torchvision() -> nn.Module:
    return torchvision.models.VisionTransformer(SIZE, 16, 4, num_heads=2, hidden_dim=128, mlp_dim=100, num_classes=5)


def _vit(**more: Any) -> Any:
    return transformers.ViTConfig(**_SMALL, **more)


def _dinov2(**more: Any) -> Any:
    return transformers.Dinov2Config(**_DINOV2, **({"mlp_ratio": 2} | more))


OWNERS = {
    "ViT": Owner(lambda: transformers.ViTForImageClassification(_vit()), _logits, "vit_tiny_patch16_224"),
    "ViT, other settings": Owner(
        lambda: transformers.ViTForImageClassification(_vit(layer_norm_eps=0.1, hidden_act="relu", qkv_bias=False)),
        _logits, "vit_tiny_patch16_224",
    ),
    "ViT, GELU by tanh": Owner(
        lambda: transformers.ViTForImageClassification(_vit(hidden_act="gelu_pytorch_tanh")),
        _logits, "vit_tiny_patch16_224",
    ),
    "ViT with a pooler": Owner(
        lambda: transformers.ViTModel(_vit()), _class_token, "vit_tiny_patch16_224", "embedding", ("pooler.",)
    ),
    "ViT without a pooler": Owner(
        lambda: transformers.ViTModel(_vit(), add_pooling_layer=False), _class_token, "vit_tiny_patch16_224",
        "embedding",
    ),
    "ViT-MSN": Owner(
        lambda: transformers.ViTMSNModel(transformers.ViTMSNConfig(**_SMALL)), _class_token, "deit_tiny_patch16_224",
        "embedding",
    ),
    "DeiT": Owner(
        lambda: transformers.DeiTForImageClassification(transformers.DeiTConfig(**_SMALL)), _logits,
        "deit_tiny_patch16_224",
    ),
    "DeiT with its teacher": Owner(
        lambda: transformers.DeiTForImageClassificationWithTeacher(transformers.DeiTConfig(**_SMALL)), _logits,
        "deit_tiny_distilled_patch16_224",
    ),
    "ViT-MAE": Owner(
        lambda: transformers.ViTMAEForPreTraining(transformers.ViTMAEConfig(**_SMALL, **_DECODER)), _of_encoder,
        "deit_tiny_patch16_224", "embedding", ("../decoder.",),
    ),
    "DINOv2": Owner(
        lambda: transformers.Dinov2Model(_dinov2()), _class_token, "vit_small_patch14_dinov2", "embedding",
        ("embeddings.mask_token",),
    ),
    "DINOv2, SwiGLU": Owner(
        lambda: transformers.Dinov2Model(_dinov2(use_swiglu_ffn=True, mlp_ratio=4)), _class_token,
        "vit_giant_patch14_dinov2", "embedding", ("embeddings.mask_token",),
    ),
    "DINOv2 with registers": Owner(
        lambda: transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(**_DINOV2, mlp_ratio=2, num_register_tokens=3)
        ),
        _class_token, "vit_small_patch14_reg4_dinov2", "embedding", ("embeddings.mask_token",),
    ),
    "torchvision": Owner(_torchvision, lambda model, images: model(images), "deit_tiny_patch16_224"),
}  # fmt: skip
FAMILIES = ("ViT", "DeiT", "DeiT with its teacher", "ViT-MAE", "DINOv2", "DINOv2, SwiGLU", "DINOv2 with registers",
            "torchvision")  # fmt: skip
"""One model per layout, for tests of the whole conversion."""


def draw_(model: nn.Module, seed: int = 0) -> Any:
    """Redraws all parameters, so that each of them matters; sets evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 1 and name.endswith(("weight", "lambda1")):
                parameter.copy_(1 + 0.2 * noise)
            elif parameter.dim() > 1 and not name.endswith(("token", "tokens", "embeddings", "embedding")):
                parameter.copy_(noise / parameter[0].numel() ** 0.5)
            else:
                parameter.copy_(0.3 * noise)
    return model.eval()


def owned(name: str) -> Any:
    """The seeded model of one of ``OWNERS``."""
    return draw_(OWNERS[name].make())


def pictures(count: int = 3, size: int = SIZE) -> Tensor:
    """Normally distributed inputs."""
    return torch.randn(count, 3, size, size, generator=torch.Generator().manual_seed(1))


def written(model: Any, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any] | None]:
    """Saves a model with its project's own code; returns the file's tensors and the config."""
    if not hasattr(model, "save_pretrained"):
        return dict(model.state_dict()), None
    model.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    return safetensors.torch.load_file(folder / "model.safetensors"), config


def found_in(weights: dict[str, Tensor], config: dict[str, Any] | None = None) -> tuple[Found, str]:
    """The result of identifying tensors, and the prefix of the model among them."""
    held = inside(Path("weights"), weights, SIGNS)
    asked = Held("weights", held.weights, config)
    found = next(found for found in (layout.find(asked) for layout in LAYOUTS) if found is not None)
    return found, held.prefix


def identified(weights: dict[str, Tensor], config: dict[str, Any] | None = None, model: str | None = None) -> Identity:
    """:func:`identify`, for tensors with the names of a file."""
    return identify(Path("weights"), inside(Path("weights"), weights, SIGNS), model, (), config)


def checkpoint_of(identity: Identity, source: str = "weights") -> Checkpoint:
    """A checkpoint from an identified model."""
    return Checkpoint(source, None, identity.weights, identity.model, identity.model_args)


def name_in_file(name: str, prefix: str) -> str:
    """A tensor's name in the file; see :class:`evit_deploy.models.files.prefixes.Inside`."""
    parent = prefix[: prefix[:-1].rfind(".") + 1] if prefix else ""
    if name.startswith("../"):
        return parent + name[3:]
    return name[1:] if name.startswith("/") else prefix + name


def apart(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference, relative to the owner's largest number."""
    assert ours.shape == theirs.shape
    return float((ours - theirs).abs().max() / theirs.abs().max())
