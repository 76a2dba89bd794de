"""Builds engines to compare a bundle's engine with, using the same options: its slice twin, with or without plugin."""

import logging
from pathlib import Path

import msgspec
import onnx

from evit_deploy.bundle import bundle as bundles
from evit_deploy.bundle.manifest import MODEL, Engine
from evit_deploy.engines import build
from evit_deploy.engines.options import BUILDERS, usable
from evit_deploy.engines.plugin.library import choose_plugin, provide_plugin
from evit_deploy.environment.nvidia import compute_capability
from evit_deploy.errors import EvitDeployError
from evit_deploy.export.card import load_onnx
from evit_deploy.export.variants import reorganizations, slice_twin
from evit_deploy.progress import doing
from evit_deploy.recipe.options import BuildOptions

_LOG = logging.getLogger(__name__)


def slice_engine(bundle: bundles.Bundle, scratch: Path) -> tuple[Path | None, str]:
    """Builds the slice twin of a bundle's engine, with the options of that engine.

    Args:
        bundle: The bundle.
        scratch: Folder for the twin.

    Returns:
        (plan, ""), or (``None``, reason); the reason is empty if the model reduces no tokens.
    """
    proto = load_onnx(bundle.file(MODEL))
    if not reorganizations(proto):
        return None, ""
    model = scratch / "slice.onnx"
    onnx.save(slice_twin(proto), model)
    return _built_likewise(bundle, "slice", model, scratch, None)


def other_body(
    bundle: bundles.Bundle,
    scratch: Path,
    plugin: Path | str | None,
) -> tuple[Path | None, str]:
    """Builds a bundle's engine again without its plugin, or, if it has none, with the given plugin.

    Args:
        bundle: The bundle.
        scratch: Folder for the engine.
        plugin: Library to build with, or ``auto``; only for an engine without a plugin.

    Returns:
        (``body.plan`` or ``plugin.plan``, ""), or (``None``, reason); the reason is empty if no comparison was
        requested.

    Raises:
        InputError: The library is not a plugin.
        MissingRequirement: The library is missing, or is for another TensorRT.
    """
    engine, library = bundle.manifest.engine, choose_plugin(plugin)
    if engine is None or (engine.plugin is None and library is None):
        return None, ""
    variant = "body" if engine.plugin is not None else "plugin"
    if library is not None and (lacking := provide_plugin(None, library)) is not None:
        raise lacking
    return _built_likewise(bundle, variant, bundle.file(MODEL), scratch, library)


def _built_likewise(
    bundle: bundles.Bundle,
    variant: str,
    model: Path,
    scratch: Path,
    plugin: Path | None,
) -> tuple[Path | None, str]:
    """Builds another model's engine with the options of the bundle's engine."""
    engine = bundle.manifest.engine
    if engine is None or engine.target not in BUILDERS:
        builder = "the manifest does not say how" if engine is None else f"{engine.target} built it"
        return None, f"its {variant} twin must be built like the engine, and {builder}"
    if not usable(engine.target):
        return None, f"{engine.target} cannot build its {variant} twin here (evit-deploy doctor says what is missing)"
    plan = scratch / f"{variant}.plan"
    doing(_LOG, f"building the {variant} twin's engine with {engine.target}")
    options = msgspec.structs.replace(options_of(engine), plugin=plugin)
    try:
        build.build_engine(model, plan, engine.target, engine.precision, options)
    except EvitDeployError as error:
        return None, f"its {variant} twin could not be built ({error.what.rstrip('.')})"
    return plan, ""


def options_of(engine: Engine) -> BuildOptions:
    """Returns the options that an engine of a bundle was built with, except the plugin."""
    ahead = BUILDERS[engine.target].needs.ahead and (engine.driver is None or engine.gpus != (compute_capability(),))
    known = set(BuildOptions.__struct_fields__) - {"batches", "gpus", "plugin", "timing_cache"}
    recorded = {name: value for name, value in engine.options.items() if name in known}
    batches = tuple(msgspec.structs.astuple(profile) for profile in engine.profiles)
    return BuildOptions(batches=batches, gpus=engine.gpus if ahead else (), **recorded)
