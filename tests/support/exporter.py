"""Caches PyTorch's ONNX exporter, which takes seconds even for the smallest model, within a test run.

The tests export a few models hundreds of times. The second export of an identical model (including weights and
attributes) is read from the run's shared folder; see the fixture in ``conftest.py``.
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
    """Pickles tensors by content, because PyTorch's own bytes include their address."""

    def persistent_id(self, obj: Any) -> Any:
        if not isinstance(obj, torch.Tensor):
            return None
        content = obj.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        return type(obj).__name__, str(obj.dtype), tuple(obj.shape), obj.requires_grad, hashlib.sha256(content).digest()


def key_of(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], options: dict[str, Any]) -> str | None:
    """Everything that determines the export; ``None`` if that cannot be pickled, as with hooks."""
    content = io.BytesIO()
    try:
        _Pickler(content).dump((model, inputs, repr(sorted(options.items()))))
    except (pickle.PicklingError, AttributeError, TypeError):
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()


def export_once(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> Any:
    """Replaces ``torch.onnx.export``; the returned program only has a ``model_proto``."""
    key = key_of(model, inputs, options)
    if key is None:
        return export(model, inputs, **options)
    path = made_once(f"{key}.onnx", lambda path: onnx.save(export(model, inputs, **options).model_proto, path))
    return SimpleNamespace(model_proto=onnx.load(path))
