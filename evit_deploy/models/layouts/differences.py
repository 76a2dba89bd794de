"""Describes how two sets of tensors differ."""

from collections.abc import Mapping

from torch import Tensor

from evit_deploy.errors import first_few


def differences_of(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """Describes how two sets of tensors differ in names and shapes; empty if they do not.

    Args:
        wanted: The tensors of a model.
        given: The tensors of the file.
    """
    shapes = [
        f"{name} {list(given[name].shape)} instead of {list(wanted[name].shape)}"
        for name in wanted
        if name in given and wanted[name].shape != given[name].shape
    ]
    found = (
        ("missing", [name for name in wanted if name not in given]),
        ("unexpected", [name for name in given if name not in wanted]),
        ("other shapes:", shapes),
    )
    return "; ".join(f"{label} {first_few(names)}" for label, names in found if names)
