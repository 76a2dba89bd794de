"""``openvino``: files in OpenVINO's format, for CPUs."""

from typing import Any

from evit_deploy.bundle.manifest import MODEL, OPENVINO, TWIN
from evit_deploy.environment.availability import Needs
from evit_deploy.errors import EvitDeployError
from evit_deploy.targets.target import Artifact, Exported, Target

_FILES = (OPENVINO, OPENVINO.replace(".xml", ".bin"))


class OpenVino(Target):
    """``openvino/model.xml`` and ``.bin``, converted from the ONNX file in the same precision."""

    precisions = ("fp32", "fp16", "bf16", "int8")
    runtimes = ("openvino",)
    needs = Needs(extra="openvino")
    platforms = {"triton": ("openvino", _FILES), "cpp": ("openvino", _FILES)}  # noqa: RUF012

    @classmethod
    def refuse(cls, precision: str, options: Any) -> list[EvitDeployError]:
        """Returns nothing; a missing OpenVINO is reported for the runtime that verifies the target."""
        return []

    @classmethod
    def write(cls, exported: Exported, options: Any) -> list[Artifact]:
        """Converts both ONNX files."""
        from evit_deploy.export.openvino import save_openvino

        made = []
        for folder, dense in ((exported.folder, False), (exported.folder / TWIN, True)):
            save_openvino(folder / MODEL, folder / OPENVINO)
            made.append(Artifact(folder / OPENVINO, dense))
        return made
