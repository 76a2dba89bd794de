"""Evo-ViT's DeiT as its authors release it: the names of its tensors, to timm's and back, exactly.

They hold the parts of the attention apart (``qks.i.qk`` has the rows of q and then those of k, ``vs.i.v`` those of v)
and classify from the mean of all patches, so that their ``norm`` is timm's ``fc_norm``. ``norm_cls`` and ``head_cls``,
the class token's head in training, have the same names in both.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

_SIGN = "qks.0.qk.weight"
MODEL_ARGS = {"global_pool": "avg"}
"""What such a model is built with."""
_PARTS = ("weight", "bias")
_BLOCK = {"norms.{}": "blocks.{}.norm1", "projs.{}": "blocks.{}.attn.proj"}


def is_evo_vit(weights: Mapping[str, Tensor]) -> bool:
    """Whether tensors have these names."""
    return _SIGN in weights


def _renamed(depth: int) -> dict[str, str]:
    """Tensors that are the same under another name: released to timm's."""
    pairs = {"norm": "fc_norm"}
    pairs |= {theirs.format(i): ours.format(i) for i in range(depth) for theirs, ours in _BLOCK.items()}
    return {f"{theirs}.{part}": f"{ours}.{part}" for theirs, ours in pairs.items() for part in _PARTS}


def to_timm(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Released names to timm's; tensors of other names are left as they are, and so is what is not complete."""
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
    """The way back: timm's names to the released ones."""
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
