"""Exports a reduced model, and its dense twin, as one portable ONNX file.

The file contains ``evit::TokenReorg`` nodes *and* the function that defines them in standard operators. ONNX Runtime,
OpenVINO and TensorRT-RTX run the function; TensorRT uses a plugin instead if one is loaded. The batch is the only
dynamic dimension. Everything a consumer must know (plan, preprocessing, versions) is in the model's metadata
properties.

The *dense twin* is the same model without token reduction, exported by the same code, so that blocks are written alike
in both files (:mod:`evit_deploy.export.blocks`).
"""

import ast
import contextlib
import logging
import re
import warnings
from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path

import msgspec
import onnx
import onnx.numpy_helper
import torch
from onnx import ModelProto, helper
from torch import Tensor

from evit_deploy.data.preprocess import Preprocess
from evit_deploy.environment.machine import versions
from evit_deploy.errors import InputError, StageError
from evit_deploy.export.answer import answer_name
from evit_deploy.export.blocks import Known, assemble
from evit_deploy.export.card import INPUT, ModelCard, kept_name, write_card
from evit_deploy.export.outline import write_onnx
from evit_deploy.export.variants import with_indices
from evit_deploy.recipe.options import Linear
from evit_deploy.tokens.backbone import backbone_of
from evit_deploy.tokens.operators import token_merge, token_reorg
from evit_deploy.tokens.reduce import token_plan, token_spec
from evit_deploy.tokens.reducer import TokenReducer

OPSET = 23  # the first with Attention (Gelu: 20)
_ONE_FILE_LIMIT = 2**31 - 1  # a protobuf message cannot be larger


class Portable(msgspec.Struct, frozen=True):
    """An exported model whose large weights still share the PyTorch model's memory.

    Args:
        proto: The file's content without these weights.
        weights: The missing initializers by name.
    """

    proto: ModelProto
    weights: dict[str, Tensor]

    def whole(self) -> ModelProto:
        """The checked model with all its weights."""
        proto = ModelProto()
        proto.CopyFrom(self.proto)
        for name, tensor in self.weights.items():
            proto.graph.initializer.append(onnx.numpy_helper.from_array(tensor.numpy(), name))
        onnx.checker.check_model(proto)
        return proto

    def save(self, path: Path, *, indices: bool = False) -> None:
        """Writes the checked model as one file.

        Args:
            path: The file.
            indices: Whether the choices are outputs too; see :func:`~evit_deploy.export.variants.with_indices`.
        """
        write_onnx(with_indices(self.proto) if indices else self.proto, self.weights, path)
        onnx.checker.check_model(path)


def export_onnx(model: torch.nn.Module, *, name: str, preprocess: Preprocess, linear: Linear = "gemm") -> ModelProto:
    """Exports a model, reduced or dense, into the portable form.

    The input ``input`` is float32 NCHW, normalized, with a dynamic batch. The output is ``logits``, or ``embedding``
    for a model without classes, float32.

    Args:
        model: A model of a registered backbone.
        name: Its timm name, recorded in the file.
        preprocess: Its preprocessing, recorded in the file; its size must be the model's.
        linear: Form of the linear layers on tokens: ``gemm`` on ``[B·N, C]`` with the bias inside, or ``matmul`` on
            ``[B, N, C]`` followed by an ``Add``.

    Returns:
        The checked model.

    Raises:
        UnsupportedModelError: No backbone knows the model.
        InputError: The file would exceed the size limit of protobuf, the preprocessing has another size, or the family
            does not support this form of linear layers.
        StageError: The exporter failed.
    """
    return portable(model, name=name, preprocess=preprocess, linear=linear).whole()


def portable(
    model: torch.nn.Module,
    *,
    name: str,
    preprocess: Preprocess,
    linear: Linear = "gemm",
    known: Known | None = None,
) -> Portable:
    """Like :func:`export_onnx`, without copying the weights and without exporting known blocks again.

    Args:
        model: See :func:`export_onnx`.
        name: See :func:`export_onnx`.
        preprocess: See :func:`export_onnx`.
        linear: See :func:`export_onnx`.
        known: Earlier exports of the same weights in the same form of linear layers; new ones are added.

    Raises:
        EvitDeployError: See :func:`export_onnx`.
    """
    backbone = backbone_of(model)
    size = backbone.image_size(model)
    if tuple(preprocess.size) != size:
        raise InputError("preprocessing size does not match the model's input size", seen=preprocess.size, wanted=size)
    weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    if weight_bytes > _ONE_FILE_LIMIT:
        raise InputError("the weights do not fit into one ONNX file", seen=f"{weight_bytes} bytes", wanted="< 2 GiB")
    plan, spec = token_plan(model), token_spec(model)
    if not all(module.exports for module in model.modules() if isinstance(module, TokenReducer)):
        raise InputError(f"the method {spec.method!r} has no exported form", fix="Use --method evit.")
    lowered = backbone.lower(model)
    for module in lowered.modules():
        if isinstance(getattr(module, "flat", None), bool):
            module.flat = linear == "gemm"
    example = torch.zeros(2, backbone.channels(model), *size)  # batch 2: the exporter specializes a batch of 1

    def run(module: torch.nn.Module) -> ModelProto:
        found = _run_exporter(module, example, answer_name(model))
        _name_nodes(found)
        return found

    assembled = assemble(lowered, backbone, plan, run, known if known is not None else Known())
    proto, weights = assembled if assembled is not None else (run(lowered), {})
    form = _linear_form(proto, weights)
    if linear == "matmul" and form != linear:
        raise InputError(
            "models of this family have one form of linear layers", where="--linear", seen=linear, wanted=form
        )
    _name_values(proto)
    nodes = [node for node in proto.graph.node if node.domain == token_reorg.DOMAIN]
    for node, row in zip(nodes, plan.locations, strict=True):
        _name_location(proto, node, row.block)
    if nodes:
        _attach_functions(proto, nodes)
    kind = "reduced" if plan.locations else "dense"
    write_card(proto, ModelCard(kind, name, spec, plan, preprocess, "fp32", versions(), form))
    return Portable(proto, weights)


