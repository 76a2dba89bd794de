"""Released LeViT and Evo-LeViT: identifies the size, and renames the tensors.

An Evo-LeViT file holds its blocks twice, as ``blocks`` and, for the stage-wise forward pass, as ``stage_blocks``; our
model uses only the first names. A LeViT file from Facebook has no stage names, and stores index tables that follow from
the grid. It is converted to timm's names, which have stages and no tables.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec
import torch
from torch import Tensor

from evit_deploy.errors import CheckpointError, first_few
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.levit import HEADS, SIZES
from evit_deploy.models.levit_reduction import DENSE_BLOCKS, METHOD
from evit_deploy.tokens.plan import TokenSpec

_DUPLICATES = "stage_blocks."
_TABLE = "attention_bias_idxs"


def is_evo_levit(weights: dict[str, Tensor]) -> bool:
    """Whether a file is an Evo-LeViT, by its stem and tokens."""
    return weights.keys() >= set(SIGNS[0])


def is_levit(weights: dict[str, Tensor]) -> bool:
    """Whether a file is a LeViT as released by Facebook."""
    return weights.keys() >= set(SIGNS[1])


def is_timm_levit(weights: dict[str, Tensor]) -> bool:
    """Whether a file is a LeViT under timm's names."""
    return weights.keys() >= set(SIGNS[2])


SIGNS = (
    ("patch_embed.0.c.weight", "cls_token", "poss"),
    ("patch_embed.0.c.weight", "blocks.0.m.attention_biases"),
    ("stem.conv1.linear.weight", "stages.0.blocks.0.attn.attention_biases"),
)
"""Names found in all files of Evo-LeViT, of LeViT, and of timm's LeViT."""


def find(held: Held) -> Found | None:
    """Identifies which of the three a file is, and its size; ``None`` for other families."""
    weights, where = held.inside(), held.where
    if is_evo_levit(weights):
        found = find_evo_levit(where, weights)
    elif is_levit(weights):
        found = find_levit(where, weights)
    elif is_timm_levit(weights):
        found = find_timm_levit(where, weights)
    else:
        return None
    named = held.model or (held.config or {}).get("architecture")
    if named is not None and named != found.model:
        raise CheckpointError(
            f"the weights are not those of {named}", where=where, seen=f"the tensors of {found.model}",
            fix="Leave out --model to have the architecture read from the tensors.",
        )  # fmt: skip
    return msgspec.structs.replace(found, left_out={n: v for n, v in held.weights.items() if n not in weights})


# ---- Evo-LeViT

TRAINED = TokenSpec(keep_rate=0.5, fuse=False, method=METHOD)
"""The reduction that all released Evo-LeViTs were trained with, at the method's default locations."""


def find_evo_levit(where: object, weights: dict[str, Tensor]) -> Found:
    """Identifies the size, image size and classifiers of an Evo-LeViT file.

    Args:
        where: The file, for messages.
        weights: Its tensors.

    Raises:
        CheckpointError: The size is unknown, or duplicated tensors differ.
    """
    own = without_duplicates(where, weights)
    widths, keys, depth = _evo_shape(own)
    known = {(s["embed_dim"], _key_widths(s), s["depth"]): name for name, s in SIZES.items()}
    model = known.get((widths, keys, depth))
    if model is None:
        raise CheckpointError(
            "an Evo-LeViT of unknown size", where=where,
            seen=f"widths {widths}, widths of the keys {keys}, blocks {depth}", wanted=", ".join(SIZES),
        )  # fmt: skip
    args: dict[str, Any] = {"num_classes": _classes(own), "img_size": 16 * _side(where, own["poss"].shape[1] - 1)}
    heads = tuple(head for head in HEADS if any(name.startswith(f"{head}.") for name in own))
    if heads != HEADS and args["num_classes"]:
        args["heads"] = list(heads)
    return Found(model, args, own, TRAINED)


def _key_widths(size: dict[str, Any]) -> tuple[int, ...]:
    return tuple(size["key_dim"] * heads for heads in size["num_heads"])


