"""Variants derived from an exported file: with choices as outputs or inputs, with scores, and the slice twin."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import msgspec
import numpy as np
import onnx
from onnx import ModelProto, helper

from evit_deploy.errors import InputError
from evit_deploy.export.card import kept_name, read_card, write_card
from evit_deploy.tokens.operators import token_merge, token_reorg

if TYPE_CHECKING:
    import onnx_ir


def reorganizations(proto: ModelProto) -> list[onnx.NodeProto]:
    """The file's ``TokenReorg`` and ``TokenMerge`` nodes in order, one per location."""
    return [
        node
        for node in proto.graph.node
        if node.domain == token_reorg.DOMAIN and node.op_type in (token_reorg.NAME, token_merge.NAME)
    ]


def block_of(node: onnx.NodeProto) -> int:
    """The block of a location's node."""
    return int(_choice(node).rpartition("_")[2])


def _choice(node: onnx.NodeProto) -> str:
    """Name of a location's choice: an input of a merge, an output of a reorganization."""
    return node.input[2] if node.op_type == token_merge.NAME else node.output[1]


def _choice_length(node: onnx.NodeProto) -> int:
    counts = {attribute.name: attribute.i for attribute in node.attribute}
    return 2 * counts["candidates"] - counts["keep"] if node.op_type == token_merge.NAME else counts["keep"]


def with_indices(proto: ModelProto) -> ModelProto:
    """A copy whose choices are outputs too: ``kept_<block>``, int32; see :mod:`evit_deploy.tokens.choices`."""
    copy = ModelProto()
    copy.CopyFrom(proto)
    present = {output.name for output in copy.graph.output}
    for node in reorganizations(copy):
        if _choice(node) not in present:
            shape = ["batch", _choice_length(node)]
            info = helper.make_tensor_value_info(_choice(node), onnx.TensorProto.INT32, shape)
            copy.graph.output.append(info)
    return copy


def with_scores(proto: ModelProto) -> ModelProto:
    """A copy that also returns the choices and the values they are based on.

    The outputs are those of :func:`with_indices` and ``scores_<block>``, ``scores_<block>_1``, … (float32).
    """
    copy = with_indices(proto)
    ranks = _ranks(copy)
    for node in reorganizations(copy):
        _give_out_scores(copy, node, ranks)
    return copy


def scores_in(outputs: Mapping[str, np.ndarray], block: int) -> Any:
    """A location's scores among the outputs of such a copy: one array, or several in a tuple."""
    first = f"scores_{block}"
    found = tuple(value for name, value in outputs.items() if name == first or name.startswith(f"{first}_"))
    return found[0] if len(found) == 1 else found


def _ranks(proto: ModelProto) -> dict[str, int]:
    return {info.name: len(info.type.tensor_type.shape.dim) for info in proto.graph.value_info}


def _give_out_scores(proto: ModelProto, node: onnx.NodeProto, ranks: dict[str, int]) -> None:
    """Adds the values that a location's choice is based on to the outputs."""
    for index, value in enumerate(list(node.input[3:]) if node.op_type == token_merge.NAME else [node.input[1]]):
        name = f"scores_{block_of(node)}" + (f"_{index}" if index else "")
        shape = ["batch"] + [None] * (ranks.get(value, 2) - 1)
        proto.graph.node.append(helper.make_node("Cast", [value], [name], to=onnx.TensorProto.FLOAT))
        proto.graph.output.append(helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape))


