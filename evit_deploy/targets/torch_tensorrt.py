"""``torch-tensorrt``: a plan, and a PyTorch program with the same engine, built without an ONNX file."""

from evit_deploy.bundle.manifest import ENGINE, TWIN
from evit_deploy.engines.options import check_options, flag
from evit_deploy.environment.availability import Needs
from evit_deploy.errors import EvitDeployError, InputError
from evit_deploy.recipe.options import BuildOptions
from evit_deploy.targets.target import Artifact, Exported, Target, refusals

PROGRAM = "exported_program.pt2"
"""File name of the PyTorch program that contains the engine."""


class TorchTensorRT(Target):
    """``engine.plan`` and ``exported_program.pt2`` of both models, built by Torch-TensorRT on this machine's GPU."""

    name = "torch-tensorrt"
    needs = Needs(extra=name, wheel="tensorrt", gpu=True)
    Options = BuildOptions
    precisions = ("fp32", "fp16", "bf16")
    engine = True
    platforms = {"triton": ("tensorrt", (ENGINE,)), "cpp": ("tensorrt", (ENGINE,))}  # noqa: RUF012

    @classmethod
    def refuse(cls, precision: str, options: BuildOptions) -> list[EvitDeployError]:
        """Returns errors as for TensorRT, and for unused options, several profiles, and a missing Torch-TensorRT or
        GPU."""
        from evit_deploy.engines.torch_tensorrt import check_request, require_torch_tensorrt

        def unused() -> None:
            for field in ("timing_cache", "plugin"):
                if getattr(options, field):
                    raise InputError("torch-tensorrt does not use it", where=flag(field), fix="Leave it out.")

        return refusals(
            lambda: check_options(cls.name, precision, options),
            unused,
            lambda: check_request(precision, options.profiles),
            require_torch_tensorrt,
        )

    @classmethod
    def write(cls, exported: Exported, options: BuildOptions) -> list[Artifact]:
        """Builds both engines from the PyTorch models."""
        from evit_deploy.engines.torch_tensorrt import build_torch_tensorrt

        made = []
        for model, twin in ((exported.dense, TWIN), (exported.model, "")):
            folder = exported.folder / twin
            plan = folder / ENGINE
            engine = build_torch_tensorrt(model, plan, folder / PROGRAM, precision=exported.precision, options=options)
            made.append(Artifact(plan, bool(twin), engine))
        return made
