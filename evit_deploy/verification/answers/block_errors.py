"""Compares the output of each block of an ONNX file with the PyTorch model, to locate where rounding errors arise.

Only the prefix tokens (class, distillation, registers) are compared: every method keeps them, and the head computes the
answer from them. They can be compared even if different patches were kept, so that the error includes choices changed
by rounding. For a model without prefix tokens, the mean of its tokens is compared.
"""

import logging
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import ModelProto, ValueInfoProto

from evit_deploy.errors import StageError
from evit_deploy.export.card import feeds
from evit_deploy.export.outline import Outline, read_outline
from evit_deploy.progress import doing
from evit_deploy.report.report import BlockErrorRow, Report
from evit_deploy.runtimes.fp32 import fp32_products
from evit_deploy.runtimes.onnxruntime import OnnxRuntimeRunner
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.reduce import token_plan
from evit_deploy.verification.tolerances import noise

_LOG = logging.getLogger(__name__)

IMAGES = 4
"""Number of images that are compared."""


def block_errors(model: torch.nn.Module, path: Path, images: np.ndarray, threads: int | None = None) -> Report:
    """Compares the outputs of the blocks of an ONNX file with those of the PyTorch model.

    The file is not modified: the outputs are added to a copy of its graph, which ONNX Runtime's CPU provider runs.

    Args:
        model: The reduced or dense model, FP32, on the CPU.
        path: Its ONNX file, in any precision.
        images: float32 ``[n, C, H, W]``, two or more; :data:`IMAGES` evenly spaced ones are used.
        threads: CPU threads of ONNX Runtime.

    Returns:
        A report with ``block_errors``, one row per block, or with ``notes`` that explain why they were not measured.
    """
    doing(_LOG, "comparing the outputs of blocks")
    outline = read_outline(path)
    reasons = OnnxRuntimeRunner.accepts(outline)
    if reasons:
        return _not_measured(f"ONNX Runtime cannot run the file ({'; '.join(reasons)})")
    names = _names(model)
    if not names:
        return _not_measured("the blocks of this model are not modules of their own")
    chosen = images[np.unique(np.linspace(0, len(images) - 1, min(IMAGES, len(images))).astype(int))]
    exact = _of_pytorch(model, chosen)
    if exact is None:
        return _not_measured("the blocks of this model do not give tokens")
    values = _values(outline.proto, names, exact)
    if values is None:
        return _not_measured("which values of the file are outputs of blocks is not clear")
    proto = ModelProto()
    proto.CopyFrom(outline.proto)
    present = {output.name for output in proto.graph.output}
    proto.graph.output.extend(value for value in values if value.name not in present)
    try:
        with OnnxRuntimeRunner(Outline(proto, outline.folder), threads=threads) as runner:
            found = runner.infer(feeds(chosen))
    except StageError as error:  # verifying the file itself reports the details
        return _not_measured(str(error))
    prefix = token_plan(model).prefix
    errors = [_error(found[value.name], tokens, prefix) for value, tokens in zip(values, exact, strict=True)]
    return Report(
        block_errors=tuple(
            BlockErrorRow(OnnxRuntimeRunner.name, block, len(chosen), error) for block, error in enumerate(errors)
        )
    )


def _not_measured(reason: str) -> Report:
    return Report(notes=(f"The error of each block was not measured: {reason}.",))


def _names(model: torch.nn.Module) -> list[str]:
    """Module names of the blocks, which are also the prefixes of their node names; empty if a block has no name."""
    known = {module: name for name, module in model.named_modules()}
    names = [known.get(block, "") for block in backbone_of(model).blocks(model)]
    return names if all(names) else []


def _of_pytorch(model: torch.nn.Module, images: np.ndarray) -> list[np.ndarray] | None:
    """Outputs of the blocks, ``[n, tokens, width]`` each; ``None`` if a block returns something else."""
    blocks = list(backbone_of(model).blocks(model))
    found: dict[torch.nn.Module, np.ndarray] = {}

    def note(block: torch.nn.Module, given: Any, made: Any) -> None:
        found[block] = (made[0] if isinstance(made, tuple) else made).numpy()

    handles = [block.register_forward_hook(note) for block in blocks]
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), fp32_products(tf32=False):
            model(torch.from_numpy(images))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    outputs = [found[block] for block in blocks if block in found]
    return outputs if len(outputs) == len(blocks) and all(one.ndim == 3 for one in outputs) else None


def _values(proto: ModelProto, names: Sequence[str], exact: Sequence[np.ndarray]) -> list[ValueInfoProto] | None:
    """Finds the output value of each block: the last output of its nodes that has the shape of its tokens.

    Args:
        proto: The file's graph.
        names: Prefix of the node names of each block.
        exact: Outputs of the blocks in PyTorch.

    Returns:
        Name and type of each value; ``None`` if a block has no such value.
    """
    longest = sorted(names, key=len, reverse=True)
    pattern = re.compile(rf"({'|'.join(map(re.escape, longest))})[./]")
    blocks = {name: block for block, name in enumerate(names)}
    infos = {info.name: info for info in (*proto.graph.value_info, *proto.graph.output)}
    found: dict[int, ValueInfoProto] = {}
    for node in proto.graph.node:
        match = pattern.match(node.name)
        if match is None:
            continue
        block = blocks[match[1]]
        for value in node.output:
            info = infos.get(value)
            if info is not None and _fits(info, exact[block], block == len(names) - 1):
                found[block] = info
    return [found[block] for block in range(len(names))] if len(found) == len(names) else None


def _fits(info: ValueInfoProto, tokens: np.ndarray, last: bool) -> bool:
    """Whether a value has the shape of a block's tokens; the last block may return only the first tokens."""
    sizes = [size.dim_value for size in info.type.tensor_type.shape.dim]
    if len(sizes) != 3 or sizes[2] != tokens.shape[2]:
        return False
    return sizes[1] == tokens.shape[1] or (last and 0 < sizes[1] < tokens.shape[1])


def _error(found: np.ndarray, exact: np.ndarray, prefix: int) -> float | None:
    """Error of the prefix tokens relative to their spread over images."""
    count = min(prefix, found.shape[1])
    first, second = (
        (one[:, :count] if count else one.mean(axis=1, keepdims=True)).reshape(len(one), -1).astype(np.float64)
        for one in (found, exact)
    )
    error = noise(first, second, embedding=True)
    return error if np.isfinite(error) else None
