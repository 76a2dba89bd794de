"""Builds a model from a timm name and arguments that a file can hold."""

import functools
from collections.abc import Mapping
from typing import Any


def create_model(name: str, args: Mapping[str, Any]) -> Any:
    """Builds a model with random weights.

    Args:
        name: timm name.
        args: Arguments of ``timm.create_model`` as JSON values; ``act_layer`` is timm's name of the activation. And
            ``norm_eps``, the epsilon of every LayerNorm, which timm takes only within a function.

    Raises:
        TypeError: The architecture has no such argument; others of timm's for values that do not fit.
    """
    import timm
    from timm.layers import LayerNorm

    given = dict(args)
    if "norm_eps" in given:
        given["norm_layer"] = functools.partial(LayerNorm, eps=given.pop("norm_eps"))
    return timm.create_model(name, pretrained=False, **given)
