"""PyTorch's ONNX exporter, which takes seconds for the smallest model, once for each model of a test run.

The tests export a handful of models many hundred times. A second export of what is the same, down to each weight and
attribute, is read from the run's shared folder; see the fixture in ``conftest.py``.
"""

import hashlib
import io
import pickle
from types import SimpleNamespace
from typing import Any

import onnx
import torch

from tests.support.shared import made_once

export = torch.onnx.export


class _Pickler(pickle.Pickler):
    """Pickles tensors as what they hold: the bytes that PyTorch writes of one hold its address too."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return None
        content = obj.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return type(obj).__name__, str(obj.dtype), tuple(obj.shape), obj.requires_grad, hashlib.sha256(content).digest()


def key_of(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> str | None:
    """What decides what is exported; ``None`` where that cannot be written down, as with a hook."""
    content = io.BytesIO()
    try:
        _Pickler(content).dump((model, inputs, repr(sorted(options.items()))))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()


def export_once(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
    """``torch.onnx.export``; the program it gives has a ``model_proto`` and no more."""
    key = key_of(model, inputs, options)
    if key is None:
        return export(model, inputs, **options)
    path = made_once(f"{key}.onnx", lambda path: onnx.save(export(model, inputs, **options).model_proto, path))
    return SimpleNamespace(model_proto=onnx.load(path))
