"""evit-deploy: from a pretrained vision transformer to a faster one that is proven to give the same answers.

The public names below are loaded on first use (PEP 562), so that ``evit-deploy --help`` never pays for PyTorch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evit_deploy.bundle.bundle import Bundle, read_bundle
    from evit_deploy.bundle.manifest import Manifest
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
    from evit_deploy.export.portable import export_onnx
    from evit_deploy.export.precision import set_precision
    from evit_deploy.export.variants import slice_twin
    from evit_deploy.models.checkpoint import Checkpoint, build_model, read_checkpoint
    from evit_deploy.pipeline.convert import convert
    from evit_deploy.pipeline.run import run
    from evit_deploy.profiling.profile import profile
    from evit_deploy.recipe.recipe import Recipe, load_recipe
    from evit_deploy.report.report import Check, Report
    from evit_deploy.serving.package import package
    from evit_deploy.tokens.plan import BlockPlan, TokenPlan, TokenSpec, make_plan
    from evit_deploy.tokens.reduce import reduce_tokens_, set_keep_rate_, token_plan
    from evit_deploy.training.loop import train
    from evit_deploy.verification.verify import verify

__version__ = "0.1.0"

_HOMES = {
    "evit_deploy.bundle.bundle": ("Bundle", "read_bundle"),
    "evit_deploy.bundle.manifest": ("Manifest",),
    "evit_deploy.models.checkpoint": ("Checkpoint", "build_model", "read_checkpoint"),
    "evit_deploy.pipeline.convert": ("convert",),
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
    "evit_deploy.export.portable": ("export_onnx",),
    "evit_deploy.serving.package": ("package",),
    "evit_deploy.pipeline.run": ("run",),
    "evit_deploy.export.precision": ("set_precision",),
    "evit_deploy.profiling.profile": ("profile",),
    "evit_deploy.recipe.recipe": ("Recipe", "load_recipe"),
    "evit_deploy.report.report": ("Check", "Report"),
    "evit_deploy.tokens.plan": ("BlockPlan", "TokenPlan", "TokenSpec", "make_plan"),
    "evit_deploy.tokens.reduce": ("reduce_tokens_", "set_keep_rate_", "token_plan"),
    "evit_deploy.training.loop": ("train",),
    "evit_deploy.export.variants": ("slice_twin",),
    "evit_deploy.verification.verify": ("verify",),
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