def _evo_shape(weights: dict[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Width, key width and number of blocks of each stage."""
    widths, keys, depth = [], [], []
    for number in range(1 + max((int(n.split(".")[1]) for n in weights if re.match(r"blocks\.\d+\.", n)), default=-1)):
        qkv = weights.get(f"blocks.{number}.m1.m.qkv.c.weight")
        if qkv is None or qkv.dim() != 2:
            continue
        if f"blocks.{number - 1}.m1.m.qkv.c.weight" not in weights:
            widths.append(qkv.shape[1])
            keys.append(qkv.shape[0] // 4)
            depth.append(0)
        depth[-1] += 1
    return tuple(widths), tuple(keys), tuple(depth)


def without_duplicates(where: object, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops the duplicated tensors of an Evo-LeViT file.

    Raises:
        CheckpointError: A duplicate differs from its original, or has none.
    """
    own = {name: value for name, value in weights.items() if not name.startswith(_DUPLICATES)}
    if len(own) == len(weights):
        return own
    first_of = {second: first for first, second in _evo_names(own)}
    odd = [
        name
        for name, value in weights.items()
        if name.startswith(_DUPLICATES)
        and (name not in first_of or value.shape != own[first_of[name]].shape or not _equal(value, own[first_of[name]]))
    ]
    if odd:
        raise CheckpointError(
            "not one model: tensors that an Evo-LeViT file holds twice differ", where=where, seen=first_few(odd),
            wanted="the same values under blocks.*", fix="Save the model again.",
        )  # fmt: skip
    return own


def with_duplicates(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts to the released form of an Evo-LeViT, with every block under its second name too."""
    return weights | {second: weights[first] for first, second in _evo_names(weights)}


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one.data_ptr() == other.data_ptr() and one.stride() == other.stride()
    return same or torch.equal(one, other)


def _evo_names(weights: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of a block's names, first and second.

    The second names follow the stage-wise pass: an entry for each half of the dense blocks, one entry with all other
    halves of the stage, then one each for the downsampling and its MLP.
    """
    *_, depth = _evo_shape(weights)
    second: dict[str, str] = {}
    number = entry = 0
    for stage, count in enumerate(depth):
        if stage:
            second |= {f"blocks.{number}": f"{entry}", f"blocks.{number + 1}": f"{entry + 1}"}
            number, entry = number + 2, entry + 2
        dense = min(count, DENSE_BLOCKS) if stage == 0 else 0
        for block in range(dense):
            second |= {f"blocks.{number + block}.m{half}": f"{entry + 2 * block + half - 1}" for half in (1, 2)}
        entry += 2 * dense
        for place, block in enumerate(range(dense, count)):
            second |= {f"blocks.{number + block}.m{half}": f"{entry}.m.{2 * place + half - 1}" for half in (1, 2)}
        number, entry = number + count, entry + (count > dense)
    for name in weights:
        parts = name.split(".")
        for length in (2, 3):
            begin = ".".join(parts[:length])
            if begin in second and len(parts) > length:
                yield name, ".".join((f"{_DUPLICATES}{second[begin]}", *parts[length:]))
                break


def _classes(weights: dict[str, Tensor]) -> int:
    head = weights.get("head.l.weight", weights.get("head.linear.weight"))
    return head.shape[0] if head is not None else 0


def _side(where: object, places: int) -> int:
    side = math.isqrt(max(places, 0))
    if side == 0 or side * side != places:
        raise CheckpointError("position embeddings that do not form a square", where=where, seen=f"{places} patches")
    return side


# ---- LeViT, whose model is timm's


def find_levit(where: object, weights: dict[str, Tensor]) -> Found:
    """Identifies the size and classes of a Facebook LeViT file, and renames its tensors to timm's names.

    Raises:
        CheckpointError: The size is unknown, or the image size differs from the only one that timm builds.
    """
    renamed = dict(_timm_names(weights))
    model = _levit_of_size(where, _levit_shape(weights))
    own = {new: weights[old] for old, new in renamed.items() if not new.endswith(_TABLE)}
    odd = [old for old, new in renamed.items() if new.endswith(_TABLE) and not _is_table(weights, old)]
    if odd:
        raise CheckpointError("attention biases of a different grid", where=where, seen=first_few(odd))
    return _timm_levit(where, model, own)


def find_timm_levit(where: object, weights: dict[str, Tensor]) -> Found:
    """Identifies the size and classes of a LeViT file under timm's names.

    Raises:
        CheckpointError: The size is unknown, or the image size differs from the only one that timm builds.
    """
    widths, keys, depth = [], [], []
    for stage in range(3):
        first = weights.get(f"stages.{stage}.blocks.0.attn.qkv.linear.weight")
        if first is not None and first.dim() == 2:
            widths.append(first.shape[1])
            keys.append(first.shape[0] // 4)
            depth.append(
                sum(bool(re.fullmatch(rf"stages\.{stage}\.blocks\.\d+\.attn\.qkv\.linear\.weight", n)) for n in weights)
            )
    return _timm_levit(where, _levit_of_size(where, (tuple(widths), tuple(keys), tuple(depth))), dict(weights))


def _timm_levit(where: object, model: str, weights: dict[str, Tensor]) -> Found:
    side = _side(where, weights["stages.0.blocks.0.attn.attention_biases"].shape[1])
    args: dict[str, Any] = {"num_classes": _classes(weights), "img_size": 16 * side}
    if args["num_classes"] and "head_dist.linear.weight" not in weights:
        args["distilled"] = False
    return Found(model, args, weights)


def _levit_of_size(where: object, shape: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]) -> str:
    known = {(s["embed_dim"], _key_widths(s), s["depth"]): name.removeprefix("evo_") for name, s in SIZES.items()}
    if shape not in known:
        raise CheckpointError(
            "a LeViT of unknown size", where=where,
            seen=f"widths {shape[0]}, widths of the keys {shape[1]}, blocks {shape[2]}",
            wanted=", ".join(known.values()),
        )  # fmt: skip
    return known[shape]


def to_facebook(weights: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    """Converts a LeViT from timm's form to Facebook's.

    Args:
        weights: Tensors under timm's names.
        names: Tensors of a Facebook file of the same size, for its names and tables.
    """
    return {old: names[old] if new.endswith(_TABLE) else weights[new] for old, new in _timm_names(names)}


def _levit_shape(weights: dict[str, Tensor]) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    widths, keys, depth = [], [], []
    for kind, number in _levit_entries(weights):
        if kind == "attention":
            qkv = weights[f"blocks.{number}.m.qkv.c.weight"]
            if not depth or depth[-1] < 0:
                depth[-1:] = [0]
                widths.append(qkv.shape[1])
                keys.append(qkv.shape[0] // 4)
            depth[-1] += 1
        elif kind == "downsample":
            depth.append(-1)
    return tuple(widths), tuple(keys), tuple(depth)


def _levit_entries(weights: dict[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Kind and index of each entry of ``blocks``, in order."""
    parts: dict[int, set[str]] = {}
    for name in weights:
        if re.match(r"blocks\.\d+\.", name):
            _, number, *rest = name.split(".")
            parts.setdefault(int(number), set()).add(".".join(rest[:2]))
    for number, inner in sorted(parts.items()):
        yield "attention" if "m.qkv" in inner else "downsample" if "kv.c" in inner else "mlp", number


def _timm_names(weights: dict[str, Tensor]) -> Iterator[tuple[str, str]]:
    """Pairs of a tensor's name at Facebook and in timm."""
    prefixes: dict[str, str] = {f"patch_embed.{2 * i}": f"stem.conv{i + 1}" for i in range(4)}
    stage = block = 0
    downsampled = False
    for kind, number in _levit_entries(weights):
        here = f"blocks.{number}"
        if kind == "downsample":
            stage, block, downsampled = stage + 1, 0, True
            prefixes |= {
                f"{here}.kv": f"stages.{stage}.downsample.attn_downsample.kv",
                f"{here}.q.1": f"stages.{stage}.downsample.attn_downsample.q.ln",
                f"{here}.proj.1": f"stages.{stage}.downsample.attn_downsample.proj.ln",
                here: f"stages.{stage}.downsample.attn_downsample",
            }
        elif kind == "attention":
            into = f"stages.{stage}.blocks.{block}.attn"
            prefixes |= {f"{here}.m.qkv": f"{into}.qkv", f"{here}.m.proj.1": f"{into}.proj.ln", f"{here}.m": into}
        else:
            into = f"stages.{stage}.downsample.mlp" if downsampled else f"stages.{stage}.blocks.{block}.mlp"
            prefixes |= {f"{here}.m.0": f"{into}.ln1", f"{here}.m.2": f"{into}.ln2"}
            block, downsampled = block + (not downsampled), False
    for name in weights:
        parts = name.split(".")
        for length in range(len(parts) - 1, 0, -1):
            begin, rest = ".".join(parts[:length]), parts[length:]
            if begin in prefixes:
                layer = ["linear"] if rest[0] == "c" else rest[:1]
                yield name, ".".join((prefixes[begin], *layer, *rest[1:]))
                break
        else:
            head, *rest = parts
            yield name, ".".join((head, *("linear" if part == "l" else part for part in rest)))


def _is_table(weights: dict[str, Tensor], name: str) -> bool:
    """Whether an index table equals the one that timm computes: row distance times columns, plus column distance."""
    table = weights[name]
    columns = math.isqrt(table.shape[1])
    places = torch.arange(table.shape[1])
    stride = 1 if table.shape[0] == table.shape[1] else 2
    asking = places.reshape(columns, columns)[::stride, ::stride].flatten()
    if table.shape[0] != len(asking):
        return False
    rows = (asking[:, None] // columns - places // columns).abs()
    return torch.equal(table.long(), rows * columns + (asking[:, None] % columns - places % columns).abs())
