"""evit-deploy: from a pretrained vision transformer to a faster one that is proven to give the same answers.

The public names below are loaded on first use (PEP 562), so that ``evit-deploy --help`` never pays for PyTorch.
"""

import importlib
import sys
import types
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evit_deploy.bundle import Bundle, read_bundle
    from evit_deploy.checkpoint import Checkpoint, build_model, read_checkpoint
    from evit_deploy.convert import convert
    from evit_deploy.errors import (
        CheckpointError,
        EvitDeployError,
        GateFailed,
        InputError,
        MissingRequirement,
        RecipeError,
        StageError,
        UnsupportedModelError,
    )
    from evit_deploy.export import export_onnx
    from evit_deploy.manifest import Manifest
    from evit_deploy.package import package
    from evit_deploy.pipeline import run
    from evit_deploy.precision import set_precision
    from evit_deploy.profile import profile
    from evit_deploy.recipe import Recipe, load_recipe
    from evit_deploy.report import Check, Report
    from evit_deploy.tokens.plan import BlockPlan, TokenPlan, TokenSpec, make_plan
    from evit_deploy.tokens.reduce import reduce_tokens_, set_keep_rate_, token_plan
    from evit_deploy.train import train
    from evit_deploy.variants import slice_twin
    from evit_deploy.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "evit_deploy.bundle": ("Bundle", "Manifest", "read_bundle"),
    "evit_deploy.checkpoint": ("Checkpoint", "build_model", "read_checkpoint"),
    "evit_deploy.convert": ("convert",),
    "evit_deploy.errors": (
        "CheckpointError",
        "EvitDeployError",
        "GateFailed",
        "InputError",
        "MissingRequirement",
        "RecipeError",
        "StageError",
        "UnsupportedModelError",
    ),
    "evit_deploy.export": ("export_onnx",),
    "evit_deploy.package": ("package",),
    "evit_deploy.pipeline": ("run",),
    "evit_deploy.precision": ("set_precision",),
    "evit_deploy.profile": ("profile",),
    "evit_deploy.recipe": ("Recipe", "load_recipe"),
    "evit_deploy.report": ("Check", "Report"),
    "evit_deploy.tokens.plan": ("BlockPlan", "TokenPlan", "TokenSpec", "make_plan"),
    "evit_deploy.tokens.reduce": ("reduce_tokens_", "set_keep_rate_", "token_plan"),
    "evit_deploy.train": ("train",),
    "evit_deploy.variants": ("slice_twin",),
    "evit_deploy.verify": ("verify",),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "BlockPlan",
    "Bundle",
    "Check",
    "Checkpoint",
    "CheckpointError",
    "EvitDeployError",
    "GateFailed",
    "InputError",
    "Manifest",
    "MissingRequirement",
    "Recipe",
    "RecipeError",
    "Report",
    "StageError",
    "TokenPlan",
    "TokenSpec",
    "UnsupportedModelError",
    "build_model",
    "convert",
    "export_onnx",
    "load_recipe",
    "make_plan",
    "package",
    "profile",
    "read_bundle",
    "read_checkpoint",
    "reduce_tokens_",
    "run",
    "set_keep_rate_",
    "set_precision",
    "slice_twin",
    "token_plan",
    "train",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME_OF[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(types.ModuleType):
    """Keeps ``verify``, ``profile``, ``convert``, ``train`` and ``package`` what ``__all__`` says they are.

    Each is also the name of the module it lives in, and importing a submodule sets it on its package: the second
    ``from evit_deploy import verify`` would give the module. ``from evit_deploy.verify import ...`` reaches into it.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME_OF and isinstance(value, types.ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
