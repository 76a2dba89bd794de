"""Methods, backbones, targets and runtimes by name, imported on first use.

Other packages add theirs with an entry point (group ``evit_deploy.methods``, ``evit_deploy.backbones``,
``evit_deploy.targets`` or ``evit_deploy.runtimes``) or with :meth:`Registry.register`. The built-in ones are listed
here in the same form.
"""

import importlib
from typing import Any

from evit_deploy.errors import InputError, did_you_mean


class Registry:
    """Maps names of one kind to ``"module:attribute"`` references, which are imported when requested.

    Args:
        kind: What the names refer to, in the singular; used in messages and in the entry point group.
        targets: name -> ``"module:attribute"``.
        unlisted: Names that can be used but are not offered to users.
    """

    def __init__(self, kind: str, targets: dict[str, str], unlisted: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.unlisted = unlisted
        self._targets = dict(targets)
        self._own = tuple(targets)
        self._scanned = False

    def register(self, name: str, target: str) -> None:
        """Adds a name.

        Args:
            name: The new name.
            target: ``"module:attribute"``.

        Raises:
            InputError: The name is already in use, or the reference is malformed.
        """
        if target.count(":") != 1:
            raise InputError(f"not a {self.kind} target", seen=repr(target), wanted="'module:attribute'")
        if self._targets.get(name, target) != target:
            raise InputError(f"the {self.kind} {name!r} is already {self._targets[name]}", seen=repr(target))
        self._targets[name] = target

    def own_names(self) -> list[str]:
        """The built-in names only. Help pages list these, so that they are the same on every machine."""
        return list(self._own)

    def names(self) -> list[str]:
        """All names: the built-in ones, then those of entry points."""
        if not self._scanned:
            import importlib.metadata  # slow to import, and not needed for help pages

            self._scanned = True
            for point in importlib.metadata.entry_points(group=f"evit_deploy.{self.kind}s"):
                self._targets.setdefault(point.name, point.value)
        return list(self._targets)

    def offered(self) -> list[str]:
        """The names offered to users."""
        return [name for name in self.names() if name not in self.unlisted]

    def get(self, name: str) -> Any:
        """Imports what a name refers to.

        Raises:
            InputError: Unknown name; the message suggests the most similar one.
        """
        if name not in self._targets and name not in self.names():
            raise InputError(
                f"unknown {self.kind}",
                seen=repr(name),
                wanted="one of " + ", ".join(sorted(self.offered())),
                fix=did_you_mean(name, self.names()),  # unlisted names too: recipes accept them
            )
        module, attribute = self._targets[name].split(":")
        return getattr(importlib.import_module(module), attribute)


METHODS = Registry(
    "method",
    {
        "evit": "evit_deploy.tokens.methods.evit:EViT",
        "merge": "evit_deploy.tokens.methods.merge:Merge",
        "evo-vit": "evit_deploy.tokens.methods.evo_vit:EvoViT",
        "dynamicvit": "evit_deploy.tokens.methods.dynamicvit:DynamicViT",
        "tome": "evit_deploy.tokens.methods.tome:ToMe",
        "slice": "evit_deploy.tokens.methods.baselines:Slice",
        "random": "evit_deploy.tokens.methods.baselines:RandomDrop",
        "inverse": "evit_deploy.tokens.methods.baselines:InverseDrop",
    },
    unlisted=("slice", "random", "inverse"),  # baselines, for recipes and Python
)
BACKBONES = Registry(
    "backbone",
    {
        "timm_vit": "evit_deploy.models.timm_vit:TimmViT",
        "lvvit": "evit_deploy.models.lvvit:LVViTBackbone",
        "timm_levit": "evit_deploy.models.timm_levit:TimmLeViT",
        "evo_levit": "evit_deploy.models.levit_reduction:EvoLeViTBackbone",
    },
)
TARGETS = Registry(
    "target",
    {  # order of preference of `package`
        "tensorrt": "evit_deploy.targets.tensorrt:TensorRT",
        "tensorrt-rtx": "evit_deploy.targets.tensorrt_rtx:TensorRTRTX",
        "torch-tensorrt": "evit_deploy.targets.torch_tensorrt:TorchTensorRT",
        "onnx": "evit_deploy.targets.onnx:Onnx",
        "openvino": "evit_deploy.targets.openvino:OpenVino",
    },
)
RUNTIMES = Registry(
    "runtime",
    {
        "eager": "evit_deploy.runtimes.eager:EagerRunner",
        "torch.compile": "evit_deploy.runtimes.compiled:CompiledRunner",
        "onnxruntime": "evit_deploy.runtimes.onnxruntime:OnnxRuntimeRunner",
        "openvino": "evit_deploy.runtimes.openvino:OpenVINORunner",
        "onnxruntime-cuda": "evit_deploy.runtimes.onnxruntime:OnnxRuntimeCudaRunner",
        "onnxruntime-tensorrt": "evit_deploy.runtimes.onnxruntime:OnnxRuntimeTensorRTRunner",
        "onnxruntime-tensorrt-rtx": "evit_deploy.runtimes.onnxruntime:OnnxRuntimeTensorRTRTXRunner",
        "tensorrt": "evit_deploy.runtimes.tensorrt:TensorRTRunner",
        "tensorrt-rtx": "evit_deploy.runtimes.tensorrt:TensorRTRTXRunner",
        "triton": "evit_deploy.runtimes.triton:TritonRunner",
    },
)
