"""Models with effective predictors, for tests of DynamicViT and its training."""

from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

from evit_deploy.tokens.methods import dynamicvit
from evit_deploy.tokens.plan import TokenSpec
from evit_deploy.tokens.reduce import reduce_tokens_
from tests.support.families import create
from tests.support.method_oracles.vit import Model
from tests.support.official import Official

SPEC = TokenSpec(keep_rate=0.6, method="dynamicvit")
HEADS = {"deit": (3, 1e-6, 1.0), "lvvit": (3, 1e-5, 2.0), "lvvit_lambda_3": (4, 1e-5, 3.0)}


def reduced(name: str, spec: TokenSpec = SPEC) -> Any:
    """A model whose predictors have an effect; initial ones hardly distinguish patches."""
    model: Any = reduce_tokens_(create(name), spec)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for key, parameter in sorted(model.score_predictor.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "in_conv.0.weight" in key:
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * (1.5 * parameter.shape[1] ** -0.5 if parameter.ndim == 2 else 0.3))
    return model


def as_oracle(model: nn.Module, name: str) -> Model:
    heads, eps, skip = HEADS[name]
    return Model({key: value.numpy() for key, value in model.state_dict().items()}, heads, eps=eps, skip=skip)


def released(file: Official, weights: dict[str, np.ndarray], name: str) -> Any:
    """A timm model with weights in a released layout, with their reduction."""
    tensors = {key: torch.from_numpy(value) for key, value in weights.items()}
    model: Any = timm.create_model(name, num_classes=100).eval()
    own = {key: value for key, value in tensors.items() if key.startswith("score_predictor.")}
    model.load_state_dict({key: value for key, value in tensors.items() if key not in own})
    if own:
        model.method_weights = own
        reduce_tokens_(model, TokenSpec(keep_rate=file.recipe["rate"], method="dynamicvit"))
    return model


OFFICIAL = {"dynamicvit_deit_tiny": "deit_tiny_patch16_224", "dynamicvit_lvvit_s": "lvvit_s"}


def with_noise(monkeypatch: pytest.MonkeyPatch, noise: np.ndarray) -> None:
    """Replaces the noise of the draws: ``[stages, B, patches, 2]``, location by location."""
    rows = iter(torch.from_numpy(noise[..., 0] - noise[..., 1]).float())
    monkeypatch.setattr(dynamicvit, "logistic_noise", lambda like: next(rows).to(like))
