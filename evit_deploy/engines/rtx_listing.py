"""Layers of a TensorRT-RTX plan, read from the file without a GPU, a driver or TensorRT.

TensorRT can only open a plan on its GPU, so an engine built ahead of time for another machine could not be audited. But
TensorRT-RTX writes its compiled graph into the plan as text (seen in 1.7.1): a line for each tensor with its type, and
a line for each operation with its name, its tensors and the model's nodes in it. This is undocumented, so a plan
without the text is not an error; it then has no layers to audit here.
"""

import re
from pathlib import Path

from evit_deploy.engines.layers import Layer, Tensor, dtype_of

_TENSOR = re.compile(rb'^  tensor=\{.*?\bdims=\{([^}]*)\}.*?\bname="([^"]*)".*?\btype=(\w+) \}', re.M)
_OPERATION = re.compile(rb'^  (\w+)=\{ name=(?:"([^"]*)"|(\S+)) (.*?)\}[ \t]*$', re.M | re.S)
_LIST = re.compile(rb'\b(input|output|input_args|output_args)=\{((?:[^{}"]|"[^"]*")*)\}')
_NODES = re.compile(rb'\blayers="([^"]*)"')
_KERNEL = re.compile(rb"\b(?:fqn|kernel)=(\S+)")


def plan_layers(path: Path) -> tuple[Layer, ...]:
    """Reads the layers of a TensorRT-RTX plan.

    Args:
        path: The plan; :func:`evit_deploy.engines.plan_file.read_header` checks that it is one.

    Returns:
        The operations that come from the model's nodes; empty if the plan does not contain its graph as text.
    """
    content = path.read_bytes()
    tensors = {
        _text(name): Tensor(_text(name), dtype_of(_text(dtype)), _dimensions(dimensions))
        for dimensions, name, dtype in _TENSOR.findall(content)
    }
    layers = []
    for kind, quoted, bare, rest in _OPERATION.findall(content):
        nodes = _NODES.search(rest)
        if nodes is None or not nodes[1]:  # the runtime's own shape arithmetic, copies and checks
            continue
        named = {_text(key).removesuffix("_args"): _names(value) for key, value in _LIST.findall(rest)}
        kernel = _KERNEL.search(rest)
        layers.append(
            Layer(
                name=_text(quoted or bare),
                kind=_text(kind),
                inputs=tuple(tensors.get(name, Tensor(name, "")) for name in named.get("input", ())),
                outputs=tuple(tensors.get(name, Tensor(name, "")) for name in named.get("output", ())),
                tactic=_text(kernel[1]) if kernel else "",
                metadata=_text(nodes[1]),
            )
        )
    return tuple(layers)


def _text(content: bytes) -> str:
    return content.decode("utf-8", "replace")


def _names(content: bytes) -> list[str]:
    return [_text(name) for name in re.findall(rb'"([^"]*)"', content)]


def _dimensions(content: bytes) -> tuple[int, ...]:
    return tuple(int(size) if size.isdigit() else -1 for size in content.split())
