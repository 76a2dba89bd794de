"""Ways to damage an exported file in any precision, which verification must detect."""

import numpy as np
import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

from evit_deploy.export.card import LOGITS


def function_node(proto: ModelProto, output: str) -> onnx.NodeProto:
    """The node of the op's function that computes a value."""
    return next(node for node in proto.functions[0].node if output in node.output)


def head_weight(proto: ModelProto) -> TensorProto:
    """The stored weight of the last linear layer."""
    names = {"head.weight", "head.weight_quantized"}
    return next(tensor for tensor in proto.graph.initializer if tensor.name in names)


def negate_a_weight(proto: ModelProto) -> None:
    """Flips the sign of the head's largest weight."""
    tensor = head_weight(proto)
    array = numpy_helper.to_array(tensor).copy()
    largest = np.unravel_index(np.abs(array.astype(np.float32)).argmax(), array.shape)
    array[largest] = -array[largest]
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def shift_a_weight(proto: ModelProto) -> None:
    """Changes it by one percent; for FP32, whose limit is far smaller."""
    tensor = head_weight(proto)
    array = numpy_helper.to_array(tensor).copy()
    array[3, 3] += 0.01
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def poison_a_weight(proto: ModelProto, value: float) -> None:
    """Makes one weight of the head infinite or NaN."""
    tensor = head_weight(proto)
    array = numpy_helper.to_array(tensor).copy()
    array[0, 0] = value
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def keep_the_lowest(proto: ModelProto) -> None:
    """Keeps the lowest scores instead of the highest."""
    node = function_node(proto, "order")
    next(a for a in node.attribute if a.name == "largest").i = 0


def keep_the_second_best(proto: ModelProto) -> None:
    """Drops the best candidate and keeps the best dropped one: an off-by-one error."""
    node = function_node(proto, "order")
    index = list(proto.functions[0].node).index(node)
    node.input[1], node.output[1] = "one_more", "order_and_more"
    cut = ["order_and_more", "one_element", "to_the_end", "axis_1"]
    proto.functions[0].node.insert(index, helper.make_node("Add", ["keep_count", "one_element"], ["one_more"]))
    proto.functions[0].node.insert(index + 2, helper.make_node("Slice", cut, ["order"]))


def lose_the_fused_row(proto: ModelProto) -> None:
    """Sets the fused token to zero."""
    node = function_node(proto, "sum_float")
    index = list(proto.functions[0].node).index(node)
    node.output[0] = "sum_before"
    proto.functions[0].node.insert(index + 1, helper.make_node("Mul", ["sum_before", "zero"], ["sum_float"]))


def reverse_the_order(proto: ModelProto) -> None:
    """Keeps the same patches in reverse order, which is not damage."""
    node = function_node(proto, "order")
    index = list(proto.functions[0].node).index(node)
    node.output[1] = "order_before"
    for name, value in (("back", -1), ("beginning", -(2**62))):
        constant = helper.make_node("Constant", [], [name], value_ints=[value])
        proto.functions[0].node.insert(0, constant)
    reverse = helper.make_node("Slice", ["order_before", "back", "beginning", "axis_1", "back"], ["order"])
    proto.functions[0].node.insert(index + 3, reverse)


def depend_on_the_place(proto: ModelProto, shift: float = 0.01) -> None:
    """Adds a multiple of the batch position to the logits; the first image stays correct."""
    graph = proto.graph
    node = next(node for node in graph.node if LOGITS in node.output)
    node.output[list(node.output).index(LOGITS)] = "right"
    one = numpy_helper.from_array(np.array([shift], np.float32), "c")
    graph.initializer.append(numpy_helper.from_array(np.array(0, np.int64), "axis"))
    graph.node.extend(
        [
            helper.make_node("Shape", ["right"], ["shape"]),
            helper.make_node("ConstantOfShape", ["shape"], ["parts"], value=one),
            helper.make_node("CumSum", ["parts", "axis"], ["shift"], exclusive=1),
            helper.make_node("Add", ["right", "shift"], [LOGITS]),
        ]
    )


def depend_on_the_neighbors(proto: ModelProto) -> None:
    """Uses the mean of the batch's logits instead of each image's own mean."""
    graph = proto.graph
    node = next(node for node in graph.node if LOGITS in node.output)
    node.output[list(node.output).index(LOGITS)] = "right"
    graph.node.extend(
        [
            helper.make_node("ReduceMean", ["right", "class_axis"], ["own_mean"], keepdims=1),
            helper.make_node("ReduceMean", ["right"], ["mean_of_all"], keepdims=1),
            helper.make_node("Sub", ["right", "own_mean"], ["centered"]),
            helper.make_node("Add", ["centered", "mean_of_all"], [LOGITS]),
        ]
    )
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "class_axis"))
