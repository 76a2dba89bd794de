"""Evo-ViT's DeiT as released by its authors: conversion of its tensor names to timm's and back.

The files split the attention (``qks.i.qk`` has the rows of q followed by those of k, ``vs.i.v`` those of v). The model
classifies from the mean of all patches, so ``norm`` is timm's ``fc_norm``. ``norm_cls`` and ``head_cls``, the class
token's head in training, have the same names in both.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_SIGN = "qks.0.qk.weight"
MODEL_ARGS = {"global_pool": "avg"}
"""Arguments for building such a model."""
_PARTS = ("weight", "bias")
_BLOCK = {"norms.{}": "blocks.{}.norm1", "projs.{}": "blocks.{}.attn.proj"}


def is_evo_vit(weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors have these names."""
    return _SIGN in weights


def _renamed(depth: int) -> dict[str, str]:
    """Tensors that differ only in name: released -> timm."""
    pairs = {"norm": "fc_norm"}
    pairs |= {theirs.format(i): ours.format(i) for i in range(depth) for theirs, ours in _BLOCK.items()}
    return {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in pairs.items() for part in _PARTS}


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts released names to timm's; leaves other tensors and incomplete sets unchanged."""
    found = dict(weights)
    depth = sum(name.startswith("qks.") and name.endswith(".qk.weight") for name in weights)
    for theirs, ours in _renamed(depth).items():
        if theirs in found:
            found[ours] = found.pop(theirs)
    for block in range(depth):
        for part in _PARTS:
            qk, v = f"qks.{block}.qk.{part}", f"vs.{block}.v.{part}"
            if qk in found and v in found:
                found[f"blocks.{block}.attn.qkv.{part}"] = torch.cat([found.pop(qk), found.pop(v)])
    return found


def to_released(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Converts timm's names to the released ones."""
    found = dict(weights)
    depth = sum(name.endswith(".attn.qkv.weight") for name in weights)
    for theirs, ours in _renamed(depth).items():
        if ours in found:
            found[theirs] = found.pop(ours)
    for block in range(depth):
        for part in _PARTS:
            qkv = found.pop(f"blocks.{block}.attn.qkv.{part}")
            width = len(qkv) // 3
            found[f"qks.{block}.qk.{part}"], found[f"vs.{block}.v.{part}"] = qkv[: 2 * width], qkv[2 * width :]
    return found