def _run_exporter(model: torch.nn.Module, example: torch.Tensor, answer: str) -> ModelProto:
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:  # the exporter logs its steps; successful ones are not of interest
            logger.setLevel(logging.ERROR)
        # onnxscript up to 0.6 also prints, and standard output belongs to the caller.
        with warnings.catch_warnings(), contextlib.redirect_stdout(None), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=[answer],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                verbose=False,
            )
            assert program is not None  # None only when exporting straight to a file
            return program.model_proto
    except Exception as error:  # the exporter raises many kinds
        cause: BaseException = error  # the exporter wraps the cause in several lines of instructions
        while cause.__cause__ is not None:
            cause = cause.__cause__
        first_line = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
        raise StageError(f"the ONNX export failed: {first_line}", fix="Run with --debug for details.") from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _name_nodes(proto: ModelProto) -> None:
    """Names every node by its module and operator, as in ``blocks.3.attn.q/Gemm``, so that profiles are readable.

    Other metadata of the exporter is removed, because it includes stack traces with local paths.
    """
    taken: Counter[str] = Counter()
    module = ""
    for node in proto.graph.node:
        notes = {entry.key: entry.value for entry in node.metadata_props}
        scopes = [str(scope) for scope in ast.literal_eval(notes.get("pkg.torch.onnx.name_scopes", "[]"))]
        # A node that the exporter inserted belongs to the surrounding block.
        module = scopes[-2].lstrip("_") if scopes else ".".join(module.split(".")[:2])
        module = "" if module.startswith("empty_nn_module") else module
        name = "/".join(part for part in (module, node.op_type) if part)
        node.name = f"{name}_{taken[name]}" if taken[name] else name
        taken[name] += 1
        del node.metadata_props[:]
    for holder in (*proto.graph.value_info, *proto.graph.initializer, *proto.graph.input, *proto.graph.output):
        del holder.metadata_props[:]
    del proto.graph.metadata_props[:]


def _name_values(proto: ModelProto) -> None:
    """Names values after the nodes that produce them, numbers constants by use, and sorts both in that order.

    The exporter's own numbers and order depend on the rest of the model: the dense twins of two keep rates would
    otherwise differ in these alone.
    """
    given = {value.name for value in proto.graph.output}
    renamed = {
        value: f"{node.name}.{index}" if index else node.name
        for node in proto.graph.node
        for index, value in enumerate(node.output)
        if value and value not in given
    }
    values = dict.fromkeys(value for node in proto.graph.node for value in (*node.input, *node.output))
    places = {value: place for place, value in enumerate(values)}
    for holders in (proto.graph.initializer, proto.graph.value_info):
        holders.sort(key=lambda holder: places.get(holder.name, len(places)))
    numbered = [tensor.name for tensor in proto.graph.initializer if re.fullmatch(r"val_\d+|\w+/shape", tensor.name)]
    renamed |= {name: f"constant_{number}" for number, name in enumerate(numbered)}
    for node in proto.graph.node:
        node.input[:] = [renamed.get(value, value) for value in node.input]
        node.output[:] = [renamed.get(value, value) for value in node.output]
    for holder in (*proto.graph.initializer, *proto.graph.value_info):
        holder.name = renamed.get(holder.name, holder.name)


def _linear_form(proto: ModelProto, others: Collection[str]) -> str:
    """The form of the linear layers in the blocks; also names the weights that the exporter transposed for it.

    Args:
        proto: The file.
        others: Names of the weights that are not in it.
    """
    weights = {tensor.name: tensor for tensor in proto.graph.initializer}
    uses = Counter(value for node in proto.graph.node for value in node.input)
    named = {*weights, *others}
    products = [node for node in proto.graph.node if node.op_type == "MatMul" and node.input[1] in named]
    for node in products:  # the exporter gives folded weights names such as val_13
        name = f"{node.name.rpartition('/')[0]}.weight"
        if name not in named and uses[node.input[1]] == 1:
            weights[node.input[1]].name = node.input[1] = name
    return "matmul" if products else "gemm"


def _name_location(proto: ModelProto, node: onnx.NodeProto, block: int) -> None:
    """Names a location's node, its tokens and its choice: an input of a merge, an output of a reorganization."""
    merges = node.op_type == token_merge.NAME
    choice = node.input[2] if merges else node.output[1]
    renamed = {node.output[0]: f"blocks.{block}.tokens", choice: kept_name(block)}
    node.name = f"blocks.{block}.{'token_merge' if merges else 'token_reorg'}"
    for other in proto.graph.node:
        other.input[:] = [renamed.get(value, value) for value in other.input]
        other.output[:] = [renamed.get(value, value) for value in other.output]
    for info in proto.graph.value_info:
        info.name = renamed.get(info.name, info.name)


def _attach_functions(proto: ModelProto, nodes: Sequence[onnx.NodeProto]) -> None:
    if any(node.op_type == token_reorg.NAME for node in nodes):
        proto.functions.append(token_reorg.onnx_function(OPSET))
    merging = next((node for node in nodes if node.op_type == token_merge.NAME), None)
    if merging is not None:
        proto.functions.append(token_merge.onnx_function(OPSET, len(merging.input) - 3))
    if not any(entry.domain == token_reorg.DOMAIN for entry in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid(token_reorg.DOMAIN, token_reorg.DOMAIN_VERSION))
