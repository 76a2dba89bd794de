"""``tensorrt-rtx``: an engine built ahead of time, on any machine, for the named GPUs."""

from evit_deploy.bundle.manifest import ENGINE
from evit_deploy.engines.options import BUILDERS
from evit_deploy.engines.rtx_listing import plan_layers
from evit_deploy.targets.tensorrt import TensorRT


class TensorRTRTX(TensorRT):
    """``engine.plan`` and ``dense/engine.plan``, built by TensorRT-RTX from the ONNX files."""

    name = "tensorrt-rtx"
    needs = BUILDERS[name].needs
    runtimes = ("tensorrt-rtx",)
    platforms = {"cpp": ("tensorrt-rtx", (ENGINE,))}  # noqa: RUF012
    listing = staticmethod(plan_layers)

    @classmethod
    def automatic(cls) -> bool:
        """Returns false: TensorRT is preferred on machines with both."""
        return False
