"""Shared by the layouts of Hugging Face transformers: the config, its checks, and the conversion to timm."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import msgspec
from torch import Tensor

from evit_deploy.errors import CheckpointError, first_few
from evit_deploy.models.layouts import architecture
from evit_deploy.models.layouts.found import Found, Held
from evit_deploy.models.layouts.table import Row, Same, Table, joined_layers, layers

SIGN = ("embeddings.cls_token", "embeddings.patch_embeddings.projection.weight")
"""Names found in all files of ViT, DeiT, ViT-MAE and DINOv2."""

# Activation names in transformers -> in timm. Synonyms map to the same name.
_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
# Keys under which a config of several models stores that of its vision transformer.
_SECTIONS = ("vision_config", "backbone_config", "encoder")

EMBEDDINGS: tuple[Row, ...] = (
    Same("embeddings.cls_token", "cls_token"),
    *layers({"embeddings.patch_embeddings.projection": "patch_embed.proj", "layernorm": "norm"}),
)
"""Rows shared by all four; only the positions differ."""


class Family(msgspec.Struct, frozen=True):
    """A layout of transformers.

    Args:
        name: Name in messages.
        types: Its values of ``model_type`` in configs.
        tables: Its names, one table for each form in use.
        families: timm names to choose from, with ``{size}`` and ``{patch}``.
        norm_eps: Default epsilon of its LayerNorms.
        spare: Prefixes of tensor names that have no counterpart in timm and are left out.
    """

    name: str
    types: tuple[str, ...]
    tables: tuple[Table, ...]
    families: tuple[str, ...]
    norm_eps: float
    spare: tuple[str, ...] = ()


def blocks(theirs: str, attention: Sequence[str], mlp: Mapping[str, str]) -> tuple[Row, ...]:
    """Rows for transformer blocks.

    Args:
        theirs: Prefix of a block's names; ``{}`` stands for its index.
        attention: Names of q, k, v and the output projection.
        mlp: Names of the other layers -> names in timm.
    """
    q, k, v, output = (f"{theirs}.{name}" for name in attention)
    others = {f"{theirs}.{layer}": f"blocks.{{}}.{ours}" for layer, ours in mlp.items()}
    return (
        *joined_layers((q, k, v), "blocks.{}.attn.qkv"),
        *layers({output: "blocks.{}.attn.proj"} | others),
    )


OLD_ATTENTION = ("attention.attention.query", "attention.attention.key", "attention.attention.value",
                 "attention.output.dense")  # fmt: skip
"""Names in files: of transformers 4, and as written by 5."""
NEW_ATTENTION = ("attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj")
"""Names in the state dict of a transformers 5 model in memory."""


def config_of(held: Held, family: Family) -> dict[str, Any] | None:
    """The config of the vision transformer itself; ``None`` without a config, or if the user gave a model.

    Args:
        held: What the file holds.
        family: The layout of the tensors.

    Raises:
        CheckpointError: The config is for another architecture.
    """
    if held.config is None or "model_type" not in held.config:
        return None
    sections = [held.config, *(held.config.get(name) for name in _SECTIONS)]
    for section in sections:
        if isinstance(section, dict) and section.get("model_type") in family.types:
            return section
    if held.model is not None:
        return None
    raise CheckpointError(
        f"the tensors have the names of {family.name}, but its config.json describes a different architecture",
        where=held.where, seen=f"model_type {held.config['model_type']!r}", wanted=" or ".join(map(repr, family.types)),
        fix="If it is one nevertheless, name the timm architecture with --model: the config is then ignored.",
    )  # fmt: skip


def number(held: Held, config: Mapping[str, Any], name: str) -> Any:
    """A number from a config; ``None`` if it is missing.

    Raises:
        CheckpointError: It is not a positive number.
    """
    value = config.get(name)
    if isinstance(value, list) and value and all(item == value[0] for item in value):  # height and width
        value = value[0]
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or value <= 0):
        raise CheckpointError(
            f"a {name} in its config.json that is not valid", where=held.where, seen=repr(value)[:80],
            wanted="a number above 0",
        )  # fmt: skip
    return value


def activation(held: Held, config: Mapping[str, Any], default: str = "gelu") -> str:
    """timm's name for the activation in a config.

    Raises:
        CheckpointError: timm has no such activation.
    """
    name = config.get("hidden_act", default)
    if not isinstance(name, str) or name not in _ACTIVATIONS:
        raise CheckpointError(
            "an activation that is not supported", where=held.where, seen=f"hidden_act {name!r}",
            wanted=", ".join(sorted(_ACTIVATIONS)),
        )  # fmt: skip
    return _ACTIVATIONS[name]


def check(held: Held, config: Mapping[str, Any], shown: Mapping[str, Any]) -> None:
    """Checks that config and tensors describe the same model.

    Args:
        held: What the file holds.
        config: The config.
        shown: Values read from the tensors, under the config's names; ``None`` where unknown.

    Raises:
        CheckpointError: They differ.
    """
    differences = [
        f"{name} {number(held, config, name)} in the config and {value} in the tensors"
        for name, value in shown.items()
        if value is not None and number(held, config, name) not in (None, value)
    ]
    labels = config.get("id2label")
    classes = shown.get("num_labels")
    if isinstance(labels, dict) and classes and len(labels) != classes:
        differences.append(f"{len(labels)} labels in the config and {classes} rows in the classifier")
    if differences:
        raise CheckpointError(
            "its config.json contradicts the tensors", where=held.where, seen="; ".join(differences),
            fix="Take the config.json that was saved with these weights.",
        )  # fmt: skip


def to_timm(held: Held, family: Family) -> tuple[dict[str, Tensor], dict[str, Tensor], Table]:
    """Returns the tensors under timm's names, those left out, and the table that matches the file.

    Args:
        held: What the file holds.
        family: The layout.

    Raises:
        CheckpointError: The model has tensors unknown to the layout.
    """
    # Choose the table that leaves the fewest tensors over.
    ours, left, table = min(
        ((*table.to_timm(held.weights), table) for table in family.tables), key=lambda found: len(found[1])
    )
    odd = [name for name in left if not name.startswith(("../", "/", *family.spare))]
    if odd:
        raise architecture.leftover_error(held, family.name, odd)
    return ours, left, table


def find(held: Held, family: Family, *, notes: Collection[str] = (), **more: Any) -> Found:
    """Identifies a file of a transformers layout.

    Args:
        held: What the file holds.
        family: The layout.
        notes: Additional warnings.
        more: Arguments of the architecture that cannot be read from the tensors.

    Raises:
        CheckpointError: Config and tensors contradict each other, or there are tensors unknown to the layout.
    """
    ours, left, table = to_timm(held, family)
    needed = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "norm.weight")
    missing = [name for name in needed if name not in ours]
    if missing or ours["patch_embed.proj.weight"].dim() != 4 or ours["pos_embed"].dim() != 3:
        raise CheckpointError(
            f"not a whole {family.name}", where=held.where,
            seen="no tensors for " + first_few(missing) if missing else "a patch embedding or positions of other axes",
        )  # fmt: skip
    wanted = architecture.described(ours) | {"global_pool": "token", "no_embed_class": False}
    registers = wanted["reg_tokens"] + ("dist_token" in ours)
    wanted["img_size"] = architecture.image_size(
        held.where, ours["pos_embed"].shape[1], 1 + registers, wanted["patch_size"]
    )
    config, said = config_of(held, family), list(notes)
    heads = None
    wanted |= {"norm_eps": family.norm_eps} | more
    if config is not None:
        check(held, config, _shown(ours, wanted))
        heads = number(held, config, "num_attention_heads")
        wanted["norm_eps"] = number(held, config, "layer_norm_eps") or family.norm_eps
        if "act_layer" not in more:
            wanted["act_layer"] = activation(held, config)
    else:
        said.append(f"no config.json says more of it: LayerNorm eps {family.norm_eps:g} and GELU are assumed")
    name = held.model or architecture.nearest(family.families, wanted)
    args, assumed = architecture.arguments(held, name, wanted, heads)
    notes = (*said, *assumed)
    return Found(name, args, ours, notes=notes, left_out=left, prepared=False, table=table)


def _shown(ours: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """Values read from tensors, under the config's names."""
    hidden = ours.get("blocks.0.mlp.fc1.weight")
    gated = hidden is not None and ours["blocks.0.mlp.fc2.weight"].shape[1] != hidden.shape[0]
    return {
        "hidden_size": wanted["embed_dim"],
        "num_hidden_layers": wanted["depth"],
        "intermediate_size": None if hidden is None or gated else hidden.shape[0],
        "mlp_ratio": None if hidden is None or gated else hidden.shape[0] / wanted["embed_dim"],
        "patch_size": wanted["patch_size"],
        "image_size": wanted["img_size"],
        "num_channels": wanted["in_chans"],
        "num_register_tokens": wanted["reg_tokens"] or None,
        "num_labels": wanted["num_classes"] or None,
    }
