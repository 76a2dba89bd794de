"""evit-deploy: turns a pretrained vision transformer into a faster one, verified to return the same answers.

The public names below are loaded on first use (PEP 562), so that ``evit-deploy --help`` does not import PyTorch.
"""

__version__ = "0.2.0"

_PUBLIC = {
    "Checkpoints and models": {
        "models.checkpoint": "read_checkpoint build_model Checkpoint",
        "data.preprocess": "Preprocess",
    },
    "Token reduction": {
        "tokens.reduce": "reduce_tokens_ set_keep_rate_ token_plan dense_twin",
        "tokens.plan": "make_plan TokenSpec TokenOptions TokenPlan BlockPlan BlockCost ModelCost ModelShape",
    },
    "Recipes and training": {
        "recipe.recipe": "load_recipe Recipe CompareSection ExpectSection",
        "recipe.sections": "ModelSection PreprocessOptions DataSection TrainSection TokenLabelSection "
        "DynamicViTSection TeacherSection",
        "recipe.options": "ConvertSection ProfileSection",
        "training.loop": "train TrainResult",
        "pipeline.run": "run",
    },
    "Export": {
        "export.portable": "export_onnx",
        "export.precision": "set_precision",
        "export.variants": "slice_twin",
        "export.card": "read_card ModelCard",
    },
    "Engines": {
        "engines.build": "build_engine Built",
        "recipe.options": "BuildOptions BatchProfile",
        "bundle.manifest": "Engine",
    },
    "Conversion and bundles": {
        "pipeline.convert": "convert",
        "pipeline.variants": "convert_variants VariantOptions",
        "recipe.options": "ConvertOptions ProfileOptions CompareOptions TuneOptions PaperOptions",
        "bundle.bundle": "read_bundle Bundle",
        "bundle.manifest": "Manifest Parent TensorSpec",
    },
    "Answers": {
        "inference.model": "load Model",
        "inference.prediction": "Prediction",
        "visualization.show": "show Shown",
        "visualization.curve": "removal_curve RemovalCurve CurvePoint",
        "drawing.seen": "Seen Stage",
        "drawing.sheet": "Sheet",
    },
    "Verification and profiling": {
        "verification.verify": "verify",
        "pipeline.profile": "profile",
        "pipeline.compare": "compare",
        "pipeline.reports": "report_bundles",
        "triton.connection": "Server",
        "report.report": "Report Check ProfileRow LatencyRow Summary BlockRow BlockErrorRow LoadRow "
        "GpuSummary AccuracyRow ComparedRow Difference AgreementRow SensitivityRow",
    },
    "Tuning": {
        "tuning.tune": "tune",
        "tuning.results.front": "Tuning TunedRow",
        "tuning.staircase": "Staircase",
        "tuning.schedules": "Schedule",
        "tuning.answers": "Nearness",
    },
    "Paper": {
        "paper.measured": "paper_table MeasuredTable MeasuredRow",
        "paper.published": "PaperRow Published",
    },
    "Packages": {
        "serving.package": "package Package",
        "serving.options": "PackageOptions TritonOptions",
        "serving.releases": "TritonRelease",
    },
    "Extension": {
        "registry": "METHODS BACKBONES TARGETS RUNTIMES Registry",
        "tokens.reducer": "TokenReducer",
        "tokens.state": "TokenState",
        "tokens.backbone": "Backbone",
        "targets.target": "Target Exported Artifact",
        "environment.availability": "Needs",
        "runtimes.runner": "Runner Resident Mark",
    },
    "Errors": {
        "errors": "EvitDeployError InputError CheckpointError RecipeError UnsupportedModelError "
        "MissingRequirement StageError GateFailed",
    },
}
"""Stage -> module -> its public names: the only list of them. ``docs/generate_api.py`` generates from it the stub
``__init__.pyi``, for type checkers and editors, and ``docs/api.md``."""
_MODULE_OF = {name: module for stage in _PUBLIC.values() for module, names in stage.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module  # imported here to keep it out of the package's namespace

    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, *(name for name in globals() if name.startswith("__") and name.endswith("__"))])
