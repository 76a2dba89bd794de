"""``onnx``: the portable file, which every bundle has."""

from typing import Any

from evit_deploy.bundle.manifest import DENSE, MODEL
from evit_deploy.errors import EvitDeployError
from evit_deploy.targets.target import Artifact, Exported, Target


class Onnx(Target):
    """``model.onnx`` and ``dense/model.onnx``, which are exported before any target is written."""

    runtimes = ("onnxruntime",)
    platforms = {"triton": ("onnxruntime", (MODEL,))}  # noqa: RUF012 -- a ClassVar of the contract

    @classmethod
    def refuse(cls, precision: str, options: Any) -> list[EvitDeployError]:
        """Returns nothing: ONNX supports every precision."""
        return []

    @classmethod
    def write(cls, exported: Exported, options: Any) -> list[Artifact]:
        """Returns the existing files."""
        return [Artifact(exported.folder / MODEL, False), Artifact(exported.folder / DENSE, True)]

    @classmethod
    def provers(cls, precision: str, options: Any) -> tuple[str, ...]:
        """Returns ONNX Runtime, or for bf16, which its CPU provider lacks, OpenVINO."""
        return ("openvino",) if precision == "bf16" else cls.runtimes
