"""``onnx``: the portable file itself, which every bundle has."""

from typing import Any

from evit_deploy.bundle.manifest import DENSE, MODEL
from evit_deploy.errors import EvitDeployError
from evit_deploy.targets.target import Artifact, Exported, Target


class Onnx(Target):
    """``model.onnx`` and ``dense/model.onnx``; they are there when a target's turn comes."""

    runtimes = ("onnxruntime",)
    platforms = {"triton": ("onnxruntime", (MODEL,))}  # noqa: RUF012 -- a ClassVar of the contract

    @classmethod
    def refuse(cls, precision: str, options: Any) -> list[EvitDeployError]:
        """Nothing: every precision can be written as ONNX."""
        return []

    @classmethod
    def write(cls, exported: Exported, options: Any) -> list[Artifact]:
        """Writes nothing more: the files are there."""
        return [Artifact(exported.folder / MODEL, False), Artifact(exported.folder / DENSE, True)]

    @classmethod
    def provers(cls, precision: str, options: Any) -> tuple[str, ...]:
        """ONNX Runtime, whose CPU provider has no bf16: OpenVINO reads the same file."""
        return ("openvino",) if precision == "bf16" else cls.runtimes
