"""Variants of an exported file, made from the file alone: with indices, with the choice given, and the slice twin."""

import msgspec
import numpy as np
import onnx
from onnx import ModelProto, helper

from evit_deploy.errors import InputError
from evit_deploy.export.card import read_card, write_card
from evit_deploy.tokens import op


def reorganizations(proto: ModelProto) -> list[onnx.NodeProto]:
    """The file's ``TokenReorg`` nodes, in order."""
    return [node for node in proto.graph.node if node.domain == op.DOMAIN and node.op_type == op.NAME]


def block_of(node: onnx.NodeProto) -> int:
    """The block that a ``TokenReorg`` node stands in."""
    return int(node.output[1].rpartition("_")[2])


def with_indices(proto: ModelProto) -> ModelProto:
    """A copy whose kept candidates are outputs too: ``kept_<block>``, int32 ``[batch, K]``."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    present = {output.name for output in copy.graph.output}
    for node in reorganizations(copy):
        if node.output[1] not in present:
            keep = next(a.i for a in node.attribute if a.name == "keep")
            info = helper.make_tensor_value_info(node.output[1], onnx.TensorProto.INT32, ["batch", keep])
            copy.graph.output.append(info)
    return copy


def slice_twin(proto: ModelProto) -> ModelProto:
    """The same file with each reorganisation replaced by a plain slice to the same token count.

    What is left of its time under the original's is what scoring, selecting, gathering and fusing cost.

    Raises:
        InputError: The file has no ``TokenReorg`` node.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    model = onnx_ir.from_proto(proto)
    graph = model.graph
    nodes = [node for node in graph if node.domain == op.DOMAIN]
    if not nodes:
        raise InputError("this file has no TokenReorg node, so there is nothing to slice", seen=proto.graph.name)
    for node in nodes:
        counts = [node.attributes[name].as_int() for name in ("prefix", "keep", "fuse")]
        bounds = []
        for label, number in (("start", 0), ("end", sum(counts)), ("axis", 1)):
            tensor = onnx_ir.tensor(np.array([number], np.int64), name=f"{node.name}.{label}")
            bounds.append(onnx_ir.Value(name=tensor.name, const_value=tensor))
            graph.register_initializer(bounds[-1])
        slice_node = onnx_ir.Node("", "Slice", [node.inputs[0], *bounds], name=f"{node.name}.slice")
        graph.insert_before(node, slice_node)
        tokens, kept = node.outputs
        tokens.replace_all_uses_with(slice_node.outputs[0])
        if kept in graph.outputs:
            graph.outputs.remove(kept)
    for remove in (RemoveUnusedNodesPass(), RemoveUnusedFunctionsPass(), RemoveUnusedOpsetsPass()):
        remove(model)
    twin = onnx_ir.to_proto(model)
    card = read_card(proto)
    if card is not None:
        write_card(twin, msgspec.structs.replace(card, kind="slice"))
    onnx.checker.check_model(twin)
    return twin


def with_choice(proto: ModelProto) -> ModelProto:
    """A copy that is told which candidates to keep, and tells their scores; for a look at the arithmetic alone.

    For every location it has an input ``choice_<block>`` (int32 ``[batch, K]``) in place of the selection, and an
    output ``scores_<block>`` (float32 ``[batch, N]``).

    Raises:
        InputError: The file has no ``TokenReorg`` node.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    nodes = reorganizations(copy)
    if not nodes:
        raise InputError("this file has no TokenReorg node, so there is nothing to choose", seen=proto.graph.name)
    function = next(f for f in copy.functions if f.name == op.NAME)
    function.input.append("choice")
    top = next(node for node in function.node if node.op_type == "TopK")
    top.CopyFrom(helper.make_node("Cast", ["choice"], [top.output[1]], to=onnx.TensorProto.INT64))
    for node in nodes:
        block = block_of(node)
        keep = next(a.i for a in node.attribute if a.name == "keep")
        node.input.append(f"choice_{block}")
        choice = helper.make_tensor_value_info(node.input[2], onnx.TensorProto.INT32, ["batch", keep])
        copy.graph.input.append(choice)
        copy.graph.node.append(helper.make_node("Identity", [node.input[1]], [f"scores_{block}"]))
        scores = helper.make_tensor_value_info(f"scores_{block}", onnx.TensorProto.FLOAT, ["batch", None])
        copy.graph.output.append(scores)
    return copy