def slice_twin(proto: ModelProto) -> ModelProto:
    """A copy with each location's node replaced by a plain slice to the same token count.

    The original takes longer than this twin by the cost of scoring, selecting, gathering, fusing and merging.

    Raises:
        InputError: The file has no locations.
    """
    import onnx_ir
    from onnx_ir.passes.common import RemoveUnusedFunctionsPass, RemoveUnusedNodesPass, RemoveUnusedOpsetsPass

    model = onnx_ir.from_proto(proto)
    graph = model.graph
    nodes = [node for node in graph if node.domain == token_reorg.DOMAIN]
    if not nodes:
        raise InputError("this file has no TokenReorg node, so there is nothing to slice", seen=proto.graph.name)

    def constant(name: str, number: int) -> onnx_ir.Value:
        tensor = onnx_ir.tensor(np.array([number], np.int64), name=name)
        value = onnx_ir.Value(name=name, const_value=tensor)
        graph.register_initializer(value)
        return value

    def sliced(node: onnx_ir.Node, value: onnx_ir.Value | None, end: int, label: str) -> onnx_ir.Value:
        bounds = [constant(f"{node.name}.{label}.{name}", i) for name, i in (("start", 0), ("end", end), ("axis", 1))]
        made = onnx_ir.Node("", "Slice", [value, *bounds], name=f"{node.name}.{label}")
        graph.insert_before(node, made)
        return made.outputs[0]

    for output in [value for value in graph.outputs if (value.name or "").startswith(kept_name(0)[:-1])]:
        graph.outputs.remove(output)
    for node in nodes:
        names = [name for name in ("prefix", "keep", "fuse", "candidates") if name in node.attributes]
        counts = {name: node.attributes[name].as_int() for name in names}
        tokens, other = node.outputs
        end = counts["prefix"] + counts["keep"] + counts.get("fuse", 0)
        tokens.replace_all_uses_with(sliced(node, node.inputs[0], end, "slice"))
        if node.op_type == token_merge.NAME:
            other.replace_all_uses_with(sliced(node, node.inputs[1], counts["keep"], "sizes"))
            choice = node.inputs[2]
            if choice is not None and len(choice.uses()) > 1:  # other users of the choice: all tokens join the first
                numbers = np.arange(2 * counts["candidates"] - counts["keep"], dtype=np.int32)
                numbers[counts["candidates"] :] = 0
                choice.replace_all_uses_with(_for_each_image(graph, node, numbers, "numbers", constant))
        elif other.uses():  # other values that the choice reorders keep their order
            numbers = np.arange(counts["keep"], dtype=np.int32)
            other.replace_all_uses_with(_for_each_image(graph, node, numbers, "numbers", constant))
        scores = node.inputs[1]
        if node.op_type == token_reorg.NAME and scores is not None and len(scores.uses()) > 1:  # other weighted values
            assert scores.shape is not None
            candidates = scores.shape[1]
            assert isinstance(candidates, int)
            even = np.full(candidates, 1 / candidates, np.float32)
            scores.replace_all_uses_with(_for_each_image(graph, node, even, "even", constant))
    for remove in (RemoveUnusedNodesPass(), RemoveUnusedFunctionsPass(), RemoveUnusedOpsetsPass()):
        remove(model)
    twin = onnx_ir.to_proto(model)
    card = read_card(proto)
    if card is not None:
        write_card(twin, msgspec.structs.replace(card, kind="slice"))
    # The checker would not find an outline's external data.
    if not any(tensor.external_data for tensor in twin.graph.initializer):
        onnx.checker.check_model(twin)
    return twin


def _for_each_image(
    graph: "onnx_ir.Graph",
    node: "onnx_ir.Node",
    row: np.ndarray,
    label: str,
    constant: "Callable[[str, int], onnx_ir.Value]",
) -> "onnx_ir.Value":
    """Repeats a row for every image: ``[batch, length]``."""
    import onnx_ir

    name = f"{node.name}.{label}"
    values = onnx_ir.Value(name=name, const_value=onnx_ir.tensor(row[None], name=name))
    graph.register_initializer(values)
    shape = onnx_ir.node("Shape", [node.inputs[0]], {"start": 0, "end": 1}, name=f"{name}.batch")
    whole = onnx_ir.node("Concat", [shape.outputs[0], constant(f"{name}.one", 1)], {"axis": 0}, name=f"{name}.shape")
    expanded = onnx_ir.node("Expand", [values, whole.outputs[0]], name=f"{name}.each")
    for made in (shape, whole, expanded):
        graph.insert_before(node, made)
    return expanded.outputs[0]


def with_choice(proto: ModelProto) -> ModelProto:
    """A copy that takes its choices as inputs and returns the values they would have been based on.

    Used to compare arithmetic independently of the choices. Each location has an input ``choice_<block>`` (int32) that
    replaces the choice, and outputs ``scores_<block>``, ``scores_<block>_1``, … (float32).

    Raises:
        InputError: The file has no ``TokenReorg`` node.
    """
    copy = ModelProto()
    copy.CopyFrom(proto)
    nodes = reorganizations(copy)
    if not nodes:
        raise InputError("this file has no TokenReorg node, so there is nothing to choose", seen=proto.graph.name)
    ranks = _ranks(copy)
    for function in copy.functions:
        if function.name == token_reorg.NAME:
            function.input.append("choice")
            top = next(node for node in function.node if node.op_type == "TopK")
            top.CopyFrom(helper.make_node("Cast", ["choice"], [top.output[1]], to=onnx.TensorProto.INT64))
    for node in nodes:
        block, length = block_of(node), _choice_length(node)
        _give_out_scores(copy, node, ranks)
        if node.op_type == token_merge.NAME:
            own = node.input[2]
            for other in copy.graph.node:  # other users of the choice read the input too
                other.input[:] = [f"choice_{block}" if value == own else value for value in other.input]
        else:
            node.input.append(f"choice_{block}")
        choice = helper.make_tensor_value_info(f"choice_{block}", onnx.TensorProto.INT32, ["batch", length])
        copy.graph.input.append(choice)
    return copy
