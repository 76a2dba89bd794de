"""Shared by the benchmarks: a seeded DeiT-S in the released layout, and saving results with their origin."""

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import timm
import torch

from evit_deploy.environment.machine import device, versions


def deit_small() -> Any:
    """DeiT-S with seeded weights that are as general as trained ones."""
    return general_weights("deit_small_patch16_224")


def general_weights(name: str) -> Any:
    """A timm VisionTransformer with seeded weights that are as general as trained ones.

    timm's initial weights are not: biases are 0 and norms 1, which an exporter folds away, and queries and keys are so
    small that all scores are nearly equal.
    """
    torch.manual_seed(0)
    model = timm.create_model(name)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.1 * torch.randn_like(parameter)
        for block in model.blocks:
            block.attn.qkv.weight[: 2 * model.embed_dim] *= 4
    return model.eval()


def save(out: Path | None, figures: Any) -> None:
    """Writes the figures with command, machine and versions."""
    if out is not None:
        command = shlex.join(["python", *sys.argv])
        document = {"command": command, "device": device(), "versions": versions(), "figures": figures}
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(document, indent=2) + "\n")
