"""Builds a model from a timm name and arguments that a file can hold."""

import functools
from collections.abc import Mapping
from typing import Any

from torch import nn

from evit_deploy.errors import CheckpointError

# Arguments of timm.create_model that are no architecture's: they read files, ask networks or change what is built.
_OUTSIDE = {"checkpoint_path", "cache_dir", "features_only", "feature_cfg", "scriptable", "exportable", "no_jit"}


def create_model(name: str, args: Mapping[str, Any]) -> Any:
    """Builds a model with random weights.

    Args:
        name: timm name.
        args: Arguments of ``timm.create_model`` as JSON values; ``act_layer`` is timm's name of the activation. And
            ``norm_eps``, the epsilon of every LayerNorm, which timm takes only within a function; and ``projection``,
            the width of an embedding that a matrix makes of the features, as in CLIP: the model has no classes then.

    Raises:
        CheckpointError: The name or an argument would have timm read a file or ask a network.
        TypeError: The architecture has no such argument; others of timm's for values that do not fit.
    """
    import timm
    from timm.layers import LayerNorm

    outside = [key for key in args if key in _OUTSIDE or key.startswith("pretrained")]
    if ":" in name or outside:  # `hf-hub:` and `local-dir:` in a name
        raise CheckpointError(
            "a checkpoint may say what a model is, not where timm gets one from", where=name,
            seen=", ".join(outside) or name, wanted="an architecture's name and its arguments",
        )  # fmt: skip
    given = dict(args)
    projection = given.pop("projection", None)
    if "norm_eps" in given:
        given["norm_layer"] = functools.partial(LayerNorm, eps=given.pop("norm_eps"))
    model: Any = timm.create_model(name, pretrained=False, **given)
    if projection is not None:
        model.head = nn.Linear(model.num_features, projection, bias=False)
    return model
